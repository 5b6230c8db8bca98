"""A teacher read from one safetensors file: bit for bit what its folder is; everything else is refused in one line."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import tiny
from families import made
from jdm.cli import parser as cli
from jdm.cost import known_configs
from jdm.export.model_card import Subject, model_card, snippet
from jdm.export.writers import export
from jdm.formats import original, single_file
from jdm.library import load_model
from jdm.loading import Loaded
from jdm.models import published
from jdm.models.folder import save_pipeline
from jdm.models.stable_diffusion_xl import StableDiffusionXL
from jdm.recipes import all_recipes
from refusals import refused

PROMPTS = ["an ankle boot", "a coat!", ""]
FAMILIES = ["sd15", "sd21-v", "sdxl"]


def open_clip(model, kind=CLIPTextModel):
    """A text encoder of OpenCLIP's kind, fused and transposed in a single file."""
    return kind(CLIPTextConfig(**{**model.config.to_dict(), "hidden_act": "gelu"}))


def model_of(kind):
    """SD2's text encoder is OpenCLIP's, and so is SDXL's second."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = made(kind)
        if kind == "sd21-v":
            model = model.with_parts(text_encoder=open_clip(model.text_encoder))
        if kind == "sdxl":
            second = open_clip(model.text_encoder_2, CLIPTextModelWithProjection)
            model = model.with_parts(text_encoder_2=second)
    for part in model.modules().values():
        part.eval().requires_grad_(False)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(kind, a tiny teacher's folder, the folder of its single-file export)."""
    place = tmp_path_factory.mktemp(request.param)
    folder = save_pipeline(model_of(request.param), place / "teacher")
    return request.param, folder, export(folder, place / "mine", format="single-file")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The checkpoint of a tiny SD1.5, without anything beside it."""
    file = tmp_path_factory.mktemp("whole") / "mine.safetensors"
    return single_file.save(single_file.checkpoint_tensors(model_of("sd15")), file)


@pytest.fixture
def tiny_sizes(monkeypatch, tmp_path):
    """The published SD1.5, SD2 and SDXL are the tiny ones; the hub has their tokenizer."""
    sizes, known = {}, {}
    for name, kind in zip(("SD1.5", "SD2", "SDXL"), FAMILIES, strict=True):
        model = model_of(kind)
        sizes[name] = {part: net.config if part in ("unet", "vae") else net.config.to_dict()
                       for part, net in model.modules().items()} | {"scheduler": published.SD15["scheduler"]}
        known[(kind, model.unet.config["cross_attention_dim"] if kind != "sd21-v" else -1)] = name
    monkeypatch.setattr(published, "of_size", lambda size, prediction: sizes[size])
    monkeypatch.setattr(original, "SIZES", known)
    tokenizer = model.tokenizer
    vocabulary = tmp_path / "hub"
    vocabulary.mkdir()
    (vocabulary / "vocab.json").write_text(json.dumps(tokenizer.get_vocab()))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    (vocabulary / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda _, name: str(vocabulary / name))
    return vocabulary


def offline(*_):
    raise OSError("no network")


def same(ours, theirs):
    assert type(ours) is type(theirs)
    assert ours.modules().keys() == theirs.modules().keys()
    for part, module in theirs.modules().items():
        state, wanted = ours.modules()[part].state_dict(), module.state_dict()
        assert state.keys() == wanted.keys(), part
        for key, tensor in wanted.items():
            assert state[key].dtype == torch.float32
            assert torch.equal(state[key], tensor), f"{part}.{key}"


def answers(model):
    """Text states, a UNet's output and a picture, on given noise."""
    states = model.text()(PROMPTS)
    x = torch.randn(model.latent_shape(3, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        eps = model.score_of(model.text(), model.denoiser())(x, torch.full((3,), 0.5), PROMPTS).eps
        return states, eps, model.space.decode(x)


def flat(found):
    states, *rest = found
    return [states, *rest] if isinstance(states, torch.Tensor) else [states[0], *states[1].values(), *rest]


def test_an_exported_checkpoint_reads_back_bit_for_bit(family):
    kind, folder, out = family
    model, theirs = load_model(str(out / "mine.safetensors")), load_model(str(folder))
    assert isinstance(model, StableDiffusionXL) == (kind == "sdxl")
    same(model, theirs)
    assert model.scheduler == theirs.scheduler
    assert model.prediction == ("v_prediction" if kind == "sd21-v" else "epsilon")
    assert all(p.requires_grad is False for part in model.modules().values() for p in part.parameters())
    assert not any(part.training for part in model.modules().values())
    for ours, wanted in zip(flat(answers(model)), flat(answers(theirs)), strict=True):
        assert torch.equal(ours, wanted)


def test_a_checkpoint_saves_as_the_same_folder(family, tmp_path):
    _, folder, out = family
    again = save_pipeline(load_model(str(out / "mine.safetensors")), tmp_path / "again")
    same(load_model(str(again)), load_model(str(folder)))


def test_an_exported_student_brings_controlnet_and_card(student, tmp_path):
    """A missing ControlNet file is named."""
    out = export(student, tmp_path / "mine", format="single-file")
    model, theirs = load_model(str(out / "mine.safetensors")), load_model(str(student))
    same(model, theirs)
    assert model.controlnet is not None
    assert model.levels == (625,)
    assert model.card == theirs.card
    assert model.schedule.n == 626, "the one-step schedule"
    (out / "mine_controlnet.safetensors").unlink()
    refused(out / "mine.safetensors", "mine_controlnet.safetensors is missing")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(dtype, tiny_sizes, tmp_path):
    model = model_of("sdxl")
    tensors = {k: v.to(dtype) for k, v in single_file.checkpoint_tensors(model).items()}
    for part in model.modules().values():
        part.to(dtype).float()
    same(load_model(str(single_file.save(tensors, tmp_path / "half.safetensors"))), model)


@pytest.mark.parametrize(("size", "kind"), zip(("SD1.5", "SDXL"), ("sd15", "sdxl"), strict=True))
def test_a_lone_file_is_recognised_by_its_shapes(size, kind, tiny_sizes, tmp_path):
    theirs = model_of(kind)
    file = single_file.save(single_file.checkpoint_tensors(theirs), tmp_path / "lone.safetensors")
    model = load_model(str(file))
    same(model, theirs)
    assert model.scheduler == {**published.SCHEDULER, "prediction_type": "epsilon"}
    assert model.scheduler["clip_sample"] is False, "latents are no pictures"
    ids = model.tokenizer(PROMPTS, padding="max_length", max_length=16).input_ids
    assert ids == theirs.tokenizer(PROMPTS, padding="max_length", max_length=16).input_ids
    assert model.tokenizer.model_max_length == 16
    if size == "SDXL":  # OpenCLIP pads with 0
        assert model.tokenizer_2("a coat", padding="max_length", max_length=16).input_ids[-9:] == [0] * 9
    assert model.tokenizer("a coat", padding="max_length", max_length=16).input_ids[-1] == ids[0][-1] != 0


def test_the_tokenizer_may_lie_beside_the_file(tiny_sizes, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    file = shutil.copy(whole, tmp_path / "a.safetensors")
    refused(file, rf"no tokenizer.*clip-vit-large.*comfy/sd1_tokenizer.* into {tmp_path}/config/tokenizer")
    (tmp_path / "config" / "tokenizer").mkdir(parents=True)
    refused(file, "config/tokenizer holds no tokenizer: it lacks vocab.json")
    shutil.copytree(tiny_sizes, tmp_path / "config" / "tokenizer", dirs_exist_ok=True)
    theirs = model_of("sd15")
    model = load_model(str(file))
    same(model, theirs)
    assert torch.equal(model.text()(PROMPTS), theirs.text()(PROMPTS))
    vocabulary = json.loads((tiny_sizes / "vocab.json").read_text())
    (tmp_path / "config" / "tokenizer" / "vocab.json").write_text(json.dumps({**vocabulary, "boot": len(vocabulary)}))
    refused(file, rf"knows {len(vocabulary) + 1} words, the text encoder of .* {len(vocabulary)}")
    (tmp_path / "a" / "tokenizer").mkdir(parents=True)  # the file's own folder goes first
    refused(file, "a/tokenizer holds no tokenizer")


def changed(file, out, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, out)
    return out


def test_an_incomplete_or_odd_checkpoint_is_refused(tiny_sizes, whole, tmp_path):
    unet, vae, text = (f"{prefix}" for prefix in (single_file.UNET, single_file.VAE, single_file.TEXT))
    conv, norm = f"{unet}out.2.weight", f"{unet}middle_block.0.in_layers.0.weight"

    def without(*prefixes):
        def change(tensors):
            for key in [k for k in tensors if k.startswith(prefixes)]:
                del tensors[key]
        return change

    def halves(tensors):
        tensors[conv] = tensors[conv][:, :2].contiguous()

    def quantised(tensors):
        tensors[norm] = tensors[norm].to(torch.int8)

    def foreign(tensors):
        tensors["ztsnr"] = torch.zeros(0)

    def inpainting(tensors):
        tensors[f"{unet}input_blocks.0.0.weight"] = torch.zeros(16, 9, 3, 3)

    def wider(tensors):
        for key in [k for k in tensors if k.startswith(unet) and k.endswith("attn2.to_k.weight")]:
            tensors[key] = torch.zeros(len(tensors[key]), 1280)

    def more(tensors):
        tensors[f"{text}transformer.text_model.encoder.layers.9.layer_norm1.weight"] = torch.zeros(1)

    out = tmp_path / "bad.safetensors"
    for change, message in (
            (without(vae), "has a UNet but no autoencoder; give a checkpoint that holds"),
            (without(text), "has a UNet but no text encoder"),
            (without(vae, text), "has a UNet but no autoencoder"),
            (without(conv), rf"lacks 1 tensor of the UNet of SD1\.5, {conv} first; fetch it again, or put"),
            (without(f"{vae}decoder.conv_out"), "lacks 2 tensors of the autoencoder"),
            (without(f"{text}transformer.text_model.final"), "lacks 2 tensors of the text encoder"),
            (halves, rf"{conv} is \[4, 2, 3, 3\], which does not fit .* \[4, 16, 3, 3\]"),
            (quantised, rf"{norm} is I8, a quantised weight"),
            (foreign, "was trained with a zero terminal signal-to-noise ratio"),
            (inpainting, "reads 9 channels, as models for inpainting or editing"),
            (wider, r"has no known size \(SD1\.5, SD2, SDXL\)"),
            (more, "has 1 tensor that the text encoder of")):
        refused(changed(whole, out, change), message)
    assert list(tmp_path.glob("*.safetensors")) == [out]


def test_damaged_missing_and_pickled_files_are_refused(whole, tmp_path, capsys):
    short = tmp_path / "short.safetensors"
    short.write_bytes(whole.read_bytes()[:-100])
    refused(short, "cannot be read as a safetensors file .*truncated; fetch it again")
    short.write_text("<html>not found</html>")
    refused(short, "cannot be read as a safetensors file")
    refused(tmp_path / "nowhere.safetensors", "nowhere.safetensors: no such file")
    refused(f"{whole}#sample", "epsilon or v_prediction, got 'sample'")
    for ending in ("ckpt", "pt", "pth", "bin"):
        refused(tmp_path / f"mine.{ending}", r"is a pickle, which can run any code.*as \.safetensors, which ComfyUI's")
    assert cli.main(["sample", str(tmp_path / "mine.ckpt"), "--prompt", "x", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert cli.main(["train", "nano-canny", "--model", str(short), "--out", str(tmp_path / "run")]) == 2
    assert "cannot be read as a safetensors file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unfitting_config_folder_is_named(family, tmp_path):
    _, _, out = family
    shutil.copytree(out, tmp_path / "mine")
    file, config = tmp_path / "mine" / "mine.safetensors", tmp_path / "mine" / "config"
    unet = json.loads((config / "unet" / "config.json").read_text())
    (config / "unet" / "config.json").write_text(json.dumps({**unet, "block_out_channels": [16, 64]}))
    refused(file, rf"does not fit the UNet of {config}")
    (config / "unet" / "config.json").write_text(json.dumps({**unet, "down_block_types": ["NoBlock2D"] * 2}))
    refused(file, rf"the configurations in {config} do not describe a model")
    (config / "unet" / "config.json").write_text(json.dumps(unet))
    shutil.rmtree(config / "tokenizer")
    refused(file, f"{config} lacks tokenizer")
    shutil.rmtree(config / "vae")
    refused(file, rf"{config} has the UNet's configuration but lacks vae/config.json")


def test_other_spellings_of_the_same_tensors_are_read(tiny_sizes, whole, tmp_path):
    """Text models without transformers' wrapper; the autoencoder's attention as linear layers; SD2's turbo prefix."""
    def older(tensors):
        for key in list(tensors):
            if ".text_model." in key:
                tensors[key.replace(".text_model.", ".")] = tensors.pop(key)
            elif ".attn_1." in key and tensors[key].ndim == 4:
                tensors[key] = tensors[key][:, :, 0, 0].contiguous()

    def turbo(tensors):
        for key in list(tensors):
            tensors[key.replace(single_file.TEXT, single_file.TEXTS[0])] = tensors.pop(key)

    for change in (older, turbo):
        same(load_model(str(changed(whole, tmp_path / "b.safetensors", change))), model_of("sd15"))


def test_a_file_starts_a_run_like_its_folder(family, tmp_path):
    """The configs are those of the folder of the file's name."""
    _, folder, _ = family
    shutil.copytree(folder, tmp_path / "teacher")
    file = single_file.save(single_file.checkpoint_tensors(load_model(str(folder))), tmp_path / "teacher.safetensors")
    started = []
    for source in (folder, file):
        run = tiny.run(all_recipes()["nano-diff-instruct"](), tmp_path / "run", source)
        torch.manual_seed(0)
        started.append({name: module.state_dict() for name, module in run.method.task(Loaded(run)).modules.items()})
        with torch.device("meta"):
            started[-1]["shapes"] = {f"{part}.{key}": torch.tensor(tensor.shape, device="cpu")
                                     for part, net in known_configs.without_weights(str(source)).modules().items()
                                     for key, tensor in net.state_dict().items()}
    ours, theirs = started
    assert ours.keys() == theirs.keys() > {"shapes"}
    for name, state in theirs.items():
        assert state.keys() == ours[name].keys()
        assert all(torch.equal(tensor, ours[name][key]) for key, tensor in state.items())


@pytest.mark.parametrize(("base", "load"), [
    ("models/mine.safetensors#v_prediction", "from_single_file"), ("owner/name", "from_pretrained")])
def test_the_card_says_how_its_base_loads(base, load):
    for layout in ("controlnet", "lora"):
        of = Subject("mine", layout, "StableDiffusionPipeline", base=base, pixels=512, known_as="SD1.5", rank=4)
        code = snippet(of)
        assert f'base = "{base.split("#")[0]}"' in code
        assert f"StableDiffusionPipeline.{load}(base" in code
        assert ("base_model:" in model_card(of)) == (base == "owner/name")
