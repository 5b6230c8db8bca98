"""Picture sizes: one number for a square's side, two for height and width, in pixels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

Size = int | tuple[int, int]


def height_width(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def sized(sides: Sequence[int]) -> Size:
    """(height, width) -> one number where they are equal."""
    height, width = sides
    return height if height == width else (height, width)


def size_of(images: Tensor) -> Size:
    """Of pictures [..., H, W]."""
    return sized(images.shape[-2:])


def spelled(size: Size) -> str:
    """For a sentence: height x width."""
    return " x ".join(str(side) for side in height_width(size))
