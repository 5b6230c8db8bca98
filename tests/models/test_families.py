"""Tiny models of SD1.5's, SD2.1's and SDXL's classes: each trains, resumes, exports, and runs in stock diffusers."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file

import jdm.evaluation.evaluate
import tiny
from families import made
from jdm.data.sources import load_pictures
from jdm.errors import UsageError
from jdm.evaluation.reference import references
from jdm.evaluation.sampling import Sampler, generator
from jdm.generator import starting_noise
from jdm.library import load_model
from jdm.models.folder import save_pipeline
from jdm.models.stable_diffusion import StableDiffusion, UNetDenoiser
from jdm.models.stable_diffusion_xl import StableDiffusionXL
from jdm.models.text import TwoTextEncoders
from jdm.recipes import all_recipes, recorded
from jdm.space import unit
from jdm.training import checkpoint
from jdm.training.loop import train
from jdm.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("untrained_judge")
PROMPTS = ["an ankle boot", "a coat"]
STOCK = """
import json, sys
sys.modules["jdm"] = None  # importing it raises ImportError
import diffusers
from safetensors.torch import load_file, save_file
folder, asked, out = sys.argv[1:]
asked = load_file(asked)
pipe = getattr(diffusers, json.load(open(folder + "/model_index.json"))["_class_name"]).from_pretrained(folder)
pipe.set_progress_bar_config(disable=True)
images = pipe(json.loads(sys.stdin.read()), image=asked["control"], latents=asked["z"], num_inference_steps=1,
              guidance_scale=1, output_type="pt").images
