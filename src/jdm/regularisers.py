"""Regularisers in place of distribution matching, or beside it; some bring a module that trains in a phase of its own.

Every `direction` ascends, as in `jdm.terms`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from jdm.directions import LambdaT, clean_alignment, gradient
from jdm.errors import UsageError
from jdm.levels import Levels
from jdm.ranges import Count, NotNegative, Positive, Range, Share
from jdm.schedule import precise
from jdm.terms import CleanTerm, Guided, NoisyTerm, Normaliser, WithModule


@dataclass(frozen=True, kw_only=True)
class MeanVariance(CleanTerm):
    """Descends KL( N(m, s^2) || N(m*, s*^2) ) of each sample's mean m and variance s^2, over all its components.

    1/2 ( (s^2 + (m - m*)^2) / s*^2 - 1 - log(s^2 / s*^2) ): Decoupled DMD's steady regulariser.

    Attributes:
        weight: factor on the whole term, in units of a sample's number of components.
        mean: m*, 0.075 for SDXL; None measures it on the training pictures.
        variance: s*^2, 0.81 for SDXL; None measures it on the training pictures.
    """

    mean: Annotated[float, Range()] | None = None
    variance: Positive | None = None

    def direction(self, at: Any) -> Tensor:
        measured = at.data_moments() if self.mean is None or self.variance is None else (0.0, 1.0)
        mean, variance = (b if a is None else a for a, b in zip((self.mean, self.variance), measured, strict=True))
        descent = clean_alignment(lambda x: -divergence(x, mean, variance), at.x)
        # A sample's KL moves each of its n components by 1/n; times n it is a score-like direction.
        return descent * at.x[0].numel() * self.weight


def divergence(x: Tensor, mean: Tensor | float, variance: Tensor | float) -> Tensor:
    """KL of N(mean of x, variance of x) from N(mean, variance), [B] nats."""
    own, centre = torch.var_mean(precise(x).flatten(1), dim=1, correction=0)
    ratio = own / variance
    return 0.5 * (ratio + (centre - mean) ** 2 / variance - 1 - ratio.log())


class Heads(nn.Module):
    """Features [B, C, h, w] of several layers -> one value per sample, the mean of a small network's on each."""

    def __init__(self, widths: Sequence[int], hidden: int = 64):
        super().__init__()
        self.heads = nn.ModuleList(nn.Sequential(nn.GroupNorm(1, width), nn.Conv2d(width, hidden, 1), nn.SiLU(),
                                                 nn.Conv2d(hidden, 1, 1)) for width in widths)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        values = [head(f).flatten(1).mean(1) for head, f in zip(self.heads, features, strict=True)]
        return torch.stack(values).mean(0)


@dataclass(frozen=True, kw_only=True)
class Adversarial(WithModule, NoisyTerm):
    """grad over x_t of log sigmoid D(x_t): D tells the student's noised samples from noised latents of real pictures.

    D is trained heads on the frozen teacher's features of x_t, told the prompt and t. Its loss is softplus(D(fake)) +
    softplus(-D(real)) + r1/2 |grad D(real)|^2, the gradient over the features, as ADD takes it.

    Attributes:
        r1: weight of the gradient penalty; 0 for none.
    """

    reads_features: ClassVar[bool] = True  # `module` asks for their widths

    levels: Levels = field(default_factory=lambda: Levels(stream="adversarial"))
    lambda_t: LambdaT = "constant"
    normaliser: Normaliser = "none"
    r1: NotNegative = 1e-3

    def module(self, networks: Any) -> nn.Module:
        return Heads(networks.references.widths)

    def direction(self, at: Any) -> Tensor:
        heads = at.module(self)
        with torch.enable_grad():
            x_t = at.x_t.detach().requires_grad_()
            return self.on_x(gradient(-softplus(-heads(at.features(x_t))), x_t, len(x_t)), at)

    def loss(self, at: Any) -> Tensor:
        heads = at.module(self)
        with torch.no_grad():
            fake, real = at.features(at.x_t), at.features(at.noised(at.pictures(), "pictures"))
        real = [f.detach().requires_grad_() for f in real]
        on_fake, on_real = heads(fake), heads(real)
        at.log(discriminator_margin=(on_real - on_fake).detach().mean())
        loss = softplus(on_fake).mean() + softplus(-on_real).mean()
        if not self.r1:
            return loss
        slopes = torch.autograd.grad(on_real.sum(), real, create_graph=True)
        return loss + self.r1 / 2 * sum(s.square().flatten(1).sum(1).mean() for s in slopes)


