"""Image encoders, differentiable in the picture: EfficientNet-Lite0, or any vision model of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from jdm.controls.processors import Standard, kernel_of, resized
from jdm.errors import UsageError, in_short
from jdm.files import expanded
from jdm.models import hub
from jdm.models.weights import not_finite, refuse_foreign

EFFLITE0 = "efflite0"
NAME = "image-prompt"  # for messages
REMEDY = "name a folder or hub id of a CLIP, SigLIP, DINOv2 or ViT model"


@dataclass(frozen=True)
class Pixels:
    """standard(crop(resized(images))): an image processor of transformers, in torch.

    Resizing has PIL's kernels; values that leave [0, 1] are clipped, as PIL clips them, but not rounded to 8 bits.

    Attributes:
        size: (height, width), or the length of the shorter side.
        crop: (height, width) of the centre that is kept; None keeps all.
        kernel: bilinear or bicubic.
        standard: what is done to each value.
    """

    size: tuple[int, int] | int
    crop: tuple[int, int] | None
    kernel: str
    standard: Standard = field(default_factory=Standard)

    @classmethod
    def of(cls, processor: Any, place: str) -> Pixels:
        """Reads the settings of an image processor; UsageError for one that does more than these settings say."""
        size, kernel = _plain(processor.size), kernel_of(processor)
        crop = _plain(processor.crop_size) if getattr(processor, "do_center_crop", False) else None
        sides = {"height", "width"}
        if (kernel is None or not processor.do_resize or set(size) not in (sides, {"shortest_edge"})
                or (crop and set(crop) != sides) or getattr(processor, "crop_pct", None)
                or getattr(processor, "do_pad", False)):
            raise UsageError(f"{NAME} cannot differentiate the preprocessing of {place} ({type(processor).__name__}, "
                             f"size {size}, kernel {processor.resample}); {REMEDY}")
        return cls(
            size=size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"]),
            crop=(crop["height"], crop["width"]) if crop else None,
            kernel=kernel,
            standard=Standard.of(processor),
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W], clipped to [0, 1] -> the network's input, differentiable."""
        height, width = images.shape[-2:]
        short = min(height, width)
        size = self.size if isinstance(self.size, tuple) else (self.size * height // short, self.size * width // short)
        x = resized(images.clamp(0, 1), size, self.kernel).clamp(0, 1)
        if self.crop is not None:
            top, left = ((whole - kept) // 2 for whole, kept in zip(size, self.crop, strict=True))
            x = x[..., top : top + self.crop[0], left : left + self.crop[1]]
        return self.standard(x)


@dataclass(frozen=True)
class Encoder:
    """E(images) = pooled(network(pixels(images))), divided by its length.

    Attributes:
        pooled: network, its input -> [B, D] or [B, D, 1, 1].
    """

    network: nn.Module
    pixels: Pixels
    pooled: Callable[[Any, Tensor], Tensor]

    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], float32 or wider -> unit length [B, D], on their device."""
        network = self.network.to(images.device, images.dtype)
        return functional.normalize(self.pooled(network, self.pixels(images)).flatten(1), dim=1)


def image_encoder(place: str, weights: bool = True) -> Encoder:
    """The frozen encoder: EFFLITE0, or that of a folder or hub id, from safetensors alone and without code of its own.

    Args:
        weights: read the weights; without them a network of transformers has random ones.

    Raises:
        UsageError: there is no such folder or hub id, it is no vision model, or it has no safetensors.
    """
    if place == EFFLITE0:
        from jdm.metrics.extractors import EffLite0, efflite0  # stands beside this room, and reads it

        network = efflite0(EffLite0.SIDE)
        return Encoder(network, Pixels((EffLite0.SIDE, EffLite0.SIDE), None, "bicubic"), _mean_over_positions)
    from transformers import MODEL_MAPPING, AutoConfig, AutoImageProcessor

    from jdm.rewards.networks import frozen, pretrained  # stands beside this room

    folder = expanded(place)
    if folder.is_dir():
        place = str(folder)
        refuse_foreign(folder)
    elif why := hub.unfetched(place):
        raise UsageError(f"{NAME}: {why}, or give a model's folder: {NAME}:FOLDER")
    config = pretrained(NAME, AutoConfig, place, trust_remote_code=False)
    config = getattr(config, "vision_config", config)  # of a model of pictures and texts, such as CLIP
    kind: Any = MODEL_MAPPING.get(type(config), None)
    if kind is None or getattr(kind, "main_input_name", "") != "pixel_values":
        raise UsageError(f"{NAME}: {place} is no vision model but {type(config).__name__}; {REMEDY}")
    try:
        processor = AutoImageProcessor.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # no such file, or one that says something else
        raise UsageError(f"{NAME}: the preprocessor_config.json of {place} could not be read ({in_short(error)}); "
                         f"{REMEDY}") from error
    network = pretrained(NAME, kind, place) if weights else frozen(kind(config))
    if weights and (name := not_finite(network)):
        raise UsageError(f"{NAME}: {name} of {place} is not finite (NaN or infinity); fetch the model again")
    return Encoder(network, Pixels.of(processor, place), pooled_output)


def _mean_over_positions(network: Any, x: Tensor) -> Tensor:
    return network.extract_features(x).mean((2, 3))


def pooled_output(network: Any, x: Tensor) -> Tensor:
    """A vision model's pooled output, [B, D] or [B, D, 1, 1]; UsageError for one that has none."""
    pooled = getattr(network(pixel_values=x), "pooler_output", None)
    if pooled is None:
        raise UsageError(f"{NAME}: {type(network).__name__} has no pooled output; {REMEDY}")
    return pooled


def _plain(size: Any) -> dict[str, int]:
    """A processor's size without the entries that it leaves open; a number is both sides."""
    entries = dict(size) if not isinstance(size, int) else {"height": size, "width": size}
    return {key: value for key, value in entries.items() if value is not None}
