"""A new term: one class. This one keeps a student's components inside a range, beside JDM's two terms."""

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from jdm.methods.engine import Distillation
from jdm.methods.jdm import JDM
from jdm.recipes import find
from jdm.run import Run
from jdm.terms import clean_alignment


@dataclass(frozen=True, kw_only=True)
class InRange:
    """Descends the sum over components of max(0, |x| - limit)^2 of each sample x.

    Attributes:
        weight: factor on the whole term.
        limit: the largest size that costs nothing; latents have a standard deviation near 1.
    """

    levels = None  # on the clean sample

    weight: float = 0.1
    limit: float = 4.0

    def direction(self, at: Any) -> Tensor:
        return clean_alignment(lambda x: -self.excess(x), at.x) * self.weight

    def excess(self, x: Tensor) -> Tensor:
        return (x.abs() - self.limit).clamp(min=0).square().flatten(1).sum(1)


@dataclass(frozen=True)
class SteadyJDM(JDM):
    """JDM with the regulariser.

    Attributes:
        steady: the third term.
    """

    steady: InRange = field(default_factory=InRange)

    def distillation(self) -> Distillation:
        declared = super().distillation()
        return replace(declared, terms={**declared.terms, "steady": self.steady})


def recipe() -> Run:
    """nano-canny with the regulariser."""
    run = find("nano-canny")()
    return replace(run, method=SteadyJDM(**vars(run.method)))
