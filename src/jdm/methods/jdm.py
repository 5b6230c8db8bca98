"""Joint Distribution Matching (arXiv 2503.06652): a one-step student learns a control its teacher never knew."""

from __future__ import annotations

from dataclasses import dataclass, field

from jdm.methods.declared import Declared
from jdm.methods.engine import Distillation
from jdm.methods.networks import Branch, Fake, Student
from jdm.terms import CFGAugmentation, CleanCondition, Condition, Fidelity


@dataclass(frozen=True)
class JDM(Declared):
    """Grad = alpha_t lambda_t [ grad log p(c | x_t) + s_real(x_t) - s_fake(x_t) ]  (Eq. 5), on one x_t.

    Attributes:
        control: a control by name, or an import path, "my_controls.py:Posterize".
        student: the generator that is trained.
        controlnet: the student's ControlNet.
        fake: the score of the student's samples. Blind to the control, it gives the paper's bound; with a ControlNet,
            the exact joint KL.
        fidelity: the first term.
        condition: the second. Equal levels give the paper's one x_t for both; levels of its own, two schedules.
        augmentation: Decoupled DMD's CFG augmentation beside them; None for none.
    """

    control: str = "canny"
    student: Student = field(default_factory=Student)
    controlnet: Branch = field(default_factory=Branch)
    fake: Fake = field(default_factory=Fake)
    fidelity: Fidelity = field(default_factory=Fidelity)
    condition: Condition | CleanCondition = field(default_factory=Condition)
    augmentation: CFGAugmentation | None = None

    def distillation(self) -> Distillation:
        terms = {"fidelity": self.fidelity, "condition": self.condition}
        augmented = {} if self.augmentation is None else {"augmentation": self.augmentation}
        return Distillation("jdm", self.student, self.fake, terms | augmented, self.control, self.controlnet)
