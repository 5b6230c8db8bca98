"""p(x | x_t) as a consistency model on the fake score (JDM Eq. 8)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor

from jdm.levels import refuse_empty
from jdm.ranges import Count, Positive, Range, Share
from jdm.run import Optimiser
from jdm.schedule import NoiseSchedule
from jdm.score import Prompts, Score


class Posterior:
    """f(x_t, t) = (x_t - sigma_t eps(x_t, t)) / alpha_t, and f(x, 0) = x (JDM Eq. 8).

    Args:
        score: the fake score with the posterior's LoRA on top.
    """

    def __init__(
        self,
        score: Score,
        schedule: NoiseSchedule,
        levels: int = 18,
        low: float = 0.02,
        high: float = 0.98,
    ):
        self.score, self.schedule = score, schedule
        rows = torch.linspace(low * schedule.n, high * schedule.n, levels, dtype=torch.float64).round()
        # t_0 = 0 is the boundary f(x, 0) = x; t_1 < ... < t_K are grid points.
        self.levels = torch.cat([torch.zeros(1, dtype=torch.float64), rows / schedule.n])

    def __call__(self, x_t: Tensor, t: Tensor, y: Prompts | None = None) -> Tensor:
        """A sample of p(x | x_t), differentiable in x_t; [B, ...] like x_t."""
        x0 = self.score(x_t, t, y).x0
        return torch.where((t > 0).view(-1, *[1] * (x_t.ndim - 1)), x0, x_t)

    def consistency_loss(self, x: Tensor, y: Prompts | None, uniform: Tensor, eps: Tensor) -> Tensor:
        """|| f(x_{t_k}, t_k) - sg f(x_{t_{k-1}}, t_{k-1}) ||^2 with the same x and eps (JDM Eq. 8).

        Args:
            x: [B, ...] student samples; detached on entry.
            uniform: [B] in [0, 1), chooses k in 1..K.
            eps: like x.
        """
        k = 1 + (uniform.double() * (len(self.levels) - 1)).floor().long().cpu()
        t, before = self.levels[k].to(x.device), self.levels[k - 1].to(x.device)
        x = x.detach()
        with torch.no_grad():
            target = self(self.schedule.noised(x, before, eps), before, y)
        return (self(self.schedule.noised(x, t, eps), t, y) - target).square().mean()


# Where a term takes its samples of p(x | x_t) from


@dataclass(frozen=True)
class ConsistencyPosterior:
    """A LoRA on the fake score, trained by consistency on the student's samples (JDM Eq. 8).

    Attributes:
        rank: rank of the LoRA.
        levels: K, the number of noise levels of consistency training.
        low: smallest of those levels, in [0, 1].
        high: largest of those levels, in [0, 1].
        optimiser: trains the LoRA.
        clip: bound on the norm of its whole gradient.
    """

    rank: Count = 16
    levels: Annotated[int, Range(1, 10_000)] = 18
    low: Share = 0.02
    high: Share = 0.98
    optimiser: Optimiser = field(default_factory=lambda: Optimiser(lr=1e-5, betas=(0.0, 0.95)))
    clip: Positive = 1.0

    def __post_init__(self):
        refuse_empty(self.low, self.high)


@dataclass(frozen=True)
class FakePosterior:
    """The fake score's own x0, which needs no further training: the paper's simple choice (JDM Sec. 3)."""


@dataclass(frozen=True)
class FrozenPosterior:
    """A posterior trained beforehand on real pictures; in no paper.

    Attributes:
        model: folder of the posterior that `jdm train nano-posterior` left.
    """

    model: str = "runs/nano-posterior/model"
