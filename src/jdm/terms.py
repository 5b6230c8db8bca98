"""Terms: directions in which the student's samples ascend, each with the settings that are its own.

A term owns its weight, its noise levels, its lambda_t and normaliser, and says by base classes what else it brings.
Terms on x_t are score-like: they reach x times alpha_t lambda_t, in `NoisyTerm.on_x` alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor, nn

from jdm.directions import (
    LambdaT,
    cfg_augmentation,
    clean_alignment,
    cosine,
    distribution_matching,
    lambda_t,
    mean_error,
    mixed,
)
from jdm.levels import Bound, Levels
from jdm.posterior import ConsistencyPosterior, FakePosterior, FrozenPosterior
from jdm.ranges import NotNegative, Positive, Share, Whole
from jdm.run import Optimiser
from jdm.score import Estimate

Normaliser = Literal["real", "fake", "none"]
AnyPosterior = ConsistencyPosterior | FakePosterior | FrozenPosterior


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


class Term(Protocol):
    """A direction on x, with its settings."""

    @property
    def levels(self) -> Levels | None:
        """The noise levels it is taken at; None for a term on the clean sample."""
        ...

    def direction(self, at: Any) -> Tensor:
        """Ascent direction on x [B, ...], detached, weight and lambda_t included."""
        ...


@dataclass(frozen=True, kw_only=True)
class CleanTerm:
    """A term on the clean sample x.

    Attributes:
        weight: factor on the whole term.
    """

    levels = None

    weight: NotNegative = 1.0


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


# What a term may bring


@dataclass(frozen=True, kw_only=True)
class Bounded:
    """A term that is never much longer than the others.

    Attributes:
        bound: how long the term may be beside the terms that have no bound.
    """

    bound: Bound = field(default_factory=Bound)


@dataclass(frozen=True, kw_only=True)
class ThroughPosterior:
    """A term that reads samples of p(x | x_t).

    Attributes:
        posterior: source of samples of p(x | x_t), and how it is trained.
    """

    posterior: AnyPosterior = field(default_factory=ConsistencyPosterior)


@dataclass(frozen=True, kw_only=True)
class Rewarded:
    """A term that climbs a reward.

    Attributes:
        model: a reward by name, or an import path, "my_rewards.py:brightness".
    """

    model: str = "nano-reward"


@dataclass(frozen=True, kw_only=True)
class OfTeachers:
    """A term that reads the teacher, and may read others.

    Attributes:
        also: further teachers of the same latents with their shares; the first has what is left of 1.
    """

    also: tuple[tuple[str, Share], ...] = ()

    @property
    def others(self) -> list[str]:
        """Names of the models it reads beside the run's teacher."""
        return [name for name, _ in self.also]


@dataclass(frozen=True, kw_only=True)
class Guided:
    """A term that reads the teacher under classifier-free guidance.

    Attributes:
        guidance: w of the teacher, uncond + w (cond - uncond); 1 is none.
    """

    guidance: NotNegative = 2.0


@dataclass(frozen=True, kw_only=True)
class WithModule(ABC):
    """A term with a network of its own, which a phase of its own trains; a base class of a `CleanTerm` or `NoisyTerm`.

    Attributes:
        optimiser: trains the network.
        clip: bound on the norm of the network's gradient.
    """

    reads_features: ClassVar[bool] = False  # whether `module` asks for the widths of the teacher's features

    optimiser: Optimiser = field(default_factory=lambda: Optimiser(lr=1e-4, betas=(0.0, 0.95)))
    clip: Positive = 1.0

    @abstractmethod
    def module(self, networks: Any) -> nn.Module:
        """Makes the network, given `methods.networks.Networks`."""
        ...

    @abstractmethod
    def loss(self, at: Any) -> Tensor:
        """What the network descends; scalar."""
        ...


# The papers' terms


@dataclass(frozen=True, kw_only=True)
class Fidelity(Guided, OfTeachers, NoisyTerm):
    """s_real(x_t | y) - s_fake(x_t | y): distribution matching, blind to the control (JDM Eq. 5)."""

    def direction(self, at: View) -> Tensor:
        others = [(at.real(self.guidance, name), share) for name, share in self.also]
        real, fake = mixed(at.real(self.guidance), others), at.fake()
        at.log(cos_real_fake=cosine(real.eps, fake.eps))
        return self.on_x(distribution_matching(real, fake), at)


@dataclass(frozen=True, kw_only=True)
class CFGAugmentation(OfTeachers, NoisyTerm):
    """s(x_t | y) - s(x_t) of a teacher: JDM's decoupled guidance (Sec. 3.1) and Decoupled DMD's CA term.

    Its weight is w - 1 beside a fidelity term that sees the prompt, and w beside one that does not.

    Attributes:
        teacher: another teacher of the same latents, with its own text encoder and schedule; empty for the run's own.
    """

    teacher: str = ""

    @property
    def others(self) -> list[str]:
        return [name for name in (self.teacher, *super().others) if name]

    def direction(self, at: View) -> Tensor:
        pairs = [(at.guidance_pair(name), share) for name, share in self.also]
        cond, uncond = (mixed(own, [(pair[k], share) for pair, share in pairs])
                        for k, own in enumerate(at.guidance_pair(self.teacher)))
        return self.on_x(cfg_augmentation(cond, uncond), at)


@dataclass(frozen=True, kw_only=True)
class Condition(ThroughPosterior, Bounded, NoisyTerm):
    """grad over x_t of log p(c | x_t): the condition term of JDM Eq. 5, through a posterior (Eqs. 7-8).

    Attributes:
        draws: samples of p(x | x_t) in Eq. 7's integral; 0 is the plug-in f(x_t) alone, the paper's one sample.
        reference: compare with the picture that c came from, where the control can; False uses c alone.
    """

    draws: Whole = 0
    reference: bool = True

    def direction(self, at: View) -> Tensor:
        return self.on_x(at.through_posterior(at.likelihood(self.reference), self.posterior, self.draws), at)


@dataclass(frozen=True, kw_only=True)
class CleanCondition(Bounded, CleanTerm):
    """grad over x of log p(c | x) on the clean sample: JDM's ablation without p(c | x_t).

    Attributes:
        reference: compare with the picture that c came from, where the control can; False uses c alone.
    """

    reference: bool = True

    def direction(self, at: View) -> Tensor:
        return clean_alignment(at.likelihood(self.reference), at.x) * self.weight


@dataclass(frozen=True, kw_only=True)
class Reward(ThroughPosterior, Bounded, Rewarded, NoisyTerm):
    """grad over x_t of r(f(x_t)): human-feedback learning on the noisy posterior (JDM Eq. 9)."""

    def direction(self, at: View) -> Tensor:
        return self.on_x(at.through_posterior(at.reward(), self.posterior), at)


@dataclass(frozen=True, kw_only=True)
class CleanReward(Bounded, Rewarded, CleanTerm):
    """grad over x of r(x) on the clean sample, as Diff-Instruct++ has it."""

    def direction(self, at: View) -> Tensor:
        return clean_alignment(at.reward(), at.x) * self.weight
