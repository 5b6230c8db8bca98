"""The one-step generator: x = (z - sigma_T eps(z, T, y, c)) / alpha_T."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from jdm.schedule import NoiseSchedule
from jdm.score import Estimate, Prediction, Prompts, Text


class Generator:
    """A denoiser run once, at level index T (`t_init`), on z ~ N(0, I) as it is.

    z has unit variance and is NOT scaled by sigma_T, so that a stock diffusers pipeline with one step at T
    computes the same picture.

    Args:
        net: (z, index, text, control) -> output like z; `control` is None for a generator without control.
    """

    def __init__(
        self,
        net: Callable[..., Tensor],
        schedule: NoiseSchedule,
        t_init: int,
        text: Callable[[Prompts], Text],
        prediction: Prediction = "epsilon",
    ):
        self.net, self.schedule, self.t_init = net, schedule, t_init
        self.text = text
        self.prediction: Prediction = prediction

    def __call__(self, z: Tensor, y: Prompts, control: Tensor | None = None) -> Tensor:
        """x [B, ...] like z, from noise z, prompts y and a control image [B, 3, H, W] in [0, 1]."""
        t = self.schedule.t(self.t_init).to(z.device).expand(len(z))
        output = self.net(z, self.schedule.index(t), self.text(y), control)
        return Estimate.of(output, self.prediction, z, t, self.schedule).x0

    def parameters(self) -> list[nn.Parameter]:
        return list(self.net.parameters()) if isinstance(self.net, nn.Module) else []


def starting_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """z for picture number i of a seed: row i, the same whatever the batch size."""
    rows = [torch.randn(shape[1:], generator=torch.Generator().manual_seed(seed * 1_000_003 + i))
            for i in range(shape[0])]
    return torch.stack(rows)
