"""References of the regularisers: real pictures, the teacher's samples, its features."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from jdm.loading import Loaded
from jdm.models.family import Denoiser
from jdm.score import Prompts, ScoreModel
from jdm.space import from_bytes

MEASURED = 256  # pictures whose latents' mean and variance are taken


class References:
    """Real pictures and the frozen teacher, as terms read them.

    Args:
        real: the teacher's denoiser.
    """

    def __init__(self, loaded: Loaded, real: Denoiser):
        self.loaded, self.real = loaded, real

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of all components of the first training pictures' latents."""
        pictures = self.loaded.pictures
        x = self.encoded(pictures.sound(torch.arange(min(MEASURED, len(pictures))))[1])
        return x.mean(), x.var(correction=0)

    def encoded(self, images: Tensor) -> Tensor:
        """Latents of uint8 pictures [B, 3, H, W]."""
        return self.loaded.teacher.space.encode(from_bytes(images).to(self.loaded.run.device))

    @cached_property
    def widths(self) -> list[int]:
        """Channels of each layer of `features`."""
        one = torch.zeros(self.loaded.teacher.latent_shape(1, self.loaded.run.data.size), device=self.loaded.run.device)
        with torch.no_grad():
            return [f.shape[1] for f in self.features(one, torch.ones(1, dtype=torch.float64), [""])]

    def features(self, x_t: Tensor, t: Tensor, y: Prompts) -> list[Tensor]:
        """The teacher's features of x_t, float32, differentiable in x_t."""
        timestep = self.loaded.teacher.schedule.timestep(t).to(x_t.device)
        found = self.real.features(x_t, timestep, self.loaded.text()(y))
        # Contiguous: a group norm's backward on channels-last input without a gradient of its own ends the process.
        return [f.float().contiguous() for f in found]

    @torch.no_grad()
    def sampled(self, z: Tensor, y: Prompts, steps: int, guidance: float, taken: int | None = None) -> Tensor:
        """The teacher's x0 after `taken` of `steps` DDIM steps from noise z, all of them where None."""
        teacher = self.loaded.teacher
        return ddim(teacher.score_of(self.loaded.text(), self.real, guidance), z, y, steps, taken)


def ddim(score: ScoreModel[Any], z: Tensor, y: Prompts, steps: int, taken: int | None = None,
         control: Tensor | None = None) -> Tensor:
    """x0 after `taken` of `steps` deterministic steps from z at t = 1, evenly spaced in t."""
    x_t, x0, schedule = z, z, score.schedule
    for k in range(steps if taken is None else taken):
        t, after = (torch.full((len(z),), 1 - i / steps, dtype=torch.float64, device=z.device) for i in (k, k + 1))
        estimate = score.guided(x_t, t, y, control)
        x0 = estimate.x0
        x_t = schedule.noised(x0, after, estimate.eps)
    return x0
