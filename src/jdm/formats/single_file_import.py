"""Loads a model from one .safetensors file in Stable Diffusion's original layout, as ComfyUI, A1111 and CivitAI use.

This is the inverse of single_file.py, by the same names. The file holds the weights of UNet, autoencoder and text
encoders, but not their configurations or the tokenizer. These come from a folder beside it (for mine.safetensors:
`mine/`, or else `config/`), laid out as a diffusers folder without weights, which may be incomplete. Missing parts come
from the published configurations of SD1.5, SD2.1 and SDXL, chosen by the tensors' shapes, and from the hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTokenizer

from jdm.errors import UsageError, plural
from jdm.formats.original import CONFIGS, ENDING, PARTS, SingleFile, damaged, named
from jdm.formats.single_file import (
    CONTROLNET,
    TEXT,
    TEXTS,
    UNET,
    VAE,
    controlnet_names,
    open_clip_names,
    renamed,
    unet_names,
    vae_names,
)
from jdm.models import hub
from jdm.models.schedulers import checked_scheduler
from jdm.models.stable_diffusion import StableDiffusion
from jdm.models.stable_diffusion_xl import StableDiffusionXL
from jdm.models.stock import networks
from jdm.models.text import whole_tokenizer
from jdm.models.weights import not_finite

CLIP = "openai/clip-vit-large-patch14"  # its tokenizer is that of all of SIZES
END = "<|endoftext|>"
# Tensors a file may hold that no picture depends on; {layers} is OpenCLIP's last layer, which SD2 does not use.
UNUSED = {"text_encoder": r"position_ids|logit_scale|text_projection|attn_mask|resblocks\.{layers}\.",
          "text_encoder_2": r"position_ids|logit_scale|attn_mask", "vae": r"\.loss\.|\.model_ema\."}


def load_single_file(name: str) -> StableDiffusion | None:
    """Loads a single file in float32, frozen and in eval mode; returns None if the name is not a single file's.

    Args:
        name: `mine.safetensors`, or `mine.safetensors#v_prediction` (or `#epsilon`) if the file does not say which. As
            in other programs the default is epsilon; for SD2, which has both, it must be given.

    Raises:
        UsageError: the file is missing, damaged, incomplete or of another kind; no weight is left uninitialised.
    """
    if (file := named(name)) is None:
        return None
    configs, index = file.configs(), file.beside_json("model_index.json") or {}
    scheduler = checked_scheduler(configs["scheduler"], f"the scheduler of {file.path}")
    parts: dict[str, Any] = {**tokenizers(file, configs), "scheduler": scheduler, "card": configs.get("card")}
    nets = _shapes(file, configs)
    sources = {part: file if part != "controlnet" else _controlnet_file(file) for part in nets}
    places = {part: file_places(sources[part], part, net, file.reference) for part, net in nets.items()}
    for part, net in nets.items():
        parts[part] = _filled(net, places[part], sources[part])
    if "text_encoder_2" in parts:
        return StableDiffusionXL(**parts, zeros=bool(index.get("force_zeros_for_empty_prompt", True)))
    return StableDiffusion(**parts)


def checkpoint_configs(name: str) -> dict[str, dict] | None:
    """Part -> config of a single file, from its header and the folder beside it; None if it is not such a file."""
    file = named(name)
    return None if file is None else file.configs()


def tokenizers(file: SingleFile, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, CLIPTokenizer]:
    """Loads `tokenizer`, and SDXL's `tokenizer_2`, from the folder beside the file, or else CLIP's from the hub.

    Raises:
        UsageError: there is none, or its vocabulary does not match the text encoder's.
    """
    texts = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}
    return {part: _tokenizer(file, part, text, configs[text]) for part, text in texts.items() if text in configs}


def _tokenizer(file: SingleFile, part: str, text: str, config: Mapping[str, Any]) -> CLIPTokenizer:
    own = file.beside_json(CONFIGS[text]) is not None  # then the tokenizer beside it defines the padding
    # OpenCLIP pads with token 0, which is "!"; OpenAI's CLIP pads with END.
    pad = END if config.get("hidden_act", "quick_gelu") == "quick_gelu" else "!"
    options: dict[str, Any] = {} if own else {"pad_token": pad}
    folder = next((found for name in (part, "tokenizer") if (found := file.home / name).is_dir()), None)
    if folder is None and own:
        raise UsageError(f"{file.home} lacks {part}; copy it from the model that the configuration belongs to")
    tokenizer = _hub_tokenizer(file, **options) if folder is None else whole_tokenizer(str(folder), **options)
    words, rows = len(tokenizer), config.get("vocab_size", 49408)
    if words > rows or (words < rows and not own):
        raise UsageError(f"{folder or CLIP} knows {words} words, the text encoder of {file.path} {rows}; put the "
                         f"tokenizer it was trained with into {file.home / part}")
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.get("max_position_embeddings", 77))
    return tokenizer


def _hub_tokenizer(file: SingleFile, **options: Any) -> CLIPTokenizer:
    from huggingface_hub import hf_hub_download

    hub.unreachable()
    try:
        vocab, merges = (hf_hub_download(CLIP, name) for name in ("vocab.json", "merges.txt"))
    except Exception:
        raise UsageError(f"{file.path} holds no tokenizer, and that of {CLIP} could not be downloaded; put one "
                         "(vocab.json and merges.txt; ComfyUI's comfy/sd1_tokenizer is the same) into "
                         f"{file.home / 'tokenizer'}") from None
    return CLIPTokenizer(vocab=vocab, merges=merges, unk_token=END, **options)


@dataclass(frozen=True)
class Place:
    """The place of a module's tensor in a file.

    Attributes:
        name: the tensor's name in the file.
        transposed: True if the file holds the transpose.
        third: 0, 1 or 2 if it is the query's, key's or value's part of one fused tensor, else None.
    """

    name: str
    transposed: bool = False
    third: int | None = None

    def of(self, tensor: Tensor) -> Tensor:
        if self.third is not None:
            tensor = tensor.chunk(3)[self.third]
        return tensor.T if self.transposed else tensor

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.third is not None:
            shape = (shape[0] // 3, *shape[1:])
        return _bare(shape[::-1] if self.transposed else shape)


def file_places(file: SingleFile, part: str, net: nn.Module, reference: str) -> dict[str, Place]:
    """Maps each tensor of a network to its place in the file.

    Args:
        reference: name of the model whose shapes are expected, for messages.

    Raises:
        UsageError: a tensor is missing, has another shape or is quantised, or the file has tensors left over.
    """
    wanted = {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}
    prefix, places = _places(file, part, net, list(wanted))
    remedy = f"fetch it again, or put the diffusers configs of its own base into {file.home}"
    if lacks := [place.name for place in places.values() if place.name not in file.shapes]:
        raise UsageError(f"{file.path} lacks {plural(len(lacks), 'tensor')} of the {PARTS[part]} of {reference}, "
                         f"{lacks[0]} first; {remedy}")
    for key, place in places.items():
        if place.shape(file.shapes[place.name]) != _bare(wanted[key]):
            raise UsageError(f"{file.path}: {place.name} is {list(file.shapes[place.name])}, which does not fit the "
                             f"{PARTS[part]} of {reference}, where its module is {list(wanted[key])}; {remedy}")
        if not file.dtypes[place.name].startswith(("F", "BF")):
            raise UsageError(f"{file.path}: {place.name} is {file.dtypes[place.name]}, a quantised weight; give the "
                             "checkpoint it was made from, in fp16, bf16 or fp32")
    if more := _left_over(file, part, prefix, places):
        raise UsageError(f"{file.path} has {plural(len(more), 'tensor')} that the {PARTS[part]} of {reference} has "
                         f"no place for, {more[0]} first; {remedy}")
    return places


def _left_over(file: SingleFile, part: str, prefix: str, places: Mapping[str, Place]) -> list[str]:
    """Tensors of the part that the file holds and no place refers to, without those known to be unused."""
    layers = sum("layer_norm1.weight" in key for key in places)
    unused = re.compile(UNUSED[part].format(layers=layers) if part in UNUSED else "$^")
    read = {place.name for place in places.values()}
    return sorted(key for key in file.shapes if key.startswith(prefix) and key not in read and not unused.search(key))


def _places(file: SingleFile, part: str, net: nn.Module, keys: list[str]) -> tuple[str, dict[str, Place]]:
    """The prefix of a part's names in the file, and the place of each of its tensors."""
    config = getattr(net, "config")  # noqa: B009
    same = {key: key for key in keys}
    names = {"unet": (unet_names, UNET), "vae": (vae_names, VAE), "controlnet": (controlnet_names, CONTROLNET)}
    if part in names:
        named, prefix = names[part]
        return prefix, {key: Place(name) for name, key in renamed(same, named(config), prefix).items()}
    prefix = TEXTS[1] if part == "text_encoder_2" else next(
        p for p in (TEXT, TEXTS[0]) if any(key.startswith(p) for key in file.shapes))
    if config.hidden_act == "quick_gelu":
        # Older files lack the level that transformers' wrapper adds.
        wrapped = any(key.startswith(f"{prefix}transformer.text_model.") for key in file.shapes)
        above = f"{prefix}transformer.{'text_model.' if wrapped else ''}"
        return prefix, {key: Place(f"{above}{key.removeprefix('text_model.')}") for key in keys}
    return prefix, dict(_open_clip_places(keys, config.num_hidden_layers, f"{prefix}model."))