save_file({"images": images.float().contiguous()}, out)
"""


@pytest.fixture(scope="module", params=["sd15", "sd21-v", "sdxl"])
def family(request, tmp_path_factory):
    """(kind, folder of its tiny teacher, folder of a student trained three steps)."""
    place = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = made(request.param)
    for part in model.modules().values():
        part.eval().requires_grad_(False)
    teacher = save_pipeline(model, place / "teacher")
    recipe = all_recipes()["nano-canny"]()
    branch = recipe.method.controlnet
    branch = replace(branch, optimiser=replace(branch.optimiser, lr=0.1, warmup=0))  # zero no more
    loud = replace(recipe.method, controlnet=branch)
    run = tiny.run(replace(recipe, method=loud), place / "run", teacher, steps=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jdm.evaluation.evaluate, "judge", tiny.judge)
        return request.param, teacher, train(run), run


def test_a_folder_loads_as_its_indexs_family(family):
    kind, teacher, student, _ = family
    wanted = StableDiffusionXL if kind == "sdxl" else StableDiffusion
    assert type(load_model(str(teacher))) is wanted
    assert type(load_model(str(student))) is wanted
    assert load_model(str(student)).prediction == ("v_prediction" if kind == "sd21-v" else "epsilon")


def reproduced(folder, place, size):
    """Largest difference between our pictures [0, 1] and those of a stock pipeline that is not told their size."""
    student = load_model(str(folder))
    height, width = size
    control = (torch.rand(2, 1, height, width, generator=torch.Generator().manual_seed(0)) < 0.2).float()
    control = control.expand(-1, 3, -1, -1)
    z = starting_noise(student.latent_shape(2, size), seed=5)
    with torch.no_grad():
        ours = unit(student.space.decode(Sampler(student).x(z, PROMPTS, control))).clamp(0, 1)
        other = unit(student.space.decode(Sampler(student).x(z, PROMPTS, 1 - control))).clamp(0, 1)
    assert (ours - other).abs().max() > 2e-3, "a control that changes nothing would prove nothing"
    save_file({"z": z, "control": control.contiguous()}, place / "asked.safetensors")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", STOCK, folder, place / "asked.safetensors", place / "out"],
                          input=json.dumps(PROMPTS), text=True, capture_output=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return (load_file(place / "out")["images"] - ours).abs().max()


def test_stock_diffusers_reproduces_the_one_step_student(family, tmp_path):
    assert reproduced(family[2], tmp_path, (32, 32)) < 1e-4


def test_a_wide_student_runs_in_stock_diffusers(family, tmp_path):
    kind, teacher, _, run = family
    wide = replace(run, out=tmp_path / "run", data=replace(run.data, size=(28, 44)))  # latents of odd sides
    folder = train(wide)
    student = load_model(str(folder))
    assert student.size == (28, 44)
    model = load_model(str(teacher))
    assert (model.at((28, 44)).size, model.size) == ((28, 44), 32)
    if kind == "sdxl":
        assert sizes_told(student).tolist() == [[28, 44, 0, 0, 28, 44]]
    assert reproduced(folder, tmp_path, (28, 44)) < 1e-4
    assert recorded(wide.out / "run.json") == replace(wide, out=wide.out)


def test_a_resumed_run_ends_with_the_same_bits(family, tmp_path):
    *_, run = family
    halfway = Trainer(replace(run, out=tmp_path))
    halfway.step(0)
    del halfway
    train(replace(run, out=tmp_path))
    a, b = (load_file(checkpoint.last(out) / "state.safetensors") for out in (run.out, tmp_path))  # type: ignore[operator]
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def test_guided_steps_equal_the_stock_pipelines(family):
    kind, teacher, *_ = family
    model = load_model(str(teacher))
    pipe = model.pipeline(DDIMScheduler.from_config(model.scheduler))
    pipe.set_progress_bar_config(disable=True)
    z = starting_noise(model.latent_shape(2, 32), seed=1)
    stock = pipe(["a coat", "an ankle boot"], latents=z, num_inference_steps=4, guidance_scale=3.0,  # type: ignore[operator]
                 height=32, width=32, output_type="pt").images
    sampler = Sampler(model, 4, 3.0)
    with torch.no_grad():
        ours = unit(model.space.decode(sampler.x(z, ["a coat", "an ankle boot"]))).clamp(0, 1)
    assert (stock - ours).abs().max() < 1e-4, kind


@torch.no_grad()
def sizes_told(model: Any) -> torch.Tensor:
    """The sizes [1, 6] that SDXL's UNet is told with a picture of the model's own size."""
    net, heard = model.denoiser(), []
    hook = net.backbone.register_forward_pre_hook(
        lambda _, args, named: heard.append(named["added_cond_kwargs"]["time_ids"]), with_kwargs=True)
    net(torch.zeros(model.latent_shape(1, model.size)), torch.zeros(1), model.text()(["a"]))
    hook.remove()
    return heard[0]


@torch.no_grad()
def test_sdxls_text_and_sizes_are_the_stock_pipelines(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = made("sdxl")
    pipe: Any = model.pipeline(DDIMScheduler.from_config(model.scheduler))
    parts, prompts = (model.text_encoder, model.tokenizer, model.text_encoder_2, model.tokenizer_2), ["a coat", "", "a"]
    for zeros in (True, False):
        states, added = TwoTextEncoders(*parts, zeros=zeros)(prompts)
        for i, prompt in enumerate(prompts):
            exact, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
            quiet = 0 if zeros and not prompt else 1
            torch.testing.assert_close(states[i], quiet * exact[0])
            torch.testing.assert_close(added["text_embeds"][i], quiet * pooled[0])
    for size, told in ((32, (32, 32)), ((64, 48), (64, 48))):
        ids = pipe._get_add_time_ids(told, (0, 0), told, torch.float32, text_encoder_projection_dim=12)
        assert ids.tolist() == [[*told, 0, 0, *told]]
        assert torch.equal(sizes_told(model.at(size)), ids)
    for zeros in (True, False):
        loaded = load_model(str(save_pipeline(replace(model, zeros=zeros), tmp_path / str(zeros))))
        assert loaded.text()([""])[1]["text_embeds"].any() != zeros


@pytest.mark.parametrize("name", ["nano-controlnet", "nano-posterior", "nano-text-guided", "nano-no-warm-up"])
def test_every_sdxl_pass_knows_the_picture_size(name, tmp_path, monkeypatch):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = made("sdxl")
    for part in model.modules().values():
        part.eval().requires_grad_(False)
    teacher = save_pipeline(model, tmp_path / "teacher")
    card = {"kind": "one-step", "method": "diff-instruct", "control": None, "levels": [625]}
    save_pipeline(model, tmp_path / "student", model.step_scheduler([625]), card=card)
    run = tiny.run(all_recipes()[name](), tmp_path / "run", teacher)
    told, passed = [], UNetDenoiser.told

    def noted(self, x_t, text):
        told.append(text[1]["time_ids"])
        return passed(self, x_t, text)

    monkeypatch.setattr(UNetDenoiser, "told", noted)
    Trainer(replace(run, data=replace(run.data, size=(28, 44)))).step(0)
    assert torch.cat(told).unique(dim=0).tolist() == [[28, 44, 0, 0, 28, 44]]


def test_evaluation_tells_sdxl_the_size_it_draws(tmp_path, monkeypatch):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = save_pipeline(made("sdxl"), tmp_path / "teacher")
    monkeypatch.setattr("jdm.evaluation.reference._cache", lambda: tmp_path / "cache")
    told, passed = [], UNetDenoiser.told

    def noted(self, x_t, text):
        told.append(text[1]["time_ids"])
        return passed(self, x_t, text)

    monkeypatch.setattr(UNetDenoiser, "told", noted)
    pictures = load_pictures("fashion-mnist", "test[:4]", (28, 44))
    chosen = jdm.evaluation.evaluate.extractors("fashion-mnist", quick=True)
    references(str(teacher), chosen, pictures, steps=1, samples=4)
    generator(str(teacher), steps=1)("a coat", torch.zeros(3, 28, 44, dtype=torch.uint8))
    assert torch.cat(told).unique(dim=0).tolist() == [[28, 44, 0, 0, 28, 44]]


def test_a_missing_weight_is_refused_not_made_up(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = made("sdxl")
        controlnet = model.new_controlnet()
    folder = save_pipeline(model.with_networks(controlnet=controlnet), tmp_path / "model")
    for part in ("unet", "vae", "text_encoder", "text_encoder_2", "controlnet"):
        (file,) = (folder / part).glob("*.safetensors")
        before, tensors = file.read_bytes(), {k: v.clone() for k, v in load_file(file).items()}
        del tensors[min(tensors)]
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(UsageError, match=r"could not be loaded as a SDXL model: .*lacks 1 weight of the \w+"):
            load_model(str(folder))
        file.write_bytes(before)
    whole = load_model(str(folder)).modules()  # as it was, once nothing is missing
    for part, network in {**model.modules(), "controlnet": controlnet}.items():
        assert all(torch.equal(v, whole[part].state_dict()[k]) for k, v in network.state_dict().items())


def test_sdxl_without_its_second_encoder_is_refused(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        folder = save_pipeline(made("sdxl"), tmp_path / "broken")
    index = json.loads((folder / "model_index.json").read_text())
    del index["text_encoder_2"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match="is not a SDXL model: it lacks text_encoder_2"):
        load_model(str(folder))
