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
from jdm.models.folder import CARD, folder_json, model_index, whole_network
from jdm.models.stable_diffusion import StableDiffusion
from jdm.models.stable_diffusion_3 import StableDiffusion3
from jdm.models.stable_diffusion_xl import StableDiffusionXL
from jdm.models.stock import StockModel
from jdm.models.z_image import ZImage

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
FAMILIES: dict[str, type[StockModel]] = {
    name: family for family in (StableDiffusion, StableDiffusionXL, StableDiffusion3, ZImage)
    for name in family.PIPELINES}


def load_model(name: str) -> Family:
    """A shipped model ("nano-sd", "nano-canny", any of SHIPPED), a folder, a hub id, or a .safetensors checkpoint.

    Raises:
        UsageError: there is none, it is not whole, or it is of a family that is not read.
    """
    if name in SHIPPED and not _is_folder(name):
        folder, controlnet = SHIPPED[name]
        model = StableDiffusion.load(str(ASSETS / folder), str(ASSETS / controlnet) if controlnet else None)
        card = ASSETS / (controlnet or folder) / CARD
        return model.with_parts(card=read_json(card)) if card.is_file() else model
    if (folder := _folder_beside(name)) is not None:
        return FAMILIES[str(model_index(str(folder))["_class_name"])].load(str(folder), file=Path(name))
    if (single := load_single_file(name)) is not None:
        return single
    kind = str(model_index(name).get("_class_name"))
    if kind not in FAMILIES:
        raise UsageError(f"{name} is a {kind}; families that are read: {', '.join(FAMILIES)}")
    return FAMILIES[kind].load(name)


def _is_folder(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except (OSError, ValueError) as error:  # too long, a null byte
        raise UsageError(f"{name[:100]}: no folder can have this name ({in_short(error)[:80]}); give a diffusers "
                         "folder, a .safetensors checkpoint, a hub id, or a shipped model, such as nano-sd") from None


def _folder_beside(name: str) -> Path | None:
    """The folder FILE beside FILE.safetensors, where it is of a transformer, whose weights the file then replaces."""
    folder = Path(name.removesuffix(".safetensors"))
    if not name.endswith(".safetensors") or not Path(name).is_file() or not (folder / "model_index.json").is_file():
        return None
    family = FAMILIES.get(str(model_index(str(folder)).get("_class_name")))
    return folder if family is not None and family.BACKBONE == "transformer" else None


def load_controlnet(name: str, beside: Family) -> tuple[nn.Module, str | None]:
    """A ControlNet to be added to a model's own, and the control it was trained for where its card says so.

    Args:
        name: a shipped model or a folder that has a ControlNet, or the folder of a ControlNet.
        beside: the model; its backbone must have the shapes that the ControlNet was made for.

    Raises:
        UsageError: there is no ControlNet, or it was made for another backbone.
    """
    if _is_folder(name) and (Path(name) / "config.json").is_file():
        net, family = lone_controlnet(name)
        card = folder_json(name, CARD) or {}
    else:
        model = load_model(name)
        net, card, family = model.controlnet, model.card or {}, model
        if net is None:
            raise UsageError(f"{name} has no ControlNet; name a model that draws to a control, such as nano-canny")
    if family.PARTS["controlnet"].classes != beside.PARTS["controlnet"].classes:
        raise UsageError(f"{name} does not fit this model: it is a {type(net).__name__} for {family.NAME} models, and "
                         f"this is a {beside.NAME} model; name a ControlNet made for it")
    theirs, ours = cast(Any, net).config, cast(Any, beside.backbone).config
    for key in beside.SHARED:
        if theirs[key] != ours[key]:
            raise UsageError(f"{name} does not fit this model: its ControlNet has {key} {theirs[key]}, the model's "
                             f"{beside.NETWORK} {ours[key]}")
    return net, card.get("control")


def lone_controlnet(name: str) -> tuple[nn.Module, type[StockModel]]:
    """A ControlNet from a folder of its own, in float32, frozen, with a family that it belongs to.

    Raises:
        UsageError: the folder does not hold a ControlNet.
    """
    named = str(read_json(Path(name) / "config.json").get("_class_name"))
    families = {family.PARTS["controlnet"].classes[0]: family for family in reversed(FAMILIES.values())}
    if named not in families:
        raise UsageError(f"{name} is not a ControlNet (its config.json names {named:.60}); the ControlNets that are "
                         f"read are {', '.join(families)}")
    try:
        net = families[named].PARTS["controlnet"].read(name, "")
    except (OSError, ValueError) as error:
        raise UsageError(f"{name} is not a ControlNet ({(str(error).splitlines() or [''])[0][:120]})") from None
    return net.float().eval().requires_grad_(False), families[named]


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
