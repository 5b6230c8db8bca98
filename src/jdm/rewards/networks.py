"""Shared parts of the published rewards: CLIP's preprocessing, embeddings, the scoring head, loading of weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from jdm.errors import UsageError, in_short, plural
from jdm.files import expanded
from jdm.models import hub
from jdm.models.weights import read_tensors

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, by channel


def clip_pixels(images: Tensor, side: int, dtype: torch.dtype = torch.float32, whole: bool = False) -> Tensor:
    """CLIP's preprocessing: images [B, 3, H, W] in [0, 1] -> [B, 3, side, side]; differentiable in images.

    Bicubic antialiased resizing of the shorter side to `side`, a centre crop, both in float32 or wider, then
    standardisation by channel. Values are clamped to [0, 1] before, between and after the two passes, as Pillow's
    8 bits are: beyond that range the published score does not change, and neither does this one.

    Args:
        whole: resize the longer side to `side` and pad with black bars instead of cropping.
    """
    height, width = images.shape[-2:]
    one = max(height, width) if whole else min(height, width)
    size = [round(n * side / one) if whole else n * side // one for n in (height, width)]
    x = images.to(torch.promote_types(images.dtype, torch.float32))
    for shape in ([height, size[1]], size):
        x = functional.interpolate(x.clamp(0, 1), size=shape, mode="bicubic", antialias=True, align_corners=False)
    x = x.clamp(0, 1)
    if whole:
        top, left = ((side - n) // 2 for n in size)
        x = functional.pad(x, [left, side - size[1] - left, top, side - size[0] - top])
    else:
        top, left = ((n - side) // 2 for n in size)
        x = x[..., top : top + side, left : left + side]
    mean, std = (x.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return ((x - mean) / std).to(dtype)


def image_embedding(clip: Any, images: Tensor, whole: bool = False) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] -> CLIP's unit-length [B, D], float32 or wider; differentiable in images."""
    config = getattr(clip.config, "vision_config", clip.config)
    pixels = clip_pixels(images, config.image_size, clip.dtype, whole)
    return _unit_length(clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output))


@torch.no_grad()
def text_embedding(clip: Any, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """B prompts, truncated to the model's token limit -> CLIP's unit-length [B, D], detached."""
    tokens = tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt",
                       max_length=clip.config.text_config.max_position_embeddings).to(clip.device)
    pooled = clip.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
    return _unit_length(clip.text_projection(pooled))


def score_head(width: int = 768) -> nn.Sequential:
    """The head of LAION's aesthetic predictor and of ImageReward: features [B, width] -> [B, 1].

    It is affine: the published head has no activation between its layers, only dropout.
    """
    return nn.Sequential(
        nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
        nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
    )


def paired(images: Tensor, prompts: Sequence[str]) -> None:
    """Raises UsageError unless there is one prompt for each image."""
    if len(prompts) != len(images):
        raise UsageError(f"there must be one prompt for each of {plural(len(images), 'image')}, got {len(prompts)}")


def frozen(network: Any) -> Any:
    """Returns `network` in eval mode, with no parameter requiring a gradient."""
    return network.eval().requires_grad_(False)


# Weights


def pretrained(name: str, kind: type[Any], place: str | None, **settings: Any) -> Any:
    """Loads a transformers network (frozen) or tokenizer of class `kind` from a folder or hub id.

    Raises UsageError if it cannot be loaded or lacks a weight, which transformers would initialise at random.
    """
    from transformers.utils import logging

    network, verbosity = issubclass(kind, nn.Module), logging.get_verbosity()
    if network:
        settings |= {"output_loading_info": True, "use_safetensors": True}
    logging.set_verbosity_error()  # it would print a table; the error below is one line
    hub.unfetched(str(place or ""))
    try:
        found = kind.from_pretrained(place, **settings)  # type: ignore[attr-defined]
    except Exception as error:  # the hub, the disk and a wrong file raise different exceptions
        raise UsageError(f"{name} needs {place or 'its weights'}, which could not be loaded ({in_short(error)}); "
                         f"{_remedy(name, place or '')}") from error
    finally:
        logging.set_verbosity(verbosity)
    if not network:
        return found
    model, report = found
    wrong = sorted(report["missing_keys"]) + sorted(str(k[0]) for k in report.get("mismatched_keys", ()))
    if wrong:
        raise UsageError(f"{name}: {place or 'the file'} lacks {plural(len(wrong), 'weight')} of "
                         f"{kind.__name__}, such as {wrong[0]}; is it another model?")
    return frozen(model)


def weights_file(name: str, place: str, files: Sequence[str]) -> Path:
    """Returns the weights file: `place` itself, one of `files` in the folder `place`, or `files[0]` from the hub."""
    path = expanded(place)
    if path.is_file():
        return path
    inside = [path / file for file in files if (path / file).is_file()]
    if inside:
        return inside[0]
    if path.is_dir():
        raise UsageError(f"{name}: {place} holds none of {', '.join(files)}; name the weights file itself")
    try:
        from huggingface_hub import hf_hub_download

        hub.unreachable()
        return Path(hf_hub_download(place, files[0]))
    except Exception as error:  # offline, gated, misspelt
        raise UsageError(f"{name} needs {files[0]} of {place}, which could not be fetched ({in_short(error)}); "
                         f"{_remedy(name, place, files[0])}") from error


def read_weights(name: str, file: Path) -> dict[str, Tensor]:
    """Reads the tensors of a .safetensors or PyTorch file, by name; only tensors are unpickled."""
    try:
        return read_tensors(file)
    except Exception as error:  # a broken file may raise anything
        raise UsageError(f"{name}: {file} is not a weights file ({in_short(error)}); fetch it again") from error


def fill(name: str, network: nn.Module, weights: dict[str, Tensor], file: Path) -> None:
    """Loads `weights` into `network`. Raises UsageError if a name or shape does not match."""
    own = network.state_dict()
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    odd = [k for k in own.keys() & weights.keys() if own[k].shape != weights[k].shape]
    for keys, what in ((missing, "lacks"), (unknown, "has unknown"), (odd, "has misshapen")):
        if keys:
            more = f" and {plural(len(keys) - 1, 'more weight')}" if len(keys) > 1 else ""
            raise UsageError(f"{name}: {file} {what} {keys[0]}{more}; is it another model?")
    network.load_state_dict(weights)


def _unit_length(embedding: Tensor) -> Tensor:
    wide = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
    return functional.normalize(wide, dim=-1)


def _remedy(name: str, place: str, file: str = "") -> str:
    if place.startswith((".", "/", "~")) or not 0 < place.count("/") < 2:
        return f"give a hub id, or a folder that holds it: {name}:FOLDER"
    command = f"hf download {place} {file}".strip()
    return f"fetch it with `{command}`, or give a folder that holds it: {name}:FOLDER"
