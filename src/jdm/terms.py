"""Terms: directions in which the student's samples ascend, and the equations they are made of.

A term owns its weight, its noise levels, its lambda_t and normaliser, its bound, and the models it needs. Terms on x_t
are score-like: they reach x times alpha_t lambda_t, in `NoisyTerm.on_x` alone. Terms add, and the sign flips once, in
`ascend`. Every direction is detached.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from jdm.errors import UsageError
from jdm.levels import Bound, Levels
from jdm.posterior import ConsistencyPosterior, FakePosterior, FrozenPosterior
from jdm.ranges import NotNegative, Share, Whole
from jdm.schedule import NoiseSchedule, precise
from jdm.score import Estimate, Prompts

LambdaT = Literal["x0", "constant"]
Normaliser = Literal["real", "fake", "none"]
AnyPosterior = ConsistencyPosterior | FakePosterior | FrozenPosterior
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


# Terms


class View(Protocol):
    """A term's view of a step: the student's sample, its noisy version at the term's levels, estimates of it.

    Attributes:
        x: the student's sample, detached. x_t: the same at level t, with alpha and sigma that broadcast over it.
        y: prompts.
    """

    x: Tensor
    x_t: Tensor
    t: Tensor
    alpha: Tensor
    sigma: Tensor
    y: Sequence[str]

    def real(self, guidance: float | None = None, teacher: str = "") -> Estimate:
        """A teacher's estimate of x_t, by default the run's at the guidance of the method's fidelity term."""
        ...

    def fake(self) -> Estimate:
        """The fake score's estimate of x_t."""
        ...

    def guidance_pair(self, teacher: str) -> tuple[Estimate, Estimate]:
        """A teacher's estimates of x_t with and without the prompt, the run's own teacher where "" is given."""
        ...

    def likelihood(self, reference: bool) -> Callable[[Tensor], Tensor]:
        """x -> log p(c | x), [B] in nats."""
        ...

    def reward(self) -> Callable[[Tensor], Tensor]:
        """x -> the run's reward, [B]."""
        ...

    def through_posterior(self, value: Callable[[Tensor], Tensor], posterior: AnyPosterior, draws: int = 0) -> Tensor:
        """Gradient over x_t of log E exp(value(x)) for x from p(x | x_t)."""
        ...

    def log(self, **values: Tensor) -> None:
        """Add numbers to the step's log."""
        ...


@dataclass(frozen=True, kw_only=True)
class NoisyTerm:
    """A term on x_t. Subclasses add a field for each setting of their own, and `direction`.

    Attributes:
        weight: factor on the whole term.
        levels: the noise levels it is taken at; terms with equal levels share one x_t.
        lambda_t: x0 for sigma^2 / alpha^2, constant for 1.
        normaliser: estimate x0 by which the term is divided, as mean|x0 - x| per sample: the real score's, as in DMD;
            the fake score's, a pass cheaper at levels of the term's own; or none.
    """

    models: ClassVar[tuple[str, ...]] = ()  # the fields that name a model to load, or several with their shares

    weight: NotNegative = 1.0
    levels: Levels = field(default_factory=Levels)
    lambda_t: LambdaT = "x0"
    normaliser: Normaliser = "real"

    def on_x(self, direction: Tensor, at: View) -> Tensor:
        """weight alpha_t lambda_t direction: the one place where a term on x_t becomes a term on x (JDM Eq. 5)."""
        scale = lambda_t(self.lambda_t, at.alpha, at.sigma)
        if self.normaliser != "none":
            estimate = at.real() if self.normaliser == "real" else at.fake()
            scale = scale / mean_error(estimate.x0, at.x)
        return at.alpha * scale * direction * self.weight


@dataclass(frozen=True, kw_only=True)
class Fidelity(NoisyTerm):
    """s_real(x_t | y) - s_fake(x_t | y): distribution matching, blind to the control (JDM Eq. 5).

    Attributes:
        guidance: w of the real score, uncond + w (cond - uncond); 1 is none.
        also: further teachers of the same latents with their shares; the run's own has what is left of 1.
    """

    models: ClassVar[tuple[str, ...]] = ("also",)

    guidance: NotNegative = 2.0
    also: tuple[tuple[str, Share], ...] = ()

    def direction(self, at: View) -> Tensor:
        others = [(at.real(self.guidance, name), share) for name, share in self.also]
        real, fake = mixed(at.real(self.guidance), others), at.fake()
        at.log(cos_real_fake=cosine(real.eps, fake.eps))
        return self.on_x(distribution_matching(real, fake), at)


