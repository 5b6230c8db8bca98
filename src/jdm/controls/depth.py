"""Depth by any DPT, MiDaS or Depth Anything model in transformers, differentiable in the picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from jdm.controls.base import Control
from jdm.controls.filters import in_pieces
from jdm.controls.processors import Standard, kernel_of, resized
from jdm.errors import UsageError, in_short
from jdm.models import hub
from jdm.schedule import precise

FLAT = 1e-5  # a range below this share of the greatest magnitude is float32 noise of a constant map, not depth


class Depth(Control):
    """c = (d - min d) / (max d - min d) for each picture, d the estimated depth; 0 where d is constant.

    Near is bright, since these models predict inverse depth; with a metric depth model, far is bright.
    The model is loaded at the first measurement. To use another model, write a subclass in a file of your own:

        class Anything(Depth):
            model = "depth-anything/Depth-Anything-V2-Small-hf"

    Attributes:
        model: a folder or hub id that AutoModelForDepthEstimation loads, with a DPT image processor.
    """

    name = "depth"
    channels = 1
    model: str = "Intel/dpt-hybrid-midas"

    def __init__(self, model: str | None = None):
        if model is not None:
            self.model = model

    def h(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> c [B, 1, H, W] in [0, 1], differentiable.

        c is float32 or wider, on the pictures' device. Raises UsageError if the model cannot be loaded.
        """
        images = precise(images)
        network, preprocessing = self.loaded
        network.to(images.device, images.dtype)

        def measured(part: Tensor) -> Tensor:
            depth = network(pixel_values=preprocessing(part)).predicted_depth.unsqueeze(1)
            return normalised(preprocessing.undone(depth, part))

        return in_pieces(measured, images)

    @cached_property
    def loaded(self) -> tuple[nn.Module, Preprocessing]:
        """The frozen network and its preprocessing."""
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation

        hub.unfetched(self.model)
        try:
            network, report = AutoModelForDepthEstimation.from_pretrained(self.model, output_loading_info=True,
                                                                          use_safetensors=True)
            processor = AutoImageProcessor.from_pretrained(self.model)
        except Exception as error:  # no network, no such model, not a depth estimator
            raise UsageError(f"depth's model {self.model} could not be loaded ({in_short(error)}); name a folder or "
                             "hub id of a DPT or Depth Anything model: class MyDepth(Depth): model = ...") from error
        if any(key.startswith("head.") for key in report["missing_keys"]):
            raise UsageError(f"depth's model {self.model} was trained without a depth head; name a depth estimator, "
                             f"such as {Depth.model}")
        return network.eval().requires_grad_(False), Preprocessing.of(processor, self.model)


@dataclass(frozen=True)
class Preprocessing:
    """standard(resized(images)), padded: DPT's image processor for 8-bit pictures, in torch.

    Resizing is antialiased, as PIL's is, but neither rounded to 8 bits nor clipped to [0, 1], so that gradients
    survive; beside sharp edges bicubic overshoots, which PIL clips.

    Attributes:
        size: (height, width) to resize to; None to leave pictures as they are.
        keep_aspect: scale both sides by whichever of the two factors is nearer to 1.
        multiple: sides are rounded to a multiple of this.
        divisor: sides are padded evenly with 0 to a multiple of this.
        kernel: bilinear or bicubic.
        standard: what is done to each value.
    """

    size: tuple[int, int] | None
    keep_aspect: bool
    multiple: int
    divisor: int
    kernel: str
    standard: Standard

    @classmethod
    def of(cls, processor: Any, model: str) -> Preprocessing:
        """Reads the settings of a DPT image processor from transformers, of either backend."""
        kernel = kernel_of(processor)
        if not type(processor).__name__.startswith("DPTImageProcessor") or kernel is None:
            raise UsageError(f"depth cannot differentiate the preprocessing of {model} ({type(processor).__name__}, "
                             f"kernel {processor.resample}); name a DPT, MiDaS or Depth Anything model")
        return cls(
            size=(processor.size["height"], processor.size["width"]) if processor.do_resize else None,
            keep_aspect=bool(processor.keep_aspect_ratio),
            multiple=processor.ensure_multiple_of or 1,
            divisor=(getattr(processor, "size_divisor", None) or 1) if processor.do_pad else 1,
            kernel=kernel,
            standard=Standard.of(processor),
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> the network's input."""
        sides = self.sides(*images.shape[-2:])
        return functional.pad(self.standard(resized(images, sides, self.kernel)), self._padding(*sides))

    def undone(self, depth: Tensor, images: Tensor) -> Tensor:
        """Removes the padding from depth [B, 1, h, w] and resizes it to the size of the pictures."""
        height, width = sides = self.sides(*images.shape[-2:])
        left, right, top, bottom = self._padding(*sides)
        if left + right + top + bottom:
            depth = resized(depth, (height + top + bottom, width + left + right), "bicubic")
            depth = depth[..., top : top + height, left : left + width]
        # transformers resizes without antialiasing: from 384 to 32 px its bicubic would read a ninth of the pixels.
        return resized(depth, (images.shape[-2], images.shape[-1]), "bicubic")

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that pictures of this size are resized to."""
        if self.size is None:
            return height, width
        down, across = self.size[0] / height, self.size[1] / width
        if self.keep_aspect:
            down = across = across if abs(1 - across) < abs(1 - down) else down
        return self._rounded(down * height), self._rounded(across * width)

    def _rounded(self, side: float) -> int:
        return max(round(side / self.multiple), 1) * self.multiple

    def _padding(self, height: int, width: int) -> tuple[int, int, int, int]:
        across, down = (math.ceil(side / self.divisor) * self.divisor - side for side in (width, height))
        return across // 2, across - across // 2, down // 2, down - down // 2


def normalised(depth: Tensor) -> Tensor:
    """Stretches each map of [B, 1, H, W] to [0, 1]; a constant map becomes 0."""
    low, high = depth.amin((1, 2, 3), keepdim=True), depth.amax((1, 2, 3), keepdim=True)
    flat = high - low <= FLAT * torch.maximum(low.abs(), high.abs())
    return ((depth - low) / (high - low).masked_fill(flat, 1)).masked_fill(flat, 0)
