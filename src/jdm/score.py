"""Score models: a network's output read as eps, x0, v or score, and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor, nn

from jdm.errors import UsageError
from jdm.schedule import NoiseSchedule, matched, precise

Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]
PREDICTIONS = get_args(Prediction)
Prompts = Sequence[str]
Net = TypeVar("Net", bound=Callable[..., Tensor])
# What a network reads of the prompts: hidden states [B, L, D], with whatever else its family was trained on.
Text = Tensor | tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Estimate:
    """A score model's estimate of x_t = alpha x0 + sigma eps, in every reading; all float32, or float64 where x_t is.

    The network's own output is kept, and each reading is taken from it by the formula that stays finite: at alpha = 0
    and sigma = 0 from v_prediction and flow, where epsilon has no x0 at alpha = 0 and sample no eps at sigma = 0.

    Attributes:
        output: eps, v = alpha eps - sigma x0, x0, or the flow's velocity eps - x0, as `prediction` says.
        alpha, sigma: broadcast over x_t; their sum is 1 for a flow, that of their squares for the others.
    """

    x_t: Tensor
    output: Tensor
    alpha: Tensor
    sigma: Tensor
    prediction: Prediction = "epsilon"

    def __post_init__(self):
        if self.prediction not in PREDICTIONS:
            raise UsageError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {self.prediction!r}")

    @property
    def x0(self) -> Tensor:
        if self.prediction == "sample":
            return self.output
        if self.prediction == "v_prediction":
            return self.alpha * self.x_t - self.sigma * self.output
        if self.prediction == "flow":
            return self.x_t - self.sigma * self.output
        return (self.x_t - self.sigma * self.output) / self.alpha

    @property
    def eps(self) -> Tensor:
        if self.prediction == "sample":
            return (self.x_t - self.alpha * self.output) / self.sigma
        if self.prediction == "v_prediction":
            return self.alpha * self.output + self.sigma * self.x_t
        if self.prediction == "flow":
            return self.x_t + self.alpha * self.output
        return self.output

    @property
    def score(self) -> Tensor:
        """-eps / sigma, the gradient of log p(x_t)."""
        return -self.eps / self.sigma

    @property
    def v(self) -> Tensor:
        """alpha eps - sigma x0."""
        return self.output if self.prediction == "v_prediction" else self.alpha * self.eps - self.sigma * self.x0

    def read(self, prediction: Prediction) -> Tensor:
        """Converts the estimate to the output of a network of that prediction type."""
        if prediction == self.prediction:
            return self.output
        if prediction == "flow":
            return self.eps - self.x0
        return {"epsilon": self.eps, "v_prediction": self.v, "sample": self.x0}[prediction]

    def error(self, x0: Tensor, eps: Tensor, of: Literal["eps", "x0", "own"]) -> Tensor:
        """The estimate minus the truth: of eps, of x0, or of the network's own output."""
        if of == "eps":
            return self.eps - eps
        if of == "x0":
            return self.x0 - x0
        own = {"epsilon": lambda: eps, "sample": lambda: x0, "flow": lambda: eps - x0,
               "v_prediction": lambda: self.alpha * eps - self.sigma * x0}
        return self.output - own[self.prediction]()

    @classmethod
    def of(cls, output: Tensor, prediction: Prediction, x_t: Tensor, t: Tensor, schedule: NoiseSchedule) -> Estimate:
        """Read a raw network output [B, ...] in its own prediction type."""
        x_t = precise(x_t)
        return cls(x_t, precise(output), schedule.alpha(t, x_t), schedule.sigma(t, x_t), prediction)


class Score(Protocol):
    """Anything that estimates the score of x_t [B, ...] at t [B] for prompts y: networks and closed forms."""

    def __call__(self, x_t: Tensor, t: Tensor, y: Prompts | None = None) -> Estimate: ...


class ScoreModel(Generic[Net]):
    """A denoising network with its own schedule, prediction type, text encoder and guidance.

    Guidance follows Ho & Salimans: guided = uncond + w (cond - uncond), so w = 1 is none. Both halves go
    through the network in one batch.

    Args:
        net: (x_t, timestep, text [B, L, D]) -> output like x_t; a fourth argument where a control is given.
        text: prompts -> what the net reads of them; None for networks without a prompt.
    """

    def __init__(
        self,
        net: Net,
        schedule: NoiseSchedule,
        prediction: Prediction = "epsilon",
        text: Callable[[Prompts], Text] | None = None,
        guidance: float = 1.0,
    ):
        self.net, self.schedule = net, schedule
        self.prediction: Prediction = prediction
        self.text, self.guidance = text, guidance

    def __call__(self, x_t: Tensor, t: Tensor, y: Prompts | None = None, control: Tensor | None = None) -> Estimate:
        return self._estimate(x_t, t, self._embed(y), control)

    def conditional_and_unconditional(
        self, x_t: Tensor, t: Tensor, y: Prompts, control: Tensor | None = None
    ) -> tuple[Estimate, Estimate]:
        """The two halves of guidance, in one batched pass; a control image serves both."""
        text = self._embed([*y, *[""] * len(y)])
        control = None if control is None else torch.cat([control, control])
        both = self._estimate(torch.cat([x_t, x_t]), torch.cat([t, t]), text, control)
        return _half(both, 0), _half(both, 1)

    def guided(self, x_t: Tensor, t: Tensor, y: Prompts, control: Tensor | None = None) -> Estimate:
        """uncond + w (cond - uncond); one plain pass where w = 1."""
        if self.guidance == 1.0:
            return self(x_t, t, y, control)
        cond, uncond = self.conditional_and_unconditional(x_t, t, y, control)
        return replace(cond, output=uncond.output + self.guidance * (cond.output - uncond.output))

    def guidance_on(self, schedule: NoiseSchedule, x_t: Tensor, t: Tensor, y: Prompts) -> tuple[Estimate, Estimate]:
        """The two halves of guidance for an x_t of another schedule, read at that schedule's (alpha, sigma).

        Two schedules meet at equal signal-to-noise ratio: the network sees x_t rescaled to its own alpha there. Its
        levels are discrete, so the ratios agree to half a level.
        """
        alpha, sigma = schedule.alpha(t, x_t), schedule.sigma(t, x_t)
        own = matched(self.schedule, schedule, t)
        scale = self.schedule.alpha(own, x_t) / alpha
        cond, uncond = (Estimate(precise(x_t), e.eps, alpha, sigma)
                        for e in self.conditional_and_unconditional(x_t * scale, own, y))
        return cond, uncond

    def parameters(self) -> list[nn.Parameter]:
        return list(self.net.parameters()) if isinstance(self.net, nn.Module) else []

    def _embed(self, y: Prompts | None) -> Text | None:
        return None if self.text is None or y is None else self.text(y)

    def _estimate(self, x_t: Tensor, t: Tensor, text: Text | None, control: Tensor | None) -> Estimate:
        extra = () if control is None else (control,)
        output = self.net(x_t, self.schedule.timestep(t), text, *extra)
        return Estimate.of(output, self.prediction, x_t, t, self.schedule)


def _half(both: Estimate, k: int) -> Estimate:
    parts = {name: getattr(both, name).chunk(2)[k] for name in ("x_t", "output", "alpha", "sigma")}
    return replace(both, **parts)
