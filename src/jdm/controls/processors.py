"""What the image processors of transformers share, in torch: resizing with PIL's kernels, and standardising."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional

KERNELS = {2: "bilinear", 3: "bicubic", "bilinear": "bilinear", "bicubic": "bicubic"}  # PIL's numbers, torch's names


def kernel_of(processor: Any) -> str | None:
    """The kernel that a processor resizes with, bilinear or bicubic; None for any other."""
    return KERNELS.get(getattr(processor.resample, "value", processor.resample))


def resized(images: Tensor, size: tuple[int, int], kernel: str) -> Tensor:
    """[B, C, H, W] -> [B, C, *size] with PIL's kernels, which torch uses if antialias is set."""
    if tuple(images.shape[-2:]) == size:
        return images
    return functional.interpolate(images, size, mode=kernel, align_corners=False, antialias=True)


@dataclass(frozen=True)
class Standard:
    """(images scale - mean) / std.

    Attributes:
        mean, std: for R, G and B.
        scale: factor on images in [0, 1].
    """

    mean: tuple[float, ...] = (0.5,) * 3
    std: tuple[float, ...] = (0.5,) * 3
    scale: float = 1.0

    @classmethod
    def of(cls, processor: Any) -> Standard:
        """Reads the settings of an image processor for 8-bit pictures."""
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ((0.0,) * 3, (1.0,) * 3)
        return cls(tuple(mean), tuple(std), 255 * processor.rescale_factor if processor.do_rescale else 255.0)

    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> the same, standardised."""
        mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return (images * self.scale - mean) / std