@dataclass(frozen=True, kw_only=True)
class CFGAugmentation(NoisyTerm):
    """s(x_t | y) - s(x_t) of a teacher: JDM's decoupled guidance (Sec. 3.1) and Decoupled DMD's CA term.

    Its weight is w - 1 beside a fidelity term that sees the prompt, and w beside one that does not.

    Attributes:
        teacher: another teacher of the same latents, with its own text encoder and schedule; empty for the run's own.
        also: further teachers with their shares; the first has what is left of 1.
    """

    models: ClassVar[tuple[str, ...]] = ("teacher", "also")

    teacher: str = ""
    also: tuple[tuple[str, Share], ...] = ()

    def direction(self, at: View) -> Tensor:
        pairs = [(at.guidance_pair(name), share) for name, share in self.also]
        cond, uncond = (mixed(own, [(pair[k], share) for pair, share in pairs])
                        for k, own in enumerate(at.guidance_pair(self.teacher)))
        return self.on_x(cfg_augmentation(cond, uncond), at)


@dataclass(frozen=True, kw_only=True)
class Condition(NoisyTerm):
    """grad over x_t of log p(c | x_t): the condition term of JDM Eq. 5, through a posterior (Eqs. 7-8).

    Attributes:
        bound: how long the term may be beside the terms that have no bound.
        posterior: source of samples of p(x | x_t), and how it is trained.
        draws: samples of p(x | x_t) in Eq. 7's integral; 0 is the plug-in f(x_t) alone, the paper's one sample.
        reference: compare with the picture that c came from, where the control can; False uses c alone.
    """

    bound: Bound = field(default_factory=Bound)
    posterior: AnyPosterior = field(default_factory=ConsistencyPosterior)
    draws: Whole = 0
    reference: bool = True

    def direction(self, at: View) -> Tensor:
        return self.on_x(at.through_posterior(at.likelihood(self.reference), self.posterior, self.draws), at)


@dataclass(frozen=True, kw_only=True)
class CleanCondition:
    """grad over x of log p(c | x) on the clean sample: JDM's ablation without p(c | x_t).

    Attributes:
        weight: factor on the whole term.
        bound: how long the term may be beside the terms that have no bound.
        reference: compare with the picture that c came from, where the control can; False uses c alone.
    """

    levels = None  # on the clean sample

    weight: NotNegative = 1.0
    bound: Bound = field(default_factory=Bound)
    reference: bool = True

    def direction(self, at: View) -> Tensor:
        return clean_alignment(at.likelihood(self.reference), at.x) * self.weight


@dataclass(frozen=True, kw_only=True)
class Reward(NoisyTerm):
    """grad over x_t of r(f(x_t)): human-feedback learning on the noisy posterior (JDM Eq. 9).

    Attributes:
        model: a reward by name, or an import path, "my_rewards.py:brightness".
        bound: how long the term may be beside the terms that have no bound.
        posterior: source of samples of p(x | x_t), and how it is trained.
    """

    model: str = "nano-reward"
    bound: Bound = field(default_factory=Bound)
    posterior: AnyPosterior = field(default_factory=ConsistencyPosterior)

    def direction(self, at: View) -> Tensor:
        return self.on_x(at.through_posterior(at.reward(), self.posterior), at)


@dataclass(frozen=True, kw_only=True)
class CleanReward:
    """grad over x of r(x) on the clean sample, as Diff-Instruct++ has it.

    Attributes:
        model: a reward by name, or an import path, "my_rewards.py:brightness".
        weight: factor on the whole term.
        bound: how long the term may be beside the terms that have no bound.
    """

    levels = None  # on the clean sample

    model: str = "nano-reward"
    weight: NotNegative = 1.0
    bound: Bound = field(default_factory=Bound)

    def direction(self, at: View) -> Tensor:
        return clean_alignment(at.reward(), at.x) * self.weight


class Term(Protocol):
    """A direction on x, with its settings.

    The engine looks for further attributes by name: `guidance`, `bound`, `posterior`; `teacher`, `also` and `models` of
    a term that reads further teachers; `model` of a reward's; `module`, `loss`, `optimiser`, `clip` and
    `reads_features` of one with a network of its own.
    """

    @property
    def levels(self) -> Levels | None:
        """The noise levels it is taken at; None for a term on the clean sample."""
        ...

    def direction(self, at: Any) -> Tensor:
        """Ascent direction on x [B, ...], detached, weight and lambda_t included."""
        ...


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
