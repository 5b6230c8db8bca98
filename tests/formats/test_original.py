"""What a checkpoint's header says: its size, its prediction, and what a file is that is no checkpoint."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import save_file

from jdm.cost import known_configs
from jdm.errors import UsageError
from jdm.formats import original, single_file
from jdm.formats.original import SingleFile, named
from jdm.formats.single_file_import import checkpoint_configs, file_places
from jdm.models.stable_diffusion_xl import StableDiffusionXL
from jdm.models.stock import networks
from refusals import refused


def header(kind, said, more):
    """What a file of real size would say of itself, without the file."""
    names = {"SD1.5": "runwayml/stable-diffusion-v1-5", "SD2": "stabilityai/stable-diffusion-2-1-base",
             "SDXL": "stabilityai/stable-diffusion-xl-base-1.0"}
    with torch.device("meta"):
        tensors = single_file.checkpoint_tensors(known_configs.without_weights(names[kind]))
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()} | more
    return SingleFile(Path("real.safetensors"), None, shapes, dict.fromkeys(shapes, "F16"), said)


EXTRAS = {"model_ema.decay": (), "alphas_cumprod": (1000,), "betas": (1000,)}
FURTHER = {  # what published files hold besides
    "SD1.5": {"cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77)},
    "SD2": {"cond_stage_model.model.logit_scale": (), "cond_stage_model.model.text_projection": (1024, 1024),
            "cond_stage_model.model.transformer.resblocks.23.ln_1.weight": (1024,)},
    "SDXL": {"conditioner.embedders.1.model.logit_scale": (),
             "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": (1, 77)}}


@pytest.mark.parametrize("kind", FURTHER)
def test_every_tensor_of_real_files_has_a_place(kind):
    file = header(kind, {"modelspec.prediction_type": "epsilon"}, EXTRAS | FURTHER[kind])
    file.refuse_others()
    assert file.known_size == kind
    configs = file.configs()
    with torch.device("meta"):
        nets = networks(StableDiffusionXL.PARTS, configs)
    read = {place.name for part, net in nets.items() for place in file_places(file, part, net, kind).values()}
    assert read == file.shapes.keys() - EXTRAS.keys() - FURTHER[kind].keys()
    sides = {"SD1.5": 64, "SD2": 64, "SDXL": 128}
    assert configs["unet"]["sample_size"] == sides[kind]
    for key, why in ((f"{single_file.UNET}input_blocks.99.0.weight", "1 tensor that the UNet of"),
                     (f"{single_file.VAE}encoder.extra", "1 tensor that the autoencoder of")):
        wrong = replace(file, shapes=file.shapes | {key: (1,)})
        part = "vae" if "autoencoder" in why else "unet"
        with pytest.raises(UsageError, match=why):
            file_places(wrong, part, nets[part], kind)


@pytest.mark.parametrize(("kind", "said", "keys", "asked", "wanted"), [
    ("SD1.5", {}, (), None, "epsilon"),
    ("SD1.5", {}, (), "v_prediction", "v_prediction"),
    ("SDXL", {}, (), None, "epsilon"),
    ("SDXL", {}, ("v_pred",), None, "v_prediction"),
    ("SDXL", {"modelspec.prediction_type": "v"}, (), None, "v_prediction"),
    ("SD2", {}, (), "epsilon", "epsilon"),
    ("SD2", {}, (), "v_prediction", "v_prediction"),
    ("SD2", {"modelspec.prediction_type": "epsilon"}, (), None, "epsilon"),
    ("SD2", {"modelspec.architecture": "stable-diffusion-v2-768-v"}, (), None, "v_prediction"),
    ("SD2", {"modelspec.architecture": "stable-diffusion-v2-512"}, (), None, "epsilon"),
    ("SD2", {"modelspec.architecture": "stable-diffusion-v2-512"}, (), "v_prediction", "v_prediction"),
    ("SD2", {}, (), None, None)])
def test_a_prediction_is_asked_for_or_read(kind, said, keys, asked, wanted):
    """What is asked for comes before what the file says; an SD2 file that says nothing is refused."""
    file = replace(small_header(kind, *keys), asked=asked, said=said)
    if wanted is None:
        with pytest.raises(UsageError, match=r"write x\.safetensors#v_prediction .* or x\.safetensors#epsilon"):
            file.configs()
        return
    configs = file.configs()
    assert configs["scheduler"]["prediction_type"] == wanted
    if kind == "SD2":
        assert configs["unet"]["sample_size"] == (96 if wanted == "v_prediction" else 64)
        assert configs["vae"]["sample_size"] == configs["unet"]["sample_size"] * 8
    assert DDIMScheduler.from_config(configs["scheduler"]).alphas_cumprod[-1] == pytest.approx(0.0047, abs=1e-4)


def small_header(kind, *keys):
    width = {"SD1.5": 768, "SD2": 1024, "SDXL": 2048}[kind]
    texts = single_file.TEXTS if kind == "SDXL" else (single_file.TEXT,)
    shapes = {original.FIRST: (320, 4, 3, 3), f"{single_file.VAE}encoder.conv_in.weight": (128, 3, 3, 3),
              f"{single_file.UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, width),
              **{f"{text}x": (1,) for text in texts}, **dict.fromkeys(keys, ())}
    return SingleFile(Path("x.safetensors"), None, shapes, dict.fromkeys(shapes, "F32"))


@pytest.mark.parametrize(("keys", "message"), [
    (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"], "is a LoRA, which modifies a model"),
    (["unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"], "is a LoRA"),
    (["control_model.input_hint_block.0.weight", "control_model.input_blocks.0.0.weight"], "is a ControlNet without"),
    (["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.norm1.weight"], "is a ControlNet without"),
    (["decoder.up.0.block.0.norm1.weight"], "is an autoencoder without a UNet"),
    (["decoder.up_blocks.0.resnets.0.norm1.weight", "encoder.down_blocks.0.resnets.0.norm1.weight"], "an autoencoder"),
    (["input_blocks.0.0.weight"], "is only a UNet"),
    (["down_blocks.0.resnets.0.norm1.weight"], "is only a UNet.*or its diffusers folder"),
    (["emb_params"], "is an embedding"),
    (["model.diffusion_model.double_blocks.0.img_attn.proj.weight"], "is of an unsupported model family"),
    (["bert.pooler.weight"], r"is not a Stable Diffusion checkpoint: it has no .*; its first tensor is bert\.pooler"),
    ([], "it is empty"),
])
def test_other_kinds_of_file_are_refused_by_name(keys, message, tmp_path):
    save_file({key: torch.zeros(1) for key in keys}, tmp_path / "mine.safetensors")
    refused(tmp_path / "mine.safetensors", message)


def test_folders_and_hub_ids_are_no_single_file(tmp_path):
    assert named("owner/name") is None
    (tmp_path / "odd.safetensors").mkdir()
    assert named(str(tmp_path / "odd.safetensors")) is None
    assert checkpoint_configs("nano-sd") is None
