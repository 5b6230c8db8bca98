"""Training-free control: a model that never saw a control is steered to it while it samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from jdm.controls import Control
from jdm.directions import condition_alignment, gradient, norms
from jdm.models.family import Family
from jdm.posterior import Posterior
from jdm.schedule import NoiseSchedule, matched
from jdm.score import Estimate, Prompts
from jdm.space import Space, unit

BOUND = 0.5  # of a sample's own norm, what one step may move its x0 by


class Steering:
    """x0 + weight (sigma_t^2 / alpha_t) grad log p(c | x_t), which is E[x | x_t, c] by Tweedie's formula.

    log p(c | x_t) is log p(c | f(x_t)). f is a frozen consistency posterior, one pass more a step; or, where None is
    given, the sampler's own x0, whose pass is then differentiated, as in DPS and Universal Guidance.

    Args:
        log_prob: x -> log p(c | x), [B] nats; differentiable.
        posterior: (x_t, t, y) -> x, with t of `schedule`.
        weight: factor on the gradient; 1 is Bayes' rule.
        bound: largest move of a sample's x0, in units of its norm.
    """

    def __init__(self, log_prob: Callable[[Tensor], Tensor], posterior: Callable[..., Tensor] | None = None,
                 weight: float = 1.0, bound: float = BOUND):
        self.log_prob, self.posterior, self.weight, self.bound = log_prob, posterior, weight, bound

    def __call__(self, estimate: Callable[[Tensor], Estimate], x_t: Tensor, t: Tensor, y: Prompts) -> Estimate:
        """The steered estimate of x_t, from the function that gives the plain one."""
        if self.posterior is None:
            with torch.enable_grad():
                leaf = x_t.detach().requires_grad_()
                found = estimate(leaf)
                along = gradient(self.log_prob(found.x0), leaf, len(leaf))
            found = replace(found, x_t=found.x_t.detach(), output=found.output.detach())
        else:
            found = estimate(x_t)
            along = condition_alignment(self.log_prob, self.posterior, x_t, t, y)
        move = self.weight * found.sigma**2 / found.alpha.clamp(min=1e-6) * along
        share = (self.bound * norms(found.x0) / norms(move).clamp(min=1e-12)).clamp(max=1)
        x0 = found.x0 + move * share.view(-1, *[1] * (move.ndim - 1))
        return Estimate(found.x_t, x0, found.alpha, found.sigma, "sample")


def likelihood(control: Control, space: Space, c: Tensor, image: Tensor) -> Callable[[Tensor], Tensor]:
    """x [B, ...] -> log p(c | x), [B], for one control c [1, k, H, W] measured on one picture [1, 3, H, W]."""
    def log_prob(x: Tensor) -> Tensor:
        n = len(x)
        return control.log_prob(unit(space.decode(x)), c.expand(n, -1, -1, -1), image.expand(n, -1, -1, -1))

    return log_prob


def frozen_posterior(model: Family, schedule: NoiseSchedule) -> Callable[..., Tensor]:
    """The consistency posterior in a folder as f(x_t, t, y), with t and x_t of another model's schedule."""
    own = model.schedule
    f = Posterior(model.score_of(model.text(), model.denoiser()), own)

    def of(x_t: Tensor, t: Tensor, y: Prompts | None = None) -> Tensor:
        same = matched(own, schedule, t)
        return f(x_t * own.alpha(same, x_t) / schedule.alpha(t, x_t), same, y)

    return of
