"""The parts of a step that regularisers and their modules read, beside its sample and the estimates of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jdm.methods.networks import Networks
from jdm.terms import Term

if TYPE_CHECKING:
    from jdm.methods.engine import Distillation
    from jdm.methods.step import Step


class Material:
    """A step at one term's noise levels: real pictures, the teacher's features and samples, a term's module.

    Attributes:
        of: the distillation whose step it is.
        t: the levels [B], where the term has any.
    """

    t: Tensor

    def __init__(self, step: Step, networks: Networks, of: Distillation):
        self.step, self.networks, self.of, self.y = step, networks, of, step.y
        self._known: dict[Any, Any] = {}

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """A value at these levels, computed without gradient where it is first asked for."""
        if key not in self._known:
            with torch.no_grad():
                self._known[key] = compute()
        return self._known[key]

    @property
    def first(self) -> bool:
        """Whether x is the output of the student's first step."""
        return self.step.last == 0

    def module(self, term: Term) -> nn.Module:
        """The module that this term brings."""
        return self.networks.parts[next(name for name, t in self.of.terms.items() if t is term)]

    def features(self, x_t: Tensor) -> list[Tensor]:
        """The teacher's features of an x_t at this t, differentiable in it."""
        return self.networks.references.features(x_t, self.t, self.y)

    def pictures(self) -> Tensor:
        """x of the step's real pictures."""
        return self.once("pictures", lambda: self.networks.teacher.space.encode(2 * self.step.images - 1))

    def noised(self, x: Tensor, name: str) -> Tensor:
        """x_t of another x at this t, with noise of that name."""
        return self.networks.schedule.noised(x, self.t, self.step.noise.normal(f"eps/{name}", x.shape))

    def teacher_samples(self, steps: int, guidance: float, n: int | None = None, taken: int | None = None) -> Tensor:
        """x0 of the teacher after `taken` of `steps` DDIM steps, from the first n of the student's z and prompts."""
        return self.networks.references.sampled(self.step.z[:n], self.y[:n], steps, guidance, taken)

    def data_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of the data's components."""
        return self.networks.references.moments