def _open_clip_places(keys: list[str], layers: int, prefix: str) -> Iterator[tuple[str, Place]]:
    """The inverse of `single_file.text_tensors` for OpenCLIP."""
    plain = {}
    for key in keys:
        bare = key.removeprefix("text_model.")
        if found := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", bare):
            layer, which, leaf = found.groups()
            yield key, Place(f"{prefix}transformer.resblocks.{layer}.attn.in_proj_{leaf}", third="qkv".index(which))
        elif bare == "embeddings.position_embedding.weight":
            yield key, Place(f"{prefix}positional_embedding")
        elif bare == "text_projection.weight":
            yield key, Place(f"{prefix}text_projection", transposed=True)
        else:
            plain[bare] = key
    for name, key in renamed(plain, open_clip_names(layers), prefix).items():
        yield key, Place(name)


def _shapes(file: SingleFile, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, nn.Module]:
    """Builds the networks of the configs on the meta device, without memory."""
    try:
        with torch.device("meta"):
            return networks(StableDiffusionXL.PARTS, configs)
    except UsageError as error:
        raise UsageError(f"the configurations in {file.beside} do not describe a model ({error})") from None


def _filled(net: nn.Module, places: Mapping[str, Place], file: SingleFile) -> nn.Module:
    """Fills the network with the file's weights in float32; frozen and in eval mode."""
    wanted = {key: tensor.shape for key, tensor in net.state_dict().items()}
    try:
        with safe_open(file.path, "pt") as opened:  # copied, because get_tensor returns a view of the file
            state = {key: place.of(opened.get_tensor(place.name)).to(torch.float32, copy=True).reshape(wanted[key])
                     .contiguous() for key, place in places.items()}
    except (SafetensorError, OSError) as error:
        raise damaged(file.path, error) from None
    net.load_state_dict(state, assign=True)
    if name := not_finite(net):
        raise UsageError(f"{file.path}: {places[name].name} is not finite (NaN or infinity); fetch the file again")
    for module in net.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:  # CLIP's text models do not save this buffer
                assert name == "position_ids", name
                setattr(module, name, torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return net.eval().requires_grad_(False)


def _controlnet_file(file: SingleFile) -> SingleFile:
    """Opens the ControlNet file that an export writes beside the checkpoint."""
    path = file.path.with_name(f"{file.path.stem}_controlnet{ENDING}")
    if not path.is_file():
        raise UsageError(f"{file.beside} has a ControlNet, whose file {path} is missing; put it there, or remove "
                         f"{file.home / 'controlnet'}")
    return SingleFile.opened(path)


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without a 1x1 kernel, because the layout writes some linear layers as 1x1 convolutions."""
    return shape[:2] if shape[2:] == (1, 1) else shape
