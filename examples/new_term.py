"""A new term: one class. This one is Decoupled DMD's steady regulariser (arXiv 2511.22677), beside JDM's two terms."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from jdm.methods.engine import Distillation
from jdm.methods.jdm import JDM
from jdm.recipes import find
from jdm.run import Run
from jdm.terms import clean_alignment


@dataclass(frozen=True, kw_only=True)
class MeanVariance:
    """Descends KL( N(mean of x, variance of x) || N(mean, variance) ) of each sample x, over all its components.

    Attributes:
        weight: factor on the whole term.
        mean: the mean to keep; 0.075 is SDXL's.
        variance: the variance to keep; 0.81 is SDXL's.
    """

    levels = None  # on the clean sample

    weight: float = 1.0
    mean: float = 0.075
    variance: float = 0.81

    def direction(self, at: Any) -> Tensor:
        return clean_alignment(lambda x: -self.divergence(x), at.x) * self.weight

    def divergence(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x.flatten(1), dim=1, correction=0)
        ratio = (variance + (mean - self.mean) ** 2) / self.variance
        return 0.5 * (ratio - 1 - (variance / self.variance).log())


@dataclass(frozen=True)
class SteadyJDM(JDM):
    """JDM with the regulariser.

    Attributes:
        steady: the third term.
    """

    steady: MeanVariance = field(default_factory=MeanVariance)

    def distillation(self) -> Distillation:
        declared = super().distillation()
        return replace(declared, terms={**declared.terms, "steady": self.steady})


def recipe() -> Run:
    """nano-canny with the regulariser."""
    run = find("nano-canny")()
    return replace(run, method=SteadyJDM(**vars(run.method)))
