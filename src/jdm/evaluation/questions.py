"""The questions of a comparison: prompts, controls, noise and pictures that are the same for every model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jdm.controls import Control
from jdm.controls.base import control_of
from jdm.data.sources import Pictures
from jdm.errors import UsageError
from jdm.evaluation.sampling import Sampler
from jdm.generator import starting_noise
from jdm.size import size_of
from jdm.space import from_bytes, unit

AT_ONCE = 250 * 32 * 32  # pixels per pass of a network outside training: one picture of 512 px, or many small ones


@dataclass(frozen=True)
class Questions:
    """Prompts and controls of N real pictures.

    Attributes:
        images: [N, 3, H, W] in [0, 1], the pictures that (y, c) come from.
        y: N prompts.
        c: [N, k, H, W], or None for models without a control.
        labels: [N] classes of the pictures, or None.
        seed: seed of the noise and of the choice of captions.
        source: the data set's name.
    """

    images: Tensor
    y: list[str]
    c: Tensor | None
    labels: Tensor | None
    seed: int
    source: str

    @classmethod
    def of(cls, pictures: Pictures, control: Control | None, n: int, seed: int,
           device: str | torch.device = "cpu") -> Questions:
        """Questions on the first n pictures of a split; their control is measured on `device`."""
        if not 2 <= n <= len(pictures):
            raise UsageError(f"n must be in 2..{len(pictures)} ({pictures.source}), got {n}")
        uniform = torch.rand(n, generator=torch.Generator().manual_seed(seed))
        rows, pixels, maps = pictures.sound(torch.arange(n))
        images = unit(from_bytes(pixels))
        c = None if control is None else (control_of(control, images, maps) if maps is not None else
                                          controls_of(control, images, device))
        return cls(images, pictures.prompts(rows, uniform), c, pictures.label(rows), seed,
                   pictures.source.rsplit("/", 1)[0])

    def __len__(self) -> int:
        return len(self.y)

    def head(self, n: int) -> Questions:
        """The first n questions."""
        c, labels = (None if v is None else v[:n] for v in (self.c, self.labels))
        return Questions(self.images[:n], self.y[:n], c, labels, self.seed, self.source)


@torch.no_grad()
def controls_of(control: Control, images: Tensor, device: str | torch.device = "cpu") -> Tensor:
    """h(images) of images [N, 3, H, W] in [0, 1] -> [N, k, H, W] on the CPU, computed in parts on `device`."""
    return torch.cat([control.h(part.to(device)).cpu() for part in in_parts(images)])


@torch.no_grad()
def compared_of(control: Control, c: Tensor, device: str | torch.device = "cpu") -> Tensor:
    """What consistency compares of maps c [N, k, H, W]: [N, ...] on the CPU, computed in parts on `device`."""
    return torch.cat([control.compared(part.to(device)).cpu() for part in in_parts(c)])


def in_parts(images: Tensor) -> Sequence[Tensor]:
    """Splits [N, 3, H, W] into parts of at most AT_ONCE pixels, or of one picture."""
    return images.split(at_once(images))


def at_once(images: Tensor) -> int:
    """How many pictures of the size of these [..., H, W] a network takes in one pass outside training."""
    height, width = images.shape[-2:]
    return max(1, AT_ONCE // (height * width))


def answers(sampler: Sampler, questions: Questions, control: Control | None, batch: int = 64) -> Tensor:
    """A sampler's uint8 pictures [N, 3, H, W] for the questions; the noise of picture i does not depend on `batch`."""
    z = starting_noise(sampler.model.latent_shape(len(questions), size_of(questions.images)), questions.seed)
    shown = None if control is None or questions.c is None else control.image(questions.c)
    return sampler(z, questions.y, shown, batch, questions.seed)
