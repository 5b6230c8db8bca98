"""A new term: one class. This one keeps a student's components inside a range, beside JDM's two terms."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from jdm.directions import clean_alignment
from jdm.recipes import find
from jdm.run import Run
from jdm.terms import CleanTerm


@dataclass(frozen=True, kw_only=True)
class InRange(CleanTerm):
    """Descends the sum over components of max(0, |x| - limit)^2 of each sample x.

    Attributes:
        limit: the largest size that costs nothing; latents have a standard deviation near 1.
    """

    weight: float = 0.1
    limit: float = 4.0

    def direction(self, at: Any) -> Tensor:
        return clean_alignment(lambda x: -self.excess(x), at.x) * self.weight

    def excess(self, x: Tensor) -> Tensor:
        return (x.abs() - self.limit).clamp(min=0).square().flatten(1).sum(1)


def recipe() -> Run:
    """nano-canny with the regulariser."""
    run = find("nano-canny")()
    return replace(run, method=run.method.plus(steady=InRange()))
