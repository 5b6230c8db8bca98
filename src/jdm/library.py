"""Loads models by name: a shipped model, a diffusers folder, a hub id, or a single file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from diffusers import AutoencoderTiny
from torch import nn

from jdm.errors import UsageError, in_short, plural
from jdm.files import ASSETS, read_json
from jdm.formats.single_file_import import load_single_file
from jdm.models import hub
from jdm.models.family import Family
from jdm.models.folder import CARD, folder_json, lone_controlnet, model_index, whole_network
from jdm.models.stable_diffusion import StableDiffusion
from jdm.models.stable_diffusion_xl import StableDiffusionXL

SHIPPED = {
    "nano-sd": ("nano-sd", None),
    "nano-controlnet": ("nano-sd", "nano-controlnet"),
    "nano-controlnet-soft-edge": ("nano-sd", "nano-controlnet-soft-edge"),
    "nano-controlnet-silhouette": ("nano-sd", "nano-controlnet-silhouette"),
    "nano-controlnet-lowres": ("nano-sd", "nano-controlnet-lowres"),
    "nano-canny": ("nano-canny", None),
    "nano-diff-instruct": ("nano-diff-instruct", None),
    # More controls for nano-canny's UNet.
    "nano-soft-edge": ("nano-canny", "nano-soft-edge"),
    "nano-silhouette": ("nano-canny", "nano-silhouette"),
    "nano-lowres": ("nano-canny", "nano-lowres"),
}

# By the stock pipeline that a folder names.
FAMILIES = {name: family for family in (StableDiffusion, StableDiffusionXL) for name in family.PIPELINES}


def load_model(name: str) -> Family:
    """A shipped model ("nano-sd", "nano-canny", any of SHIPPED), a folder, a hub id, or a .safetensors checkpoint.

    Raises:
        UsageError: there is none, it is not whole, or it is of a family that is not read.
    """
    try:
        there = Path(name).is_dir()
    except (OSError, ValueError) as error:  # too long, a null byte
        raise UsageError(f"{name[:100]}: no folder can have this name ({in_short(error)[:80]}); give a diffusers "
                         "folder, a .safetensors checkpoint, a hub id, or a shipped model, such as nano-sd") from None
    if name in SHIPPED and not there:
        folder, controlnet = SHIPPED[name]
        model = StableDiffusion.load(str(ASSETS / folder), str(ASSETS / controlnet) if controlnet else None)
        card = ASSETS / (controlnet or folder) / CARD
        return model.with_parts(card=read_json(card)) if card.is_file() else model
    if (single := load_single_file(name)) is not None:
        return single
    kind = str(model_index(name).get("_class_name"))
    if kind not in FAMILIES:
        raise UsageError(f"{name} is a {kind}; families that are read: {', '.join(FAMILIES)}")
    return FAMILIES[kind].load(name)


def load_controlnet(name: str, beside: Family) -> tuple[nn.Module, str | None]:
    """A ControlNet to be added to a model's own, and the control it was trained for where its card says so.

    Args:
        name: a shipped model or a folder that has a ControlNet, or the folder of a ControlNet.
        beside: the model; its UNet must have the shapes that the ControlNet was made for.

    Raises:
        UsageError: there is no ControlNet, or it was made for another UNet's shapes.
    """
    folder = Path(name)
    if (folder / "config.json").is_file():
        net = lone_controlnet(folder)
        card = folder_json(name, CARD) or {}
    else:
        model = load_model(name)
        net, card = model.controlnet, model.card or {}
        if net is None:
            raise UsageError(f"{name} has no ControlNet; name a model that draws to a control, such as nano-canny")
    theirs, ours = cast(Any, net).config, cast(Any, beside.backbone).config
    for key in ("in_channels", "block_out_channels", "cross_attention_dim"):
        if theirs[key] != ours[key]:
            raise UsageError(f"{name} does not fit this model: its ControlNet has {key} {theirs[key]}, the model's "
                             f"UNet {ours[key]}")
    return net, card.get("control")


def tiny_decoder(name: str, teacher: Family) -> nn.Module:
    """A tiny autoencoder that decodes the teacher's latents, frozen.

    Raises:
        UsageError: it is not a tiny autoencoder, or its latents or picture size differ from the teacher's.
    """
    hub.unfetched(name)
    try:
        net = whole_network(AutoencoderTiny, name).float().eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        raise UsageError(hub.unfetched(name) or f"{name} is not a tiny autoencoder (AutoencoderTiny): "
                         f"{(str(error).splitlines() or [''])[0][:120]}") from None
    channels, side = net.config["latent_channels"], 2 ** (len(net.config["decoder_block_out_channels"]) - 1)
    ours = teacher.latent_shape(1, teacher.size)[1], teacher.downscale
    if (channels, side) != ours:
        raise UsageError(f"{name} decodes latents of {plural(channels, 'channel')} to {side} times their side, "
                         f"the teacher's are {ours[0]} and {ours[1]}; name one made for this teacher")
    return net
