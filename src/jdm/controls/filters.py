"""Building blocks that several controls share: luma, Gaussian kernels, chance, networks run in pieces."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

PICTURES_AT_ONCE = 16


def chances(luck: Tensor) -> list[torch.Generator]:
    """A random stream for each picture that follows from its `luck` [B] in [0, 1) alone."""
    return [torch.Generator().manual_seed(int(number * 2**31)) for number in luck.double().tolist()]


def luma(images: Tensor) -> Tensor:
    """Grey, .299 R + .587 G + .114 B: [B, 3, H, W] -> [B, 1, H, W]."""
    red, green, blue = images.unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)


def gaussian(std: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets -r..r in pixels, r = ceil(3 std), and the Gaussian's weights there, which sum to 1."""
    radius = math.ceil(3 * std)
    offsets = torch.arange(-radius, radius + 1, device=like.device, dtype=like.dtype)
    return offsets, torch.softmax(-(offsets**2) / (2 * std**2), dim=0)


def filtered(image: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Correlates [B, 1, H, W] with `down` along H and `across` along W, of equal odd length; borders replicated."""
    radius = len(down) // 2
    padded = functional.pad(image, (radius,) * 4, mode="replicate")
    return functional.conv2d(functional.conv2d(padded, down.view(1, 1, -1, 1)), across.view(1, 1, 1, -1))


def in_pieces(measure: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """measure(images), a few pictures at a time unless a gradient is needed.

    Evaluation passes hundreds of pictures at once, whose activations may not fit in memory together.
    """
    if torch.is_grad_enabled() and images.requires_grad:
        return measure(images)
    return torch.cat([measure(part) for part in images.split(PICTURES_AT_ONCE)])
