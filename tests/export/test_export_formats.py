"""Every layout of an export: its README's snippet runs, other programs' samplers compute the student, uploads."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import tiny
from jdm.cli import parser as cli
from jdm.errors import RunError, UsageError
from jdm.evaluation.sampling import Sampler
from jdm.export import hub
from jdm.export.writers import WRITERS, export
from jdm.formats import lora_file
from jdm.generator import starting_noise
from jdm.library import load_model
from jdm.models import nano
from jdm.models.folder import save_pipeline
from jdm.models.stable_diffusion import ControlNetModel
from jdm.recipes import all_recipes
from jdm.run import described
from jdm.schedule import NoiseSchedule

PROMPTS = ["an ankle boot", "one dress", ""]
LAYOUTS = [layout for layout in WRITERS if layout != "onnx"]  # graphs have tests of their own, in test_onnx.py


@pytest.fixture(scope="module")
def run(teacher, tmp_path_factory):
    """A finished run's folder: its record, and a student whose UNet has moved away from its teacher's."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    model = load_model(str(teacher.with_name("student")))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.unet.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    save_pipeline(model, folder / "model", model.scheduler, model.card)
    asked = replace(tiny.run(all_recipes()["nano-canny"](), folder, teacher), data=replace(tiny.DATA, size=32))
    record = {"run": described(asked), "data": {"source": "fashion-mnist/test", "n": 64}, "versions": {"torch": "2"}}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def drawn(folder, seed=0):
    """The picture that the README's snippet draws, in the folder, with stock diffusers."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert code, "there is no snippet"
    assert "jdm" not in code[1]
    edges = (torch.rand(32, 32, generator=torch.Generator().manual_seed(1)) < 0.2) * 255
    Image.fromarray(edges.to(torch.uint8).numpy()).save(folder / "control.png")
    before = Path.cwd()
    try:
        os.chdir(folder)
        torch.manual_seed(seed)
        exec(code[1], {})
    finally:
        os.chdir(before)
    with Image.open(folder / "picture.png") as picture:
        assert picture.size == (32, 32)
        return torch.tensor(list(picture.getdata()), dtype=torch.float32)


def test_every_layouts_snippet_draws_the_same_picture(run, teacher, tmp_path):
    """A LoRA of full rank lacks only what changed in biases and normalisations; 8-bit pictures."""
    pictures = {}
    for layout in LAYOUTS:
        out = export(run, tmp_path / layout, format=layout, rank=10**4 if layout == "lora" else None)
        if layout == "controlnet":  # what it names as its base is put where it looks for it
            shutil.copytree(run / "model", out / "student")
        if layout == "lora":
            shutil.copytree(teacher, out / "teacher")
        pictures[layout] = drawn(out)
    assert pictures["diffusers"].std() > 5
    assert torch.equal(pictures["single-file"], pictures["diffusers"])
    assert torch.equal(pictures["controlnet"], pictures["diffusers"])
    shutil.rmtree(tmp_path / "lora" / "teacher")
    model = load_model(str(run / "model"))
    for ours, theirs in zip(model.unet.modules(), load_model(str(teacher)).unet.modules(), strict=True):
        if not isinstance(ours, torch.nn.Linear | torch.nn.Conv2d):
            ours._parameters.update(theirs._parameters)
        elif ours.bias is not None:
            ours.bias = theirs.bias
    save_pipeline(model, tmp_path / "without", model.scheduler, model.card)
    shutil.copy(tmp_path / "diffusers" / "README.md", tmp_path / "without")
    assert (pictures["lora"] - drawn(tmp_path / "without")).abs().max() <= 1
    assert (pictures["lora"] - pictures["diffusers"]).abs().max() > 1, "the biases moved"


def test_a_many_step_controlnets_readme_names_its_base(controlled, tmp_path):
    out = export(controlled, tmp_path / "hints", format="controlnet")
    text = (out / "README.md").read_text()
    assert "num_inference_steps=50, guidance_scale=2.0" in text
    assert 'base = "base"' in text, "nothing says what it was trained with"
    net, theirs = ControlNetModel.from_pretrained(out), load_model(str(controlled)).controlnet
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in net.state_dict().items())
    shipped = (export("nano-controlnet", tmp_path / "shipped", format="controlnet") / "README.md").read_text()
    assert 'base = "nano-sd"' in shipped


def test_the_readme_tells_recipe_and_measurements(run, teacher, tmp_path):
    (tmp_path / "out.json").write_text(json.dumps({"model": str(run), "fd": 12.345678, "control": "canny", "nfe": 1}))
    out = export(run, tmp_path / "mine", metrics=tmp_path / "out.json")
    text = (out / "README.md").read_text()
    for said in ("| base model | teacher |", "| method | jdm |", "| levels | 625 (sigma / alpha = 2.5017) |",
                 "| method.condition.weight | 1 |", "| method.student.optimiser.lr |", "| steps | 2 |",
                 "| fd | 12.3457 |", "| model | mine |", "Inherit from the base model (teacher)",
                 "license_name: inherit-from-base-model"):
        assert said in text, said
    for place in (tmp_path, teacher.parent, run.parent):
        assert str(place) not in text
    assert "base_model:" not in text, "a folder of this disk is not a hub model"
    text = (export(run, tmp_path / "lora", format="lora", rank=4) / "README.md").read_text()
    assert re.search(r"Rank 4 of .*? is 0\.\d{4}; at other ranks", text, re.DOTALL)


def test_comfyui_and_a1111_settings_compute_the_student(run, tmp_path):
    """Their samplers' arithmetic, from their sources, on the numbers of the README: four decimals of sigma."""
    text = (export(run, tmp_path / "mine", format="single-file") / "README.md").read_text()
    sigma, start = (float(n) for n in re.findall(r"sigma_max (\d+\.\d{4})", text))
    assert f"sigma max {sigma:.4f}, SGM noise multiplier on" in text
    model = load_model(str(run / "model"))
    net, words = Sampler(model).net, model.text()(PROMPTS)
    z = starting_noise(model.latent_shape(3, 32), seed=5)
    control = (torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) < 0.2).float()
    signal = NoiseSchedule.scaled_linear().alphas_cumprod
    levels = ((1 - signal) / signal).log() / 2
    level = (levels - torch.tensor(sigma).log()).abs().argmin()
    assert level == 625

    def euler(x):
        """One step of k-diffusion from sigma to 0; a step of its LCM sampler is the same."""
        eps = net(x / (1 + sigma**2) ** 0.5, level.expand(3), words, control)
        slope = (x - (x - sigma * eps)) / sigma
        return x - sigma * slope

    with torch.no_grad():
        ours = Sampler(model).x(z, PROMPTS, control)
        assert (euler(z * start) - ours).abs().max() < 1e-3, "ComfyUI: AddNoise, then no noise"
        assert (euler(z * (1 + sigma**2) ** 0.5) - ours).abs().max() < 1e-3, "A1111: SGM noise multiplier"
        assert (euler(z * sigma) - ours).abs().max() > 0.1, "a plain KSampler is not exact"


