"""Soft edges without a network: gradient magnitude at two scales, for pictures too small for HED."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from jdm.controls.base import Control
from jdm.controls.filters import filtered, gaussian, luma
from jdm.errors import UsageError
from jdm.schedule import precise


@dataclass(frozen=True)
class SoftEdge(Control):
    """c = m / (m + contrast), m the mean over scales of sqrt(gx^2 + gy^2 + floor^2) - floor.

    (gx, gy) is the gradient of the Gaussian-smoothed grey, scaled so that a step from 0 to 1 has magnitude 1
    at every scale, on the two pixels beside it. The quotient saturates slowly, so that a strong spurious edge
    keeps a gradient where tanh would have none. The map looks like HED's, but it knows nothing of objects and
    counts texture as edges.

    Attributes:
        scales: standard deviations of the Gaussians, in pixels.
        contrast: height of the step that is drawn as half grey.
        floor: magnitudes below it, and their gradients, shrink faster than in proportion. It must be above 0,
            because the square root has no gradient at 0, in the flat parts of a picture.
        temperature: standard deviation of the Gaussian likelihood, in units of c.
    """

    scales: tuple[float, ...] = (0.5, 1.0)
    contrast: float = 0.25
    floor: float = 0.02
    temperature: float = 0.1

    name = "soft-edge"
    channels = 1

    def __post_init__(self):
        if not self.scales:
            raise UsageError("soft-edge needs at least one scale, got none")
        for field in ("scales", "contrast", "floor", "temperature"):
            value = getattr(self, field)
            if not all(0 < number < math.inf for number in (value if field == "scales" else (value,))):
                raise UsageError(f"soft-edge's {field} must be above 0 and finite, got {value}")

    def h(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> c [B, 1, H, W] in [0, 1), float32 or wider, differentiable."""
        image = luma(precise(images))
        magnitude = torch.stack([self._magnitude(image, scale) for scale in self.scales]).mean(0)
        return magnitude / (magnitude + self.contrast)

    def _magnitude(self, image: Tensor, scale: float) -> Tensor:
        offsets, smooth = gaussian(scale, image)
        slope = offsets * smooth
        slope = slope / slope[offsets > 0].sum()
        square = filtered(image, smooth, slope).square() + filtered(image, slope, smooth).square()
        return (square + self.floor**2).sqrt() - self.floor


@dataclass(frozen=True)
class Scribble(SoftEdge):
    """Bold strokes where coarse edges are: c = sigmoid((m / (m + contrast) - threshold) / softness).

    Nearly black and white, and still differentiable, so that the map is its own surrogate.

    Attributes:
        threshold: value of the soft edge at which a stroke begins.
        softness: width of a stroke's border, in units of the soft edge.
    """

    scales: tuple[float, ...] = (2.0, 3.0)
    threshold: float = 0.3
    softness: float = 0.04

    name = "scribble"

    def __post_init__(self):
        super().__post_init__()
        for field in ("threshold", "softness"):
            if not 0 < getattr(self, field) < 1:
                raise UsageError(f"scribble's {field} must be inside (0, 1), got {getattr(self, field)}")

    def h(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> c [B, 1, H, W] in (0, 1), float32 or wider, differentiable."""
        return ((super().h(images) - self.threshold) / self.softness).sigmoid()
