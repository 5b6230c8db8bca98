"""Loads models by name: a shipped model, a diffusers folder, a hub id, or a single file."""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import AutoencoderTiny
from safetensors import SafetensorError
from torch import nn

from jdm.errors import UsageError
from jdm.files import ASSETS
from jdm.formats.single_file_import import load_single_file
from jdm.models.stable_diffusion import (
    CARD,
    ControlNetModel,
    StableDiffusion,
    lone_controlnet,
    model_index,
    whole_network,
)
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

# By the pipeline that a folder names; any other is loaded as StableDiffusion.
FAMILIES: dict[str, type[StableDiffusion]] = {
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusionXLControlNetPipeline": StableDiffusionXL,
}


def load_model(name: str) -> StableDiffusion:
    """Loads a shipped model (any of SHIPPED, such as "nano-sd"), a folder, a hub id, or a .safetensors checkpoint.

    Raises:
        UsageError: there is no such model, or it is incomplete.
    """
    if name in SHIPPED and not Path(name).is_dir():
        folder, controlnet = SHIPPED[name]
        model = StableDiffusion.load(str(ASSETS / folder), str(ASSETS / controlnet) if controlnet else None)
        card = ASSETS / (controlnet or folder) / CARD
        return model.with_parts(card=json.loads(card.read_text())) if card.is_file() else model
    if (single := load_single_file(name)) is not None:
        return single
    family = FAMILIES.get(str(model_index(name).get("_class_name")), StableDiffusion)
    return family.load(name)


def load_controlnet(name: str, beside: StableDiffusion) -> tuple[ControlNetModel, str | None]:
    """Loads a ControlNet to use beside a model's own; returns it and the control in its card, or None.

    Args:
        name: a shipped model or a folder that has a ControlNet, or the folder of a ControlNet.
        beside: the model; its UNet must have the shapes that the ControlNet was made for.

    Raises:
        UsageError: there is no ControlNet, or it was made for another UNet's shapes.
    """
    folder = Path(name)
    if (folder / "config.json").is_file():
        net = lone_controlnet(folder)
        card = json.loads((folder / CARD).read_text(encoding="utf-8")) if (folder / CARD).is_file() else {}
    else:
        model = load_model(name)
        net, card = model.controlnet, model.card or {}
        if net is None:
            raise UsageError(f"{name} has no ControlNet; name a model that has one, such as nano-canny")
    for key in ("in_channels", "block_out_channels", "cross_attention_dim"):
        if net.config[key] != beside.unet.config[key]:
            raise UsageError(f"{name} does not fit this model: its ControlNet has {key} {net.config[key]}, the model's "
                             f"UNet {beside.unet.config[key]}")
    return net, card.get("control")


def tiny_decoder(name: str, teacher: StableDiffusion) -> nn.Module:
    """Loads a tiny autoencoder, frozen, that decodes the teacher's latents.

    Raises:
        UsageError: it is not a tiny autoencoder, or its latents or picture size differ from the teacher's.
    """
    try:
        net = whole_network(AutoencoderTiny, name).float().eval().requires_grad_(False)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"{name} is not a tiny autoencoder (AutoencoderTiny): "
                         f"{(str(error).splitlines() or [''])[0][:120]}") from None
    channels, side = net.config["latent_channels"], 2 ** (len(net.config["decoder_block_out_channels"]) - 1)
    ours = teacher.unet.config["in_channels"], teacher.downscale
    if (channels, side) != ours:
        raise UsageError(f"{name} decodes latents of {channels} channels to {side} times their side, the teacher's are "
                         f"{ours[0]} and {ours[1]}; name one made for this teacher")
    return net
