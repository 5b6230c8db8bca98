"""Exports of SD3 and Z-Image students: LoRA, ControlNet and README in stock diffusers, ComfyUI's names key by key."""

import json
import re

import diffusers
import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_z_image_lora_to_diffusers
from diffusers.loaders.single_file_utils import (
    convert_z_image_controlnet_checkpoint_to_diffusers,
    convert_z_image_transformer_checkpoint_to_diffusers,
)
from PIL import Image
from safetensors.torch import load_file

from families import made
from jdm.errors import UsageError
from jdm.export.writers import export
from jdm.library import load_model
from jdm.models.folder import save_pipeline

CONTROL = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=["sd35", "z-image"])
def student(request, tmp_path_factory):
    """(folder of the base, folder of a one-step student whose every network differs from the base's)."""
    place = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = made(request.param)
        base = save_pipeline(model, place / "base")
        net, backbone = model.new_controlnet(), load_model(str(base)).backbone
        for part in (net, backbone):
            for p in part.parameters():
                p.add_(0.05 * torch.randn_like(p))
    model = model.with_networks(controlnet=net, backbone=backbone)
    card = {"kind": "one-step", "method": "jdm", "control": "canny", "levels": [999]}
    return base, save_pipeline(model, place / "student", model.step_scheduler([999]), card=card)


def drawn(folder, monkeypatch, **names):
    """What the README's code draws, in its folder."""
    monkeypatch.chdir(folder)
    Image.fromarray((255 * CONTROL).byte().permute(1, 2, 0).numpy()).save("control.png")
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    for name, value in names.items():
        code = re.sub(rf'{name} = "[^"]*"', f"{name} = {str(value)!r}", code)
    torch.manual_seed(0)
    found = {}
    exec(code, found)
    return found["pipe"], found["image"]


def test_the_readmes_code_draws_the_student(student, tmp_path, monkeypatch):
    _, folder = student
    pipe, image = drawn(export(folder, tmp_path / "mine"), monkeypatch)
    assert type(pipe).__name__ == load_model(str(folder)).PIPELINES[1]
    assert image.size == (32, 32)
    text = (tmp_path / "mine" / "README.md").read_text()
    assert "control_image=control, num_inference_steps=1, guidance_scale=" in text
    assert ("guidance_scale=0.0" in text) == (type(pipe).__name__ == "ZImageControlNetPipeline")


def test_a_lora_and_controlnet_load_in_diffusers(student, tmp_path, monkeypatch):
    """At full rank a LoRA holds every linear layer; the others are the base's, so that weights are compared."""
    base, folder = student
    out = export(folder, tmp_path / "lora", format="lora", rank=16, base=str(base))
    pipe, _ = drawn(out, monkeypatch, base=base)
    theirs, ours = pipe.transformer, load_model(str(folder)).backbone
    part = pipe.transformer
    part.fuse_lora()
    found = {k.replace(".base_layer", ""): v for k, v in part.state_dict().items() if "lora_" not in k}
    linear = [f"{path}.weight" for path, m in ours.named_modules() if isinstance(m, torch.nn.Linear)]
    assert len(linear) > 20
    worst = max(float((found[k] - ours.state_dict()[k]).abs().max()) for k in linear if min(found[k].shape) <= 16)
    assert worst < 1e-5
    net = load_model(str(folder)).controlnet.state_dict()
    assert all(torch.equal(v, pipe.controlnet.state_dict()[k]) for k, v in net.items())
    assert theirs is part


def test_a_controlnet_alone_holds_nothing_else(student, tmp_path, monkeypatch):
    _, folder = student
    out = export(folder, tmp_path / "net", format="controlnet")
    kind = json.loads((out / "config.json").read_text())["_class_name"]
    net = load_model(str(folder)).controlnet
    assert load_file(out / "diffusion_pytorch_model.safetensors").keys() == net.state_dict().keys()
    again = getattr(diffusers, kind).from_pretrained(out)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in net.state_dict().items())
    whole = load_file(next((folder / "controlnet").glob("*.safetensors")))
    assert whole.keys() == net.state_dict().keys(), "what it borrows is not saved twice"


def test_comfyuis_names_are_those_diffusers_reads(student, tmp_path):
    base, folder = student
    if "z-image" not in str(base):
        with pytest.raises(UsageError, match="no single file is written for SD3 models"):
            export(folder, tmp_path / "one", format="single-file")
        text = (export(folder, tmp_path / "net", format="controlnet") / "README.md").read_text()
        assert "No layout of these programs is written for SD3" in text
        return
    model = load_model(str(folder))
    out = export(folder, tmp_path / "one", format="single-file")
    file = load_file(out / "one.safetensors")
    assert all(key.startswith("model.diffusion_model.") for key in file)
    assert any("attention.qkv.weight" in key for key in file)
    found = convert_z_image_transformer_checkpoint_to_diffusers(dict(file))
    ours = model.backbone.state_dict()
    assert found.keys() == ours.keys()
    assert all(torch.equal(v, ours[k]) for k, v in found.items())
    net = convert_z_image_controlnet_checkpoint_to_diffusers(
        load_file(out / "one_controlnet.safetensors"), model.controlnet.config)
    assert net.keys() == model.controlnet.state_dict().keys()
    lora = export(folder, tmp_path / "lora", format="lora", rank=2, base=str(base))
    comfyui = load_file(lora / "lora_comfyui.safetensors")
    assert all(key.startswith("diffusion_model.") for key in comfyui)
    found, theirs = (_convert_non_diffusers_z_image_lora_to_diffusers(dict(comfyui)),
                     load_file(lora / "pytorch_lora_weights.safetensors"))
    assert found.keys() == theirs.keys()
    assert all(torch.equal(v, theirs[k]) for k, v in found.items())
    assert "| one.safetensors | models/diffusion_models |" in (out / "README.md").read_text()
