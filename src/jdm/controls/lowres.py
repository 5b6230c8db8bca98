"""Low resolution, for super-resolution: every factor-th pixel, enlarged again to the full size."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from jdm.controls.base import Control
from jdm.errors import UsageError
from jdm.schedule import precise


@dataclass(frozen=True)
class LowRes(Control):
    """c = the pixel at row and column factor // 2 of each factor x factor block, repeated over the block.

    This is nearest-exact resampling down and up again (torch's "nearest-exact", PIL's NEAREST, OpenCV's
    INTER_NEAREST_EXACT); torch's "nearest" and OpenCV's INTER_NEAREST take row 0, which on padded pictures
    is padding.

    log p(c | images) = -|A images - target|^2 / (2 temperature^2), A the mean of each block. Nearest-exact
    depends on 1 / factor^2 of the pixels, the mean on all. The metric, mean |h(x) - c|, stays nearest-exact.

    Attributes:
        factor: side of a block, in pixels; it must divide height and width.
        temperature: standard deviation of a block's mean around its target.
    """

    factor: int = 4
    temperature: float = 0.1

    name = "lowres"
    channels = 3

    def __post_init__(self):
        if not isinstance(self.factor, int) or self.factor < 2:
            raise UsageError(f"{self.name}'s factor must be a whole number, at least 2, got {self.factor!r}")
        if not 0 < self.temperature < math.inf:
            raise UsageError(f"{self.name}'s temperature must be above 0 and finite, got {self.temperature:g}")

    def h(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> c [B, 3, H, W]. Raises UsageError unless factor divides H and W."""
        self._check(images)
        first = self.factor // 2
        small = images[..., first :: self.factor, first :: self.factor]
        return small.repeat_interleave(self.factor, -1).repeat_interleave(self.factor, -2)

    def log_prob(self, images: Tensor, c: Tensor, reference: Tensor | None = None) -> Tensor:
        """log p(c | images), summed over blocks and colours: [B], nats, float32 (float64 for float64 images).

        With a `reference` [B, 3, H, W] the target is its block means, so the reference itself is a maximum.
        With c alone the target is c's values: each block's mean must equal one pixel of the picture. The two
        differ by .13 (factor 4) and .20 (factor 8) r.m.s. on Fashion-MNIST, but flat blocks score best on the
        nearest-exact metric. Ascent on this term alone reaches a consistency of .07 and .06 from noisy pictures
        (chance: .20), and of .07 and .002 from a blank one. No gradient reaches c or the reference.
        """
        images = precise(images)
        target = self.area(c if reference is None else reference).detach()
        error = (self.area(images) - target).square().flatten(1).sum(1)
        return -error / (2 * self.temperature**2)

    def area(self, images: Tensor) -> Tensor:
        """Block means: [B, 3, H, W] -> [B, 3, H / factor, W / factor]; for c, the low-resolution picture."""
        self._check(images)
        return functional.avg_pool2d(precise(images), self.factor)

    def _check(self, images: Tensor) -> None:
        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor:
            raise UsageError(f"{self.name} needs sides that are multiples of {self.factor}, got {height} x {width}; "
                             "crop or pad the pictures, or choose another factor")


@dataclass(frozen=True)
class LowRes8(LowRes):
    """LowRes with blocks of 8 x 8."""

    factor: int = 8

    name = "lowres8"
