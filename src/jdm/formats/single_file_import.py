"""A model from one .safetensors file in Stable Diffusion's original layout, as ComfyUI, A1111 and CivitAI have it.

The inverse of single_file.py, by the same names. The file holds the numbers of UNet, autoencoder and text encoders, and
not their configurations or the tokenizer. These come from a folder beside it, `mine/` or else `config/` for
mine.safetensors, laid out as a diffusers folder without weights and as full or empty as one likes; what it lacks comes
from the published configurations of SD1.5, SD2.1 and SDXL, which the tensors' shapes tell apart, and from the hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTokenizer

from jdm.errors import UsageError, in_short
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
from jdm.models import published
from jdm.models.stable_diffusion import StableDiffusion
from jdm.models.stable_diffusion_xl import StableDiffusionXL

CLIP = "openai/clip-vit-large-patch14"  # whose tokenizer is that of every model of KNOWN's sizes
END = "<|endoftext|>"
# What a part may have in the file that no picture depends on; {layers}: OpenCLIP's last, which SD2 does not use.
UNUSED = {"text_encoder": r"position_ids|logit_scale|text_projection|attn_mask|resblocks\.{layers}\.",
          "text_encoder_2": r"position_ids|logit_scale|attn_mask", "vae": r"\.loss\.|\.model_ema\."}


def load_single_file(name: str) -> StableDiffusion | None:
    """The model of a single file, in float32, frozen and in eval mode; None where the name is no single file's.

    Args:
        name: `mine.safetensors`, or `mine.safetensors#v_prediction` (or `#epsilon`) where nothing else says which. As
            in other programs, what is not said is epsilon; for SD2, which has both, it has to be said.

    Raises:
        UsageError: it is missing, damaged, incomplete, or something else; nothing of it is left at random.
    """
    file = named(name)
    if file is None:
        return None
    file.refuse_others()
    configs, index = file.configs(), file.beside_json("model_index.json") or {}
    parts: dict[str, Any] = {**tokenizers(file, configs), "scheduler": configs["scheduler"],
                             "card": configs.get("card")}
    nets = _shapes(file, configs)
    sources = {part: file if part != "controlnet" else _controlnet_file(file) for part in nets}
    places = {part: file_places(sources[part], part, net, file.whose) for part, net in nets.items()}
    for part, net in nets.items():
        parts[part] = _filled(net, places[part], sources[part])
    if "text_encoder_2" in parts:
        return StableDiffusionXL(**parts, zeros=bool(index.get("force_zeros_for_empty_prompt", True)))
    return StableDiffusion(**parts)


def checkpoint_configs(name: str) -> dict[str, dict] | None:
    """Part -> config of a single file, from its header and what lies beside it; None where the name is none's."""
    file = named(name)
    if file is None:
        return None
    file.refuse_others()
    return file.configs()


def tokenizers(file: SingleFile, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, CLIPTokenizer]:
    """`tokenizer`, and SDXL's `tokenizer_2`: from the folder beside the file, else CLIP's from the hub or its cache.

    Raises:
        UsageError: there is none, or its vocabulary is not the text encoder's.
    """
    texts = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}
    return {part: _tokenizer(file, part, text, configs[text]) for part, text in texts.items() if text in configs}


def _tokenizer(file: SingleFile, part: str, text: str, config: Mapping[str, Any]) -> CLIPTokenizer:
    own = file.beside_json(CONFIGS[text]) is not None  # then so is the padding
    # OpenCLIP, unlike OpenAI's, pads with 0, which is "!".
    pad = END if config.get("hidden_act", "quick_gelu") == "quick_gelu" else "!"
    options: dict[str, Any] = {} if own else {"pad_token": pad}
    folder = next((found for name in (part, "tokenizer") if (found := file.home / name).is_dir()), None)
    if folder is None and own:
        raise UsageError(f"{file.home} lacks {part}; copy that of the model it is the configuration of")
    tokenizer = _hub_tokenizer(file, **options) if folder is None else _local_tokenizer(folder, **options)
    words, rows = len(tokenizer), config.get("vocab_size", 49408)
    if words > rows or (words < rows and not own):
        raise UsageError(f"{folder or CLIP} knows {words} words, the text encoder of {file.path} {rows}; give it the "
                         "tokenizer it was trained with")
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.get("max_position_embeddings", 77))
    return tokenizer


def _local_tokenizer(folder: Path, **options: Any) -> CLIPTokenizer:
    # transformers makes one of two words where it finds no file
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise UsageError(f"{folder} holds no tokenizer: it lacks vocab.json and merges.txt, or tokenizer.json")
    try:
        return CLIPTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder} holds no tokenizer ({in_short(error)})") from None


def _hub_tokenizer(file: SingleFile, **options: Any) -> CLIPTokenizer:
    from huggingface_hub import hf_hub_download

    try:
        vocab, merges = (hf_hub_download(CLIP, name) for name in ("vocab.json", "merges.txt"))
    except Exception:
        raise UsageError(f"{file.path} holds no tokenizer, and that of {CLIP} could not be fetched; put one "
                         "(vocab.json and merges.txt; ComfyUI's comfy/sd1_tokenizer is the same) into "
                         f"{file.home / 'tokenizer'}") from None
    return CLIPTokenizer(vocab=vocab, merges=merges, unk_token=END, **options)


