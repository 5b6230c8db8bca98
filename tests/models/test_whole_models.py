"""Foreign models: a part that is missing, of another kind or not finite is refused in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jdm.errors import UsageError
from jdm.export.writers import export
from jdm.library import load_model
from tiny import same


@pytest.fixture
def folder(controlled, tmp_path) -> Path:
    return shutil.copytree(controlled, tmp_path / "foreign")


def changed(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def recast(folder: Path, convert) -> None:
    file = next(folder.glob("*.safetensors"))
    save_file({k: convert(v).contiguous() for k, v in load_file(file).items()}, file, {"format": "pt"})


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "controlnet"])
@pytest.mark.parametrize("kind", ["int8", "bool", "complex64", "float8_e4m3fn"])
@pytest.mark.hostile("weights")
def test_weights_that_are_no_real_numbers(folder, part, kind):
    recast(folder / part, lambda value: value.to(getattr(torch, kind)))
    with pytest.raises(UsageError, match=f"{part}/.* weights must be in F16, BF16, F32, F64"):
        load_model(str(folder))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "controlnet"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.hostile("weights")
def test_one_weight_that_is_not_finite(folder, part, value):
    def spoilt(tensor):
        tensor.view(-1)[-1] = value
        return tensor

    recast(folder / part, spoilt)
    with pytest.raises(UsageError, match=f"{part}: .* is not finite"):
        load_model(str(folder))
    with pytest.raises(UsageError, match="is not finite"):
        export(folder, folder.with_name("out"))
    assert not folder.with_name("out").exists()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler", "controlnet"])
@pytest.mark.parametrize("entry", [[None, None], None, "name", ["diffusers", "UNet1DModel"]], ids=str)
@pytest.mark.hostile("parts")
def test_an_index_that_names_no_such_class(folder, part, entry):
    changed(folder / "model_index.json", **{part: entry})
    with pytest.raises(UsageError, match=rf"model_index.json.*{part}"):
        load_model(str(folder))


@pytest.mark.parametrize(("part", "named"), [
    ("unet", {"_class_name": "UNet1DModel"}), ("vae", {"_class_name": "VQModel"}),
    ("text_encoder", {"architectures": ["BertModel"]}), ("controlnet", {"_class_name": "UNet2DConditionModel"})])
@pytest.mark.hostile("parts")
def test_a_config_of_another_class(folder, part, named):
    changed(folder / part / "config.json", **named)
    with pytest.raises(UsageError, match=rf"{part}/config.json is of a \w+, not of a"):
        load_model(str(folder))


@pytest.mark.parametrize("contents", [None, "[]", "{}"])
def test_a_scheduler_that_says_nothing(folder, contents):
    file = folder / "scheduler" / "scheduler_config.json"
    file.unlink()
    if contents:
        file.write_text(contents)
    with pytest.raises(UsageError, match=r"scheduler_config\.json(: expected `object`| is missing| says nothing)"):
        load_model(str(folder))


def test_a_scheduler_without_class_is_the_indexs(folder):
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "_class_name"}))
    changed(folder / "model_index.json", scheduler=["diffusers", "LCMScheduler"])
    assert load_model(str(folder)).scheduler["_class_name"] == "LCMScheduler"


@pytest.mark.hostile("parts")
def test_a_tokenizer_that_is_missing_or_foreign(folder, tmp_path):
    place = folder / "tokenizer"
    tokens = json.loads((place / "tokenizer.json").read_text())
    tokens["model"]["vocab"], tokens["model"]["merges"] = dict(list(tokens["model"]["vocab"].items())[:20]), []
    (place / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(UsageError, match=r"the tokenizer knows \d+ words, its text encoder \d+"):
        load_model(str(folder))
    for file in place.iterdir():
        file.unlink()
    with pytest.raises(UsageError, match="holds no tokenizer"):
        load_model(str(folder))


def test_weights_of_one_variant_alone_are_read(folder):
    before = load_model(str(folder))
    for file in list(folder.rglob("*.safetensors")):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    after = load_model(str(folder))
    for part in ("unet", "controlnet", "vae", "text_encoder"):
        assert same(getattr(after, part).state_dict(), getattr(before, part).state_dict()), part


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.hostile("parts")
def test_an_adapter_over_other_weights(part, folder):
    (folder / part / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/elsewhere"}))
    with pytest.raises(UsageError, match=rf"{part}/adapter_config.json applies an adapter to another model's weights"):
        load_model(str(folder))


@pytest.mark.parametrize("named", ["../vae/diffusion_pytorch_model.safetensors", "/etc/hostname", "weights.bin"])
@pytest.mark.hostile("parts")
def test_an_index_of_weights_elsewhere(named, folder):
    weights = load_file(next((folder / "unet").glob("*.safetensors")))
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, named)}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match=r"index.json names .*, which is no .safetensors file of its folder"):
        load_model(str(folder))


@pytest.mark.hostile("weights")
def test_weights_under_names_of_their_index_alone(folder):
    file = next((folder / "unet").glob("*.safetensors"))
    weights = load_file(file)
    weights[next(iter(weights))].view(-1)[0] = float("nan")
    file.unlink()
    save_file(weights, folder / "unet" / "mine.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "mine.safetensors")}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match="is not finite"):
        load_model(str(folder))


@pytest.mark.parametrize(("part", "key", "value"), [
    ("vae", "scaling_factor", 0), ("vae", "scaling_factor", "a"), ("vae", "latents_mean", [0.0] * 4),
    ("unet", "quantization_config", {"quant_method": "bitsandbytes"})])
@pytest.mark.hostile("parts")
def test_what_a_config_may_not_say(part, key, value, folder):
    changed(folder / part / "config.json", **{key: value})
    with pytest.raises(UsageError, match=rf"{part}/config.json: .*{key}"):
        load_model(str(folder))