@dataclass(frozen=True, kw_only=True)
class MMD(Guided, NoisyTerm):
    """Descends MMD^2 between the student's samples and the teacher's, on the teacher's pooled features of both.

    The kernel is a sum of Gaussians whose widths are multiples of the mean squared distance between samples.

    Attributes:
        steps: DDIM steps of a teacher's sample.
    """

    levels: Levels = field(default_factory=lambda: Levels(0.02, 0.3, "mmd"))
    lambda_t: LambdaT = "constant"
    normaliser: Normaliser = "none"
    steps: Count = 8

    def direction(self, at: Any) -> Tensor:
        with torch.no_grad():
            theirs = pooled(at.features(at.noised(at.teacher_samples(self.steps, self.guidance), "teacher")))
        with torch.enable_grad():
            x_t = at.x_t.detach().requires_grad_()
            value = mean_discrepancy(pooled(at.features(x_t)), theirs)
            (found,) = torch.autograd.grad(value, x_t)
        return self.on_x(-found * len(x_t), at)  # `ascend` takes the mean over samples


def pooled(features: Sequence[Tensor]) -> Tensor:
    """Features of several layers [B, C, ...] -> [B, sum of C], each the mean over positions."""
    return torch.cat([precise(f).flatten(2).mean(2) if f.ndim > 2 else precise(f) for f in features], dim=1)


def mean_discrepancy(a: Tensor, b: Tensor, widths: Sequence[float] = (0.25, 1.0, 4.0)) -> Tensor:
    """MMD^2 of samples a [N, D] and b [M, D], without bias; scalar, differentiable in a. It may be below 0."""
    n, m = len(a), len(b)
    if min(n, m) < 2:
        raise UsageError(f"MMD compares pairs of samples; it needs at least 2 in each part of a batch, got {min(n, m)}")
    unit = torch.cdist(a.detach(), b).square().mean().clamp(min=1e-12)

    def kernel(u: Tensor, v: Tensor) -> Tensor:
        square = (u[:, None] - v[None]).square().sum(2) / unit
        return torch.stack([(-square / (2 * width)).exp() for width in widths]).sum(0)

    def apart(u: Tensor) -> Tensor:
        k = kernel(u, u)
        return (k.sum() - k.diagonal().sum()) / (len(u) * (len(u) - 1))

    return apart(a) + apart(b) - 2 * kernel(a, b).mean()


@dataclass(frozen=True, kw_only=True)
class Anchor(Guided, CleanTerm):
    """Ascends (target - x) in the student's first step alone: DP-DMD's guard of diversity over z (arXiv 2602.03139).

    The target is what the teacher makes of the same z. Paper: a velocity to the teacher's state after 10 of 30 steps;
    here: its x0 there, because only a flow's path from z to that state is straight.

    Attributes:
        weight: factor on the whole term; the paper's.
        share: of the batch, the rows that are anchored.
        steps: steps of the teacher's whole sampling.
        taken: steps of these that are taken.
    """

    weight: NotNegative = 0.05
    share: Share = 0.25
    steps: Count = 30
    taken: Count = 10

    def direction(self, at: Any) -> Tensor:
        along = torch.zeros_like(precise(at.x))
        if at.first:
            n = max(1, round(self.share * len(along)))
            along[:n] = (at.teacher_samples(self.steps, self.guidance, n, self.taken) - at.x[:n]) * self.weight
        return along
