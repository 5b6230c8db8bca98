"""What is exported runs in stock diffusers, in another interpreter where this package cannot be imported."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from jdm.errors import UsageError
from jdm.evaluation.sampling import Sampler
from jdm.export.writers import export
from jdm.generator import starting_noise
from jdm.library import load_model
from jdm.recipes import all_recipes
from jdm.space import unit
from jdm.training.loop import train

MINE = """from dataclasses import dataclass
from jdm.controls import LowRes
@dataclass(frozen=True)
class Mine(LowRes):
    factor: int = 8
"""
PROMPTS = ["an ankle boot", "one dress", ""]
STOCK = """
import json, sys
sys.modules["jdm"] = None  # importing it raises ImportError
from diffusers import StableDiffusionControlNetPipeline
from safetensors.torch import load_file, save_file
folders, asked, out = sys.argv[1:-2], load_file(sys.argv[-2]), sys.argv[-1]
prompts = json.loads(sys.stdin.read())
images = {}
for i, folder in enumerate(folders):
    pipe = StableDiffusionControlNetPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    images[str(i)] = pipe(prompts, image=asked["control"], latents=asked["z"], num_inference_steps=1, guidance_scale=1,
                          height=32, width=32, output_type="pt").images.float().contiguous()
save_file(images, out)
"""


def test_an_export_equals_its_student_in_stock_diffusers(student, tmp_path):
    """At full precision to 1e-4; with half-precision files, whose rounding is 5e-4 of each weight, to 2e-2."""
    control = (torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0)) < 0.2).float().expand(-1, 3, -1, -1)
    model = load_model(str(student))
    z = starting_noise(model.latent_shape(3, 32), seed=5)
    with torch.no_grad():
        ours = unit(model.space.decode(Sampler(model).x(z, PROMPTS, control))).clamp(0, 1)
        blind = unit(model.space.decode(Sampler(model).x(z, PROMPTS, torch.zeros_like(control)))).clamp(0, 1)
    assert (ours - blind).abs().max() > 2e-3, "a control that changes nothing would prove nothing"
    save_file({"z": z, "control": control.contiguous()}, tmp_path / "asked.safetensors")
    half = export(student, tmp_path / "half", torch.float16)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", STOCK, student, half, tmp_path / "asked.safetensors",
                           tmp_path / "images.safetensors"], input=json.dumps(PROMPTS), text=True, capture_output=True,
                          env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    images = load_file(tmp_path / "images.safetensors")
    assert (images["0"] - ours).abs().max() < 1e-4
    assert (images["1"] - ours).abs().max() < 2e-2


def test_half_precision_changes_the_weights_dtype_alone(student, tmp_path):
    half = export(student, tmp_path / "half", torch.float16)
    assert all(t.dtype == torch.float16 for f in half.rglob("*.safetensors") for t in load_file(f).values()
               if t.is_floating_point())
    assert (half / "jdm.json").read_text() == (student / "jdm.json").read_text()
    assert load_model(str(half)).levels == (625,)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_many_steps_equal_those_of_the_stock_pipeline(guidance, teacher):
    model = load_model(str(teacher))
    pipe = diffusers.StableDiffusionPipeline(
        unet=model.unet, vae=model.vae, text_encoder=model.text_encoder, tokenizer=model.tokenizer,
        scheduler=diffusers.DDIMScheduler.from_config(model.scheduler), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    z = starting_noise(model.latent_shape(3, 32), seed=5)
    stock = pipe(PROMPTS, latents=z.clone(), num_inference_steps=4, guidance_scale=guidance, height=32, width=32,
                 output_type="pt").images
    with torch.no_grad():
        ours = unit(model.space.decode(Sampler(model, 4, guidance).x(z, PROMPTS))).clamp(0, 1)
    assert (stock - ours).abs().max() < 1e-4


def test_an_unfinished_run_exports_without_being_touched(teacher, tmp_path, untrained_judge):
    run = tiny.run(all_recipes()["nano-canny"](), tmp_path / "run", teacher)
    whole = train(run)
    kept = tmp_path / "kept"
    shutil.move(whole, kept)
    before = {f: f.read_bytes() for f in run.out.rglob("*") if f.is_file()}
    made = export(run.out, tmp_path / "made")
    assert before == {f: f.read_bytes() for f in run.out.rglob("*") if f.is_file()}
    for file in kept.rglob("*.safetensors"):
        a, b = load_file(file), load_file(made / file.relative_to(kept))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert (made / "jdm.json").read_text() == (kept / "jdm.json").read_text()
    export(run.out, tmp_path / "one_file", format="single-file")
    assert {p.name for p in tmp_path.iterdir()} == {"run", "kept", "made", "one_file"}, "nothing is left behind"


def test_a_users_control_is_named_with_its_settings(teacher, tmp_path, untrained_judge):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    run = tiny.run(all_recipes()["nano-canny"](), tmp_path / "run", teacher)
    run = replace(run, method=replace(run.method, control=f"{file}:Mine"))
    expected = {"function": "mine.py:Mine", "factor": 8, "temperature": 0.1}
    assert json.loads((train(run) / "jdm.json").read_text())["preprocessor"] == expected
    shutil.rmtree(run.out / "model")
    file.write_text("raise ValueError")  # it is not run for this
    again = export(run.out, tmp_path / "made")
    assert json.loads((again / "jdm.json").read_text())["preprocessor"] == expected
    assert "| control map | mine.py:Mine, factor 8, temperature 0.1 |" in (again / "README.md").read_text()


def test_nothing_is_exported_over_something_or_from_nothing(student, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(UsageError, match="not empty; name a new folder"):
        export(student, tmp_path / "taken")
    with pytest.raises(UsageError, match="is not a run"):
        export(tmp_path / "taken", tmp_path / "out")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "run.json").write_text("{}")
    with pytest.raises(UsageError, match="has no checkpoint yet"):
        export(tmp_path / "begun", tmp_path / "out")
    assert not (tmp_path / "out").exists()
