"""Image prompts: draw something that looks like this picture, as an image encoder sees it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from jdm.controls.base import Control
from jdm.controls.encoders import EFFLITE0, Encoder, image_encoder
from jdm.controls.filters import chances, in_pieces
from jdm.errors import UsageError
from jdm.schedule import precise

SMALLEST, SHIFT = 0.8, 0.1  # of what training shows: the share of each side, and its centre's way in half sides


@dataclass(frozen=True)
class ImagePrompt(Control):
    """c is the picture itself; log p(c | x) = -|E(x) - E(c)|^2 / (2 temperature^2), E an encoder of unit length.

    On the unit sphere that is (cos - 1) / temperature^2, a von Mises-Fisher density with concentration
    1 / temperature^2: its normaliser depends on neither picture, and a feature's scale, which differs between
    encoders, does not matter. Consistency is 1 - cos, 0 where both pictures look alike to the encoder.

    The ControlNet sees the whole picture and is asked for its embedding alone. Training shows it mirrored, cut and
    shifted at random (`drawn`) and asks for the embedding of the picture as it was, which such views hardly change.

    Attributes:
        encoder: `efflite0`, ImageNet features of a package that is installed with this one, or a folder or hub id of
            a vision model of transformers with safetensors (CLIP, SigLIP, DINOv2, ViT): its pooled output.
        temperature: standard deviation of the embedding, whose length is 1.
    """

    encoder: str = EFFLITE0
    temperature: float = 0.1

    name = "image-prompt"
    channels = 3
    from_place = True

    def __post_init__(self):
        if not 0 < self.temperature < math.inf:
            raise UsageError(f"image-prompt's temperature must be above 0 and finite, got {self.temperature:g}")

    @cached_property
    def loaded(self) -> Encoder:
        """The frozen encoder, read at the first comparison; UsageError if it cannot be."""
        return image_encoder(self.encoder)

    def h(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> c, the same, float32 or wider."""
        return precise(images).clamp(0, 1)

    @torch.no_grad()
    def drawn(self, images: Tensor, luck: Tensor) -> Tensor:
        """Each picture [B, 3, H, W] mirrored or not, cut to 80 to 100% of each side, and shifted by up to 5% of it."""
        views = []
        for chance in chances(luck):
            mirror, size, right, down = torch.rand(4, generator=chance, dtype=torch.float64).tolist()
            size = SMALLEST + (1 - SMALLEST) * size
            views.append([[size if mirror < 0.5 else -size, 0, SHIFT * (2 * right - 1)],
                          [0, size, SHIFT * (2 * down - 1)]])
        c = self.h(images)
        grid = functional.affine_grid(torch.tensor(views).to(c), list(c.shape), align_corners=False)
        return functional.grid_sample(c, grid, padding_mode="border", align_corners=False).clamp(0, 1)

    def compared(self, c: Tensor) -> Tensor:
        """E(c), unit length: [N, 3, H, W] in [0, 1] -> [N, D], float32 or wider, differentiable."""
        return in_pieces(self.loaded, precise(c))

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """1 - cos of embeddings of unit length [N, D]: [N], in [0, 2]."""
        return 1 - (a * b).sum(1)

    def log_prob(self, images: Tensor, c: Tensor, reference: Tensor | None = None) -> Tensor:
        """log p(c | images) up to a constant: [B], nats, float32 or wider.

        Args:
            images: [B, 3, H, W], nominally in [0, 1].
            c: [B, 3, H, W] in [0, 1]; used where there is no reference.
            reference: [B, 3, H, W] in [0, 1], the picture as it was before training mirrored or cut it.
        """
        with torch.no_grad():
            asked = self.compared(c if reference is None else reference)
        return -(self.compared(images) - asked).square().sum(1) / (2 * self.temperature**2)
