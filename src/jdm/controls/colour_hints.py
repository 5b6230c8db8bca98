"""Colour hints: a few blobs of paint, and nothing in between."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from jdm.controls.base import Control
from jdm.controls.filters import chances, filtered, gaussian
from jdm.errors import UsageError
from jdm.schedule import precise

DARKEST = 0.2  # black paint; below half of it, nothing is painted
EXACT = ((0.5, 0.5), (0.27, 0.27), (0.27, 0.73), (0.73, 0.27), (0.73, 0.73))  # (row, column), as shares of the sides
MOST = 8  # blobs


@dataclass(frozen=True)
class ColourHints(Control):
    """c = .2 + .8 times the blurred picture inside a few discs, 0 outside: black paint is not the lack of paint.

    h paints five discs at fixed places; training paints 0 to 8 at random ones (`drawn`), each of one flat colour, as
    people do. log p(c | images) = -|blurred images - paint|^2 / (2 temperature^2) over the painted pixels.

    Attributes:
        radius: radius of a disc, as a share of the shorter side; training draws half to twice as much.
        smoothing: standard deviation of the blur, as a share of the shorter side.
        temperature: standard deviation of a painted pixel's colour around the paint.
    """

    radius: float = 0.07
    smoothing: float = 0.03
    temperature: float = 0.1

    name = "colour-hints"
    channels = 3
    by_hand = True

    def __post_init__(self):
        for field in ("radius", "smoothing", "temperature"):
            if not 0 < getattr(self, field) < math.inf:
                raise UsageError(f"colour-hints' {field} must be above 0 and finite, got {getattr(self, field):g}")

    def h(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> c [B, 3, H, W] in [0, 1], float32 or wider, differentiable."""
        blurred = self._blurred(images)
        painted = torch.stack([self._disc(images, *place, self.radius) for place in EXACT]).amax(0)
        return painted * (DARKEST + (1 - DARKEST) * blurred.clamp(0, 1))

    @torch.no_grad()
    def drawn(self, images: Tensor, luck: Tensor) -> Tensor:
        """Random blobs [B, 3, H, W] of the pictures' colours; a later blob covers the earlier ones."""
        blurred, sheets = self._blurred(images), []
        for picture, chance in zip(blurred.clamp(0, 1), chances(luck), strict=True):
            sheet = torch.zeros_like(picture)
            for _ in range(int(torch.randint(MOST + 1, (1,), generator=chance))):
                row, column, size = torch.rand(3, generator=chance, dtype=torch.float64).tolist()
                row, column = 0.1 + 0.8 * row, 0.1 + 0.8 * column  # the border is mostly paper
                disc = self._disc(images, row, column, self.radius * 4 ** (size - 0.5))
                colour = picture[:, int(row * picture.shape[1]), int(column * picture.shape[2])]
                sheet = torch.where(disc > 0, DARKEST + (1 - DARKEST) * colour.view(3, 1, 1), sheet)
            sheets.append(sheet)
        return torch.stack(sheets)

    def log_prob(self, images: Tensor, c: Tensor, reference: Tensor | None = None) -> Tensor:
        """log p(c | images), summed over the painted pixels and colours: [B], nats, float32 or wider."""
        c = c.to(precise(images)).detach()
        painted = (c.amax(1, keepdim=True) > DARKEST / 2).to(c)
        paint = (c - DARKEST) / (1 - DARKEST)
        error = (painted * (self._blurred(images) - paint).square()).flatten(1).sum(1)
        return -error / (2 * self.temperature**2)

    def _blurred(self, images: Tensor) -> Tensor:
        images = precise(images)
        _, smooth = gaussian(self.smoothing * min(images.shape[-2:]), images)
        return filtered(images.flatten(0, 1).unsqueeze(1), smooth, smooth).view_as(images)

    def _disc(self, images: Tensor, row: float, column: float, radius: float) -> Tensor:
        """[H, W]: 1 inside the disc, 0 outside; all three as shares."""
        height, width = images.shape[-2:]
        rows = torch.arange(height, device=images.device).view(-1, 1) + 0.5 - row * height
        columns = torch.arange(width, device=images.device) + 0.5 - column * width
        return ((rows.square() + columns.square()).sqrt() <= radius * min(height, width)).to(precise(images))
