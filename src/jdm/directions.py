"""Directions in which a student's samples ascend: the equations that terms are made of.

Every direction is detached. Those on x_t are score-like; the sign flips once, in `ascend`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from jdm.errors import UsageError
from jdm.schedule import NoiseSchedule, precise
from jdm.score import Estimate, Prompts

LambdaT = Literal["x0", "constant"]
FLOOR = 0.1  # lower bound on the normaliser, which tends to 0 at clean levels


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


def mixed(own: Estimate, others: Sequence[tuple[Estimate, float]]) -> Estimate:
    """The estimate whose score is (1 - sum of shares) own + share x each other's; `own` itself where there is none.

    Distribution matching's optimum at one t is then the teachers' geometric mixture, the product of p_i(x_t)^share.
    """
    if not others:
        return own
    eps = (1 - sum(share for _, share in others)) * own.eps
    for estimate, share in others:
        eps = eps + share * estimate.eps
    return Estimate(own.x_t, eps, own.alpha, own.sigma)


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
            return gradient(log_prob(mapped), x_t, len(t))
        if schedule is None:
            raise UsageError("draws of p(x | x_t) need the noise schedule; pass schedule=")
        values = [log_prob(posterior(schedule.noised(mapped, t, eps), t, y)) for eps in draws]
        return gradient(torch.stack(values).logsumexp(0) - math.log(len(values)), x_t, len(t))


def clean_alignment(log_prob: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Gradient over x of log p(c | x) or of a reward: a term on the clean sample, without alpha_t lambda_t.

    What JDM's ablation without p(c | x_t) uses, and Diff-Instruct++. x [B, ...] is detached on entry.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return gradient(log_prob(x), x, len(x))


def gradient(value: Tensor, x: Tensor, n: int) -> Tensor:
    if value.shape != (n,):
        raise UsageError(f"log_prob must return one value per sample, shape {(n,)}, got {tuple(value.shape)}")
    if not value.requires_grad:
        raise UsageError("log_prob has no gradient with respect to the picture; keep its operations "
                         "differentiable (no uint8 cast, no numpy, no .detach())")
    return torch.autograd.grad(value.sum(), x)[0]


def lambda_t(kind: LambdaT, alpha: Tensor, sigma: Tensor) -> Tensor:
    """lambda_t of JDM Eq. 3; like alpha and sigma, float32.

    constant: 1. x0: sigma^2 / alpha^2, with which alpha lambda (s_real - s_fake) = x0_real - x0_fake.
    """
    ratio = (sigma / alpha) ** 2
    if kind == "x0":
        return ratio
    if kind == "constant":
        return torch.ones_like(ratio)
    raise UsageError(f"lambda_t must be x0 or constant, got {kind!r}")


def mean_error(x0: Tensor, x: Tensor, floor: float = FLOOR) -> Tensor:
    """DMD's normaliser: mean|x0 - x| of each sample, at least `floor`; [B, 1, ...], detached."""
    mean = (x0 - precise(x)).abs().flatten(1).mean(1).clamp(min=floor)
    return mean.view(-1, *[1] * (x.ndim - 1)).detach()


def clipped(direction: Tensor, length: Tensor) -> Tensor:
    """`direction` [B, ...] with each sample's norm at most `length`, a scalar."""
    scale = (length / norms(direction).clamp(min=1e-12)).clamp(max=1)
    return direction * scale.view(-1, *[1] * (direction.ndim - 1))


def norms(value: Tensor) -> Tensor:
    """Euclidean norm of each sample, [B]."""
    return value.flatten(1).norm(dim=1)


def ascend(x: Tensor, direction: Tensor) -> Tensor:
    """Scalar loss whose gradient over x [B, ...] is -direction / B: descending it moves x along `direction`."""
    return -(precise(x) * direction.detach()).sum() / len(x)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Mean over samples of the cosine between two directions; for the log."""
    return torch.cosine_similarity(a.flatten(1), b.flatten(1), dim=1).mean()


def rms(direction: Tensor) -> Tensor:
    """Root mean square, over samples and components; for the log."""
    return direction.square().mean().sqrt()


def health(x: Tensor) -> dict[str, Tensor]:
    """For the log: std of x [B, ...] over all of it, the share beyond 4, and its std over the samples of the batch."""
    return {"std_x": x.std(), "saturation": (x.abs() > 4).float().mean(), "spread_x": x.std(0, correction=0).mean()}


def together(parts: Mapping[str, Tensor], bounds: Mapping[str, float],
             batch_mean: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The parts, those with a bound clipped to it, in units of the mean norm of the sum of the others.

    The batch's mean and not the sample's own norm: at clean levels the score difference vanishes, and that is where a
    plug-in likelihood is right.

    Args:
        parts: directions on x by name.
        bounds: bounds by name; 0 or missing for none.
        batch_mean: the mean over the whole batch of a number that stands for the samples at hand.
    """
    free = sum_of([part for name, part in parts.items() if name not in bounds])
    length = batch_mean(norms(free).mean()) if any(bounds.values()) else None
    return {name: clipped(part, bounds[name] * length) if length is not None and bounds.get(name) else part
            for name, part in parts.items()}


def sum_of(parts: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape, in their order."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