@pytest.mark.parametrize("sampler", ["euler", "lcm"])
def test_stock_samplers_compute_the_student(sampler, run, tmp_path):
    """diffusers' Euler with A1111's multiplier ("leading"), and LCM at timesteps=[625]; from the single files."""
    out = export(run, tmp_path / "mine", format="single-file")
    net = ControlNetModel.from_single_file(str(out / "mine_controlnet.safetensors"), config=str(out / "config"),
                                           subfolder="controlnet")
    pipe = diffusers.StableDiffusionControlNetPipeline.from_single_file(str(out / "mine.safetensors"), controlnet=net,
                                                                        config=str(out / "config"))
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config({**nano.SCHEDULER, "timestep_spacing": "leading"}) \
        if sampler == "euler" else diffusers.LCMScheduler.from_config(nano.SCHEDULER)
    model = load_model(str(run / "model"))
    z = starting_noise(model.latent_shape(3, 32), seed=5)
    control = (torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) < 0.2).float()
    stock = pipe(PROMPTS, image=control, latents=z.clone(), timesteps=[625], guidance_scale=1.0, output_type="latent")
    with torch.no_grad():
        ours = Sampler(model).x(z, PROMPTS, control)
    assert (stock.images - ours).abs().max() < 1e-4


def test_an_inexpressible_schedule_is_named_in_the_readme(run, tmp_path):
    model = load_model(str(run / "model"))
    other = {**model.scheduler, "trained_betas": [0.003] * 626}
    save_pipeline(model, tmp_path / "model", other, model.card)
    text = (export(tmp_path, tmp_path / "out", format="single-file") / "README.md").read_text()
    assert "cannot be expressed there" in text
    assert "KarrasScheduler" not in text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_precision_asked_for(layout, run, tmp_path):
    out = export(run, tmp_path / "out", torch.bfloat16, layout)
    for file in out.rglob("*.safetensors"):
        for key, tensor in load_file(file).items():
            wanted = torch.float32 if key.endswith(".alpha") else torch.bfloat16
            assert tensor.dtype == wanted, key
    if layout == "lora":
        with safe_open(out / "pytorch_lora_weights.safetensors", "pt") as opened:
            assert "lora_adapter_metadata" in opened.metadata(), "alpha is there"
    assert "| weights on disk | bfloat16 |" in (out / "README.md").read_text()


