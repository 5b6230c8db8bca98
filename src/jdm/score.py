"""Score models: one network output read as eps, x0, v or score, and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from jdm.errors import UsageError
from jdm.schedule import NoiseSchedule, precise

Prediction = Literal["epsilon", "v_prediction", "sample"]
Prompts = Sequence[str]
Net = TypeVar("Net", bound=Callable[..., Tensor])
# What a network reads of the prompts: hidden states [B, L, D], with whatever else its family was trained on.
Text = Tensor | tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Estimate:
    """What a score model says of x_t, in the four usual readings; all float32.

    eps is stored; x0 = (x_t - sigma eps) / alpha, score = -eps / sigma, v = alpha eps - sigma x0.
    """

    x_t: Tensor
    eps: Tensor
    alpha: Tensor
    sigma: Tensor

    @property
    def x0(self) -> Tensor:
        return (self.x_t - self.sigma * self.eps) / self.alpha

    @property
    def score(self) -> Tensor:
        return -self.eps / self.sigma

    @property
    def v(self) -> Tensor:
        return self.alpha * self.eps - self.sigma * self.x0

    @classmethod
    def of(cls, output: Tensor, prediction: Prediction, x_t: Tensor, t: Tensor, schedule: NoiseSchedule):
        """Read a raw network output [B, ...] in its own prediction type."""
        x_t, output = precise(x_t), precise(output)
        alpha, sigma = schedule.alpha(t, x_t), schedule.sigma(t, x_t)
        if prediction == "epsilon":
            eps = output
        elif prediction == "v_prediction":
            eps = alpha * output + sigma * x_t
        elif prediction == "sample":
            eps = (x_t - alpha * output) / sigma
        else:
            raise UsageError(f"prediction must be epsilon, v_prediction or sample, got {prediction!r}")
        return cls(x_t, eps, alpha, sigma)


class Score(Protocol):
    """Anything that estimates the score of x_t [B, ...] at t [B] for prompts y: networks and closed forms."""

    def __call__(self, x_t: Tensor, t: Tensor, y: Prompts | None = None) -> Estimate: ...


class ScoreModel(Generic[Net]):
    """A denoising network with its own schedule, prediction type, text encoder and guidance.

    Guidance follows Ho & Salimans: guided = uncond + w (cond - uncond), so w = 1 is none. Both halves go
    through the network in one batch.

    Args:
        net: (x_t, index, text [B, L, D]) -> output like x_t; a fourth argument where a control is given.
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
        eps = uncond.eps + self.guidance * (cond.eps - uncond.eps)
        return Estimate(cond.x_t, eps, cond.alpha, cond.sigma)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.net.parameters()) if isinstance(self.net, nn.Module) else []

    def _embed(self, y: Prompts | None) -> Text | None:
        return None if self.text is None or y is None else self.text(y)

    def _estimate(self, x_t: Tensor, t: Tensor, text: Text | None, control: Tensor | None) -> Estimate:
        extra = () if control is None else (control,)
        output = self.net(x_t, self.schedule.index(t), text, *extra)
        return Estimate.of(output, self.prediction, x_t, t, self.schedule)


def _half(both: Estimate, k: int) -> Estimate:
    return Estimate(*(f.chunk(2)[k] for f in (both.x_t, both.eps, both.alpha, both.sigma)))
