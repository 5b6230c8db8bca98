"""The equations. A term is an ascent direction; terms add, and the sign flips once, in `ascend`.

Terms on x_t are score-like: they reach x times alpha_t lambda_t (`on_x`). All of them come out detached.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from jdm.errors import UsageError
from jdm.score import Estimate, Prompts

Weighting = Literal["constant", "x0", "dmd"]


def distribution_matching(real: Estimate, fake: Estimate) -> Tensor:
    """s_real(x_t) - s_fake(x_t): the fidelity term of JDM Eq. 5 and all of Diff-Instruct.

    Ascent direction like x_t, detached, float32. Both estimates must be of the same x_t and t.
    """
    return (real.score - fake.score).detach()


def condition_alignment(
    log_prob: Callable[[Tensor], Tensor],
    posterior: Callable[[Tensor, Tensor, Prompts | None], Tensor],
    x_t: Tensor,
    t: Tensor,
    y: Prompts | None = None,
) -> Tensor:
    """Gradient over x_t of log p(c | f(x_t, t)): the condition term of JDM Eq. 5, through Eqs. 7-8.

    A one-sample plug-in estimate of Eq. 7: biased when p(x | x_t) is wide (docs/equations.md).

    Args:
        log_prob: x -> [B], nats; differentiable in x, called once.
        posterior: f(x_t, t, y) -> x; differentiable in x_t.
        x_t: [B, ...], model space; detached on entry.
        t: [B] in (0, 1].

    Returns:
        Ascent direction like x_t, detached, in nats per unit of x_t.
    """
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_()
        value = log_prob(posterior(x_t, t, y))
        if value.shape != t.shape:
            raise UsageError(f"log_prob must return one value per sample, shape {tuple(t.shape)}, "
                             f"got {tuple(value.shape)}")
        if not value.requires_grad:
            raise UsageError("log_prob has no gradient with respect to the picture; keep its operations "
                             "differentiable (no uint8 cast, no numpy, no .detach())")
        (direction,) = torch.autograd.grad(value.sum(), x_t)
    return direction


def lambda_t(weighting: Weighting, estimate: Estimate, x: Tensor | None = None, floor: float = 0.1) -> Tensor:
    """lambda_t of JDM Eq. 3, as a choice; [B, 1, ...] float32.

    constant: 1. x0: sigma^2 / alpha^2, so that alpha lambda (s_real - s_fake) = x0_real - x0_fake.
    dmd: x0's, divided by mean|x0_real - x| per sample (DMD's normaliser), the mean bounded below by `floor`
    because it tends to 0 at clean levels.

    Args:
        estimate: the real score's, of the x_t the term was taken on.
        x: the generator's sample; needed by `dmd`.
    """
    ratio = (estimate.sigma / estimate.alpha) ** 2
    if weighting == "constant":
        return torch.ones_like(ratio)
    if weighting == "x0":
        return ratio
    if weighting == "dmd" and x is not None:
        mean = (estimate.x0 - x.float()).abs().flatten(1).mean(1).clamp(min=floor)
        return (ratio / mean.view_as(ratio)).detach()
    raise UsageError(f"lambda_t must be constant, x0 or dmd (with x), got {weighting!r}")


def on_x(direction: Tensor, estimate: Estimate, weight: Tensor) -> Tensor:
    """alpha_t lambda_t direction: the one place where a term on x_t becomes a term on x (JDM Eq. 5)."""
    return estimate.alpha * weight * direction


def clipped_to(direction: Tensor, reference: Tensor, ratio: float) -> Tensor:
    """`direction` with each sample's norm at most `ratio` times the mean norm of `reference` over the batch.

    The batch's mean and not the sample's own norm: at clean levels the score difference vanishes, and that is where
    a plug-in likelihood is right.
    """
    scale = (ratio * _norms(reference).mean() / _norms(direction).clamp(min=1e-12)).clamp(max=1)
    return direction * scale.view(-1, *[1] * (direction.ndim - 1))


def ascend(x: Tensor, direction: Tensor) -> Tensor:
    """Scalar loss whose gradient over x [B, ...] is -direction / B: descending it moves x along `direction`."""
    return -(x.float() * direction.detach()).sum() / len(x)


def _norms(value: Tensor) -> Tensor:
    return value.flatten(1).norm(dim=1)
