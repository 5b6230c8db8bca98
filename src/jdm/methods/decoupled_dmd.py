"""Decoupled DMD (arXiv 2511.22677): a few-step student by CFG augmentation and distribution matching."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jdm.levels import RENOISING
from jdm.methods.declared import Declared
from jdm.methods.engine import Distillation
from jdm.methods.networks import Fake, Student
from jdm.regularisers import MMD, Adversarial, Anchor, MeanVariance
from jdm.terms import CFGAugmentation, Fidelity

DM, CA = RENOISING["decoupled-hybrid"]


@dataclass(frozen=True)
class DecoupledDMD(Declared):
    """Grad = lambda_t [ s_real(x_t|y) - s_fake(x_t|y) ] + (alpha - 1) lambda_t' [ s_real(x_t'|y) - s_real(x_t') ].

    Algorithm 1: a level and noise of its own for each branch, one lambda_t (x0's), no normaliser, and a fake score that
    is trained in x0. alpha is w of uncond + w (cond - uncond). Paper: no rate, alpha or batch is printed.

    Not the paper's, but found in other code: a normaliser of each branch (`normaliser` real is mean|x0_real(y) - x|, at
    least 0.1), and a warm-up of the fake score (`fake.warm_up`, 50 to 100 steps).

    Attributes:
        student: the generator that is trained, on its own intermediate samples.
        fake: the score of the student's samples.
        matching: DM, at any level in the paper's best schedule (decoupled-hybrid); None for CA alone.
        augmentation: CA with weight alpha - 1, at levels cleaner than the generator's input; None for DM alone.
        regulariser: in place of DM, or beside it.
        anchor: DP-DMD's first step, for diversity over z; not this paper's.
    """

    student: Student = field(default_factory=lambda: Student(levels=(999, 749, 499, 249)))
    fake: Fake = field(default_factory=lambda: Fake(loss="x0"))
    matching: Fidelity | None = field(default_factory=lambda: Fidelity(guidance=1.0, normaliser="none", levels=DM))
    augmentation: CFGAugmentation | None = field(default_factory=lambda: CFGAugmentation(normaliser="none", levels=CA))
    regulariser: MeanVariance | Adversarial | MMD | None = None
    anchor: Anchor | None = None

    def distillation(self) -> Distillation:
        fields = ("matching", "augmentation", "regulariser", "anchor")
        terms: dict[str, Any] = {name: getattr(self, name) for name in fields if getattr(self, name) is not None}
        return Distillation("decoupled-dmd", self.student, self.fake if self.matching else None, terms)
