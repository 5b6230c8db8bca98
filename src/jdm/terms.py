"""The equations. A term is an ascent direction; terms add, and the sign flips once, in `ascend`.

Terms on x_t are score-like: they reach x times alpha_t lambda_t (`on_x`). All of them come out detached.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from jdm.errors import UsageError
from jdm.schedule import NoiseSchedule, precise
from jdm.score import Estimate, Prompts
from jdm.training.distributed import batch_mean

Weighting = Literal["constant", "x0", "dmd"]


def distribution_matching(real: Estimate, fake: Estimate) -> Tensor:
    """s_real(x_t) - s_fake(x_t): the fidelity term of JDM Eq. 5 and all of Diff-Instruct.

    Ascent direction like x_t, detached, float32. Both estimates must be of the same x_t and t.
    """
    return (real.score - fake.score).detach()


def cfg_augmentation(cond: Estimate, uncond: Estimate) -> Tensor:
    """s(x_t | y) - s(x_t): the direction of classifier-free guidance (JDM Sec. 3.1, Decoupled DMD's CA).

    The gradient of log p(y | x_t), of whichever teacher the estimates come from. Ascent direction like x_t, detached.
    """
    return (cond.score - uncond.score).detach()


def condition_alignment(
    log_prob: Callable[[Tensor], Tensor],
    posterior: Callable[[Tensor, Tensor, Prompts | None], Tensor],
    x_t: Tensor,
    t: Tensor,
    y: Prompts | None = None,
    schedule: NoiseSchedule | None = None,
    draws: Sequence[Tensor] = (),
) -> Tensor:
    """Gradient over x_t of log p(c | x_t): the condition term of JDM Eq. 5, through Eqs. 7-8.

    Without draws log p(c | f(x_t, t)), the one-sample plug-in: biased when p(x | x_t) is wide (docs/equations.md).
    With draws log mean_k p(c | x^k) over samples x^k of p(x | x_t): f(x_t) noised to the same t and mapped back.

    Args:
        log_prob: x -> [B], nats; differentiable in x, called once, or once a draw.
        posterior: f(x_t, t, y) -> x; differentiable in x_t.
        x_t: [B, ...], model space; detached on entry.
        t: [B] in (0, 1].
        draws: standard normal noise like x_t, one tensor for each x^k; they need the schedule.

    Returns:
        Ascent direction like x_t, detached, in nats per unit of x_t.
    """
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_()
        mapped = posterior(x_t, t, y)
        if not draws:
            return _gradient(log_prob(mapped), x_t, len(t))
        if schedule is None:
            raise UsageError("draws of p(x | x_t) need the noise schedule; pass schedule=")
        values = [log_prob(posterior(schedule.noised(mapped, t, eps), t, y)) for eps in draws]
        return _gradient(torch.stack(values).logsumexp(0) - math.log(len(values)), x_t, len(t))


def clean_alignment(log_prob: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Gradient over x of log p(c | x) or of a reward: a term on the clean sample, without alpha_t lambda_t.

    What JDM's ablation without p(c | x_t) uses, and Diff-Instruct++. x [B, ...] is detached on entry.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return _gradient(log_prob(x), x, len(x))


def picture_by_picture(value: Callable[[Tensor, slice], Tensor]) -> Callable[[Tensor], Tensor]:
    """x [B, ...] -> [B], one sample after the other, each one's gradient taken before the next: the memory of one.

    Args:
        value: (x of some rows, the rows) -> one value per row, of that row alone. Differentiated once, in the forward.
    """
    return lambda x: OneByOne.apply(x, value)  # type: ignore[return-value]


class OneByOne(torch.autograd.Function):
    """`picture_by_picture`'s forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Callable[[Tensor, slice], Tensor]) -> Tensor:
        values, gradients = [], []
        for k in range(len(x)):
            with torch.enable_grad():
                row = x[k : k + 1].detach().requires_grad_()
                found = value(row, slice(k, k + 1))
                gradients.append(_gradient(found, row, 1))
            values.append(found.detach())
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *along: Tensor) -> tuple[Tensor, None]:
        (gradients,) = ctx.saved_tensors
        return along[0].view(-1, *[1] * (gradients.ndim - 1)).to(gradients) * gradients, None


def _gradient(value: Tensor, x: Tensor, n: int) -> Tensor:
    if value.shape != (n,):
        raise UsageError(f"log_prob must return one value per sample, shape {(n,)}, got {tuple(value.shape)}")
    if not value.requires_grad:
        raise UsageError("log_prob has no gradient with respect to the picture; keep its operations "
                         "differentiable (no uint8 cast, no numpy, no .detach())")
    return torch.autograd.grad(value.sum(), x)[0]


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
        mean = (estimate.x0 - precise(x)).abs().flatten(1).mean(1).clamp(min=floor)
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
    scale = (ratio * batch_mean(_norms(reference).mean()) / _norms(direction).clamp(min=1e-12)).clamp(max=1)
    return direction * scale.view(-1, *[1] * (direction.ndim - 1))


def ascend(x: Tensor, direction: Tensor) -> Tensor:
    """Scalar loss whose gradient over x [B, ...] is -direction / B: descending it moves x along `direction`."""
    return -(precise(x) * direction.detach()).sum() / len(x)


def _norms(value: Tensor) -> Tensor:
    return value.flatten(1).norm(dim=1)