@dataclass(frozen=True)
class Place:
    """Where a module's tensor stands in a file.

    Attributes:
        turned: transposed there. third: 0, 1, 2 where it is the query's, key's, value's part of one tensor.
    """

    name: str
    turned: bool = False
    third: int | None = None

    def of(self, tensor: Tensor) -> Tensor:
        if self.third is not None:
            tensor = tensor.chunk(3)[self.third]
        return tensor.T if self.turned else tensor

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.third is not None:
            shape = (shape[0] // 3, *shape[1:])
        return _bare(shape[::-1] if self.turned else shape)


def file_places(file: SingleFile, part: str, net: nn.Module, whose: str) -> dict[str, Place]:
    """Where each tensor of a network stands in the file: all of them there, as large, and none left over.

    Raises:
        UsageError: otherwise.
    """
    wanted = {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}
    prefix, places = _places(file, part, net, list(wanted))
    remedy = f"fetch it again, or put the diffusers configs of its own base into {file.home}"
    if lacks := [place.name for place in places.values() if place.name not in file.shapes]:
        raise UsageError(f"{file.path} lacks {len(lacks)} tensors of the {PARTS[part]} of {whose}, {lacks[0]} first; "
                         f"{remedy}")
    for key, place in places.items():
        if place.shape(file.shapes[place.name]) != _bare(wanted[key]):
            raise UsageError(f"{file.path}: {place.name} is {list(file.shapes[place.name])}, which does not fit the "
                             f"{PARTS[part]} of {whose}, where its module is {list(wanted[key])}; {remedy}")
        if not file.dtypes[place.name].startswith(("F", "BF")):
            raise UsageError(f"{file.path}: {place.name} is {file.dtypes[place.name]}, a quantised weight; give the "
                             "checkpoint it was made from, in fp16, bf16 or fp32")
    if more := _left_over(file, part, prefix, places):
        raise UsageError(f"{file.path} has {len(more)} tensors that the {PARTS[part]} of {whose} has no place for, "
                         f"{more[0]} first; {remedy}")
    return places


def _left_over(file: SingleFile, part: str, prefix: str, places: Mapping[str, Place]) -> list[str]:
    """The part's tensors in the file that are not read, and should be."""
    layers = sum("layer_norm1.weight" in key for key in places)
    unused = re.compile(UNUSED[part].format(layers=layers) if part in UNUSED else "$^")
    read = {place.name for place in places.values()}
    return sorted(key for key in file.shapes if key.startswith(prefix) and key not in read and not unused.search(key))


def _places(file: SingleFile, part: str, net: nn.Module, keys: list[str]) -> tuple[str, dict[str, Place]]:
    """What the names of a part begin with, and its places."""
    config = getattr(net, "config")  # noqa: B009
    same = {key: key for key in keys}
    names = {"unet": (unet_names, UNET), "vae": (vae_names, VAE), "controlnet": (controlnet_names, CONTROLNET)}
    if part in names:
        named, prefix = names[part]
        return prefix, {key: Place(name) for name, key in renamed(same, named(config), prefix).items()}
    prefix = TEXTS[1] if part == "text_encoder_2" else next(
        p for p in (TEXT, TEXTS[0]) if any(key.startswith(p) for key in file.shapes))
    if config.hidden_act == "quick_gelu":
        # Older files do without transformers' wrapper.
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
            yield key, Place(f"{prefix}text_projection", turned=True)
        else:
            plain[bare] = key
    for name, key in renamed(plain, open_clip_names(layers), prefix).items():
        yield key, Place(name)


def _shapes(file: SingleFile, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, nn.Module]:
    """The networks of the configs, without memory of their own."""
    try:
        with torch.device("meta"):
            return published.networks(configs)
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, RuntimeError) as error:
        raise UsageError(f"the configurations in {file.beside} describe no model ({in_short(error)})") from None


def _filled(net: nn.Module, places: Mapping[str, Place], file: SingleFile) -> nn.Module:
    """The network with the file's numbers, as float32; frozen and in eval mode."""
    wanted = {key: tensor.shape for key, tensor in net.state_dict().items()}
    try:
        with safe_open(file.path, "pt") as opened:  # copied: what it gives is a view of the file
            state = {key: place.of(opened.get_tensor(place.name)).to(torch.float32, copy=True).reshape(wanted[key])
                     .contiguous() for key, place in places.items()}
    except (SafetensorError, OSError) as error:
        raise damaged(file.path, error) from None
    net.load_state_dict(state, assign=True)
    for module in net.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:  # the one that CLIP's text models have and do not save
                assert name == "position_ids", name
                setattr(module, name, torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return net.eval().requires_grad_(False)


def _controlnet_file(file: SingleFile) -> SingleFile:
    """The ControlNet that an export writes beside the checkpoint."""
    path = file.path.with_name(f"{file.path.stem}_controlnet{ENDING}")
    if not path.is_file():
        raise UsageError(f"{file.beside} has a ControlNet, whose file {path} is not there; put it there, or remove "
                         f"{file.home / 'controlnet'}")
    return SingleFile.opened(path)


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without a 1x1 kernel: the layout writes some linear layers as such convolutions."""
    return shape[:2] if shape[2:] == (1, 1) else shape
