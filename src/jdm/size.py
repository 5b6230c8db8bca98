"""Picture sizes in pixels: one number for the side of a square, or (height, width)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from jdm.ranges import Side

Size = Side | tuple[Side, Side]


@dataclass(frozen=True)
class Frame:
    """What is seen of a picture that is resized to cover `size`, keeping its proportions.

    Attributes:
        across, down: shares of what does not fit that are cut at the left and at the top, in [0, 1]; 0.5 keeps the
            middle.
    """

    size: Size
    across: float = 0.5
    down: float = 0.5


def height_width(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def sized(sides: Sequence[int]) -> Size:
    """(height, width) as a Size: one number if they are equal."""
    height, width = sides
    return height if height == width else (height, width)


def size_of(images: Tensor) -> Size:
    """The Size of pictures [..., H, W]."""
    return sized(images.shape[-2:])


def spelled(size: Size) -> str:
    """The size as text for messages: "height x width"."""
    return " x ".join(str(side) for side in height_width(size))


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