def test_refused_exports_write_nothing(run, teacher, tmp_path, monkeypatch):
    out = tmp_path / "out"
    (tmp_path / "bad.json").write_text('{"a": {"fd": 1}}')
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "model_index.json").write_text("{}")
    torch.save({}, tmp_path / "pickled" / "weights.bin")
    torch.save({}, tmp_path / "model.ckpt")
    before = sorted(tmp_path.rglob("*"))

    def refused(message, *given, error=UsageError, **asked):
        with pytest.raises(error, match=message) as caught:
            export(*(given or (run, out)), **asked)
        assert "\n" not in str(caught.value)
        assert sorted(tmp_path.rglob("*")) == before

    refused("no format 'singel-file'; did you mean single-file", format="singel-file")
    refused("the formats are diffusers, single-file, controlnet, lora, onnx", format="tflite")
    refused("--rank is for a LoRA", rank=4)
    refused("at least 1, got 0", rank=0, format="lora")
    refused("model.ckpt is a pickle", tmp_path / "model.ckpt", out)
    refused("weights.bin is a pickle", tmp_path / "pickled", out)
    refused("bad.json: a: expected .*a file written by jdm evaluate --json", metrics=tmp_path / "bad.json")
    refused("there is no such file; give a file written by jdm evaluate --json", metrics=tmp_path / "nowhere.json")
    refused("has no ControlNet", teacher, out, format="controlnet")
    refused("name it with --base", teacher, out, format="lora")
    refused("nowhere: no such folder.*with --base", format="lora", base="nowhere")
    refused("is one network, not a whole model", "nano-controlnet", out, format="single-file")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lora_file, "write_kohya", full)
    refused("No space left on device.*free some space", format="lora", error=RunError)


def test_the_command_line_names_the_same_formats():
    assert list(cli.FORMATS) == list(WRITERS)


class Hub:
    """Stands in for huggingface_hub.HfApi."""

    def __init__(self, error=None):
        self.calls, self.error = [], error

    def create_repo(self, *args, **kwargs):
        self.calls.append(("create_repo", args, kwargs))
        if self.error:
            raise self.error
        return f"https://huggingface.co/{args[0]}"

    def upload_folder(self, **kwargs):
        self.calls.append(("upload_folder", sorted(p.name for p in Path(kwargs["folder_path"]).iterdir()), kwargs))


def test_a_finished_folder_is_uploaded(run, tmp_path, monkeypatch, capsys):
    api = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    out = tmp_path / "mine"
    assert cli.main(["export", str(run), str(out), "--push", "me/mine"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(out), "https://huggingface.co/me/mine"]
    (made, name, options), (sent, files, how) = api.calls
    assert (made, name, options) == ("create_repo", ("me/mine",), {"repo_type": "model", "exist_ok": True})
    assert (sent, how["repo_id"], how["folder_path"]) == ("upload_folder", "me/mine", out)
    assert {"README.md", "model_index.json", "unet"} <= set(files)


def test_a_failed_upload_keeps_the_folder(run, tmp_path, monkeypatch, capsys):
    class RefusedError(Exception):
        response = type("Response", (), {"status_code": 403})()

    for error, said in ((RefusedError("no\nentry"), "hf auth login"), (ConnectionError("no way"), "check the network"),
                        (type("OfflineModeIsEnabled", (Exception,), {})("off"), "unset HF_HUB_OFFLINE")):
        with pytest.raises(RunError, match=f"not uploaded to me/mine .*{said}.*hf upload me/mine") as caught:
            hub.push(tmp_path, "me/mine", Hub(error))
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(RefusedError("no")))
    assert cli.main(["export", str(run), str(tmp_path / "mine"), "--push", "me/mine"]) == 3
    made = {f.relative_to(run / "model") for f in (run / "model").rglob("*.safetensors")}
    assert made == {f.relative_to(tmp_path / "mine") for f in (tmp_path / "mine").rglob("*.safetensors")}
    for file in made:
        ours, theirs = load_file(tmp_path / "mine" / file), load_file(run / "model" / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(v, theirs[k]) for k, v in ours.items()), file
    assert cli.main(["export", str(run), str(tmp_path / "other"), "--push", "mine"]) == 2
    assert "owner/name, got 'mine'" in capsys.readouterr().err
    assert not (tmp_path / "other").exists(), "a bad name is seen before the work"
