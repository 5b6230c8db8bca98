"""A split's latents, computed once."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from jdm.data.sources import Pictures
from jdm.size import height_width
from jdm.space import Space, from_bytes


def encoded(space: Space, pictures: Pictures) -> Tensor:
    """Latents of a whole split [N, C, h, w]; they must fit in memory where they are not prepared on disk."""
    return pictures.latents(space) if pictures.latents else torch.cat([*encoded_parts(space, pictures)])


def encoded_parts(space: Space, pictures: Pictures) -> Iterator[Tensor]:
    """Latents of a split piece by piece: 500 pictures, or as many as have 4 million pixels.

    Pieces and layout are those of the prepared folder, so that both have the same bits.
    """
    device = next(space.vae.parameters()).device if space.vae is not None else "cpu"
    for rows in torch.arange(len(pictures)).split(max(1, min(500, 2**22 // prod(height_width(pictures.size))))):
        yield space.encode(from_bytes(pictures.sound(rows)[1]).to(device)).cpu().contiguous()
