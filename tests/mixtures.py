"""A world of discrete c, as Lemma 3.1 asks: x is a Gaussian mixture and c the label of its component. In float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from jdm.schedule import NoiseSchedule
from jdm.score import Estimate, Prompts
from worlds import levels, tensor, times


@dataclass(frozen=True)
class MixtureWorld:
    """x ~ sum_k weights_k N(means_k, variances_k I); c = k, the label of the component x came from."""

    weights: Tensor
    means: Tensor
    variances: Tensor
    schedule: NoiseSchedule

    @classmethod
    def example(cls, schedule: NoiseSchedule) -> MixtureWorld:
        return cls(tensor([0.5, 0.3, 0.2]), tensor([[-1.0, 0.2], [1.2, 1.0], [0.5, -1.5]]),
                   tensor([0.15, 0.3, 0.08]), schedule)

    def log_joint(self, x_t: Tensor, t: Tensor) -> Tensor:
        """log p(x_t, c = k), [B, K]."""
        offset, variance = self._offsets(x_t, t)
        normal = -0.5 * (offset.square().sum(2) / variance + x_t.shape[1] * torch.log(2 * math.pi * variance))
        return self.weights.log() + normal

    def log_density(self, x_t: Tensor, t: Tensor) -> Tensor:
        """log p(x_t), [B]."""
        return self.log_joint(x_t, t).logsumexp(1)

    def log_prob(self, c: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """log p(c | x_t), [B] nats; t = 0 is log p(c | x)."""
        return self.log_joint(x_t, t).log_softmax(1).gather(1, c[:, None]).squeeze(1)

    def score(self, x_t: Tensor, t: Tensor, y: Prompts | None = None) -> Estimate:
        """sum_k p(k | x_t) of the components' scores, as an Estimate; a jdm.score.Score."""
        offset, variance = self._offsets(x_t, t)
        parts = -offset / variance.unsqueeze(2)
        score = (self.log_joint(x_t, t).softmax(1).unsqueeze(2) * parts).sum(1)
        alpha, sigma = levels(self.schedule, t)
        return Estimate(x_t, -sigma * score, alpha, sigma)

    def condition_gradient(self, c: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Gradient over x_t of log p(c | x_t): the component's score minus the mixture's."""
        offset, variance = self._offsets(x_t, t)
        rows = torch.arange(len(c))
        return -offset[rows, c] / variance[rows, c, None] - self._score(x_t, t)

    def posterior(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """p(x | x_t) is a mixture: its weights [B, K], means [B, K, d], variances [B, K]."""
        alpha, sigma = levels(self.schedule, t)
        offset, variance = self._offsets(x_t, t)
        means = self.means + (alpha * self.variances / variance).unsqueeze(2) * offset
        return self.log_joint(x_t, t).softmax(1), means, sigma**2 * self.variances / variance

    def posterior_moments(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, d] and covariance [B, d, d] of p(x | x_t)."""
        weights, means, variances = self.posterior(x_t, t)
        mean = (weights.unsqueeze(2) * means).sum(1)
        apart = means - mean.unsqueeze(1)
        within = (weights * variances).sum(1)[:, None, None] * torch.eye(x_t.shape[1]).double()
        return mean, within + torch.einsum("bk,bki,bkj->bij", weights, apart, apart)

    def plug_in_gradient(self, c: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """(alpha / sigma^2) Cov[x | x_t] times the gradient of log p(c | x) at E[x | x_t]."""
        alpha, sigma = levels(self.schedule, t)
        mean, cov = self.posterior_moments(x_t, t)
        return times(cov, self.condition_gradient(c, mean, torch.zeros_like(t))) * alpha / sigma**2

    def _score(self, x_t: Tensor, t: Tensor) -> Tensor:
        offset, variance = self._offsets(x_t, t)
        return -(self.log_joint(x_t, t).softmax(1).unsqueeze(2) * offset / variance.unsqueeze(2)).sum(1)

    def _offsets(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t - alpha means [B, K, d] and alpha^2 variances + sigma^2 [B, K]."""
        alpha, sigma = levels(self.schedule, t)
        return x_t.unsqueeze(1) - alpha.unsqueeze(2) * self.means, alpha**2 * self.variances + sigma**2
