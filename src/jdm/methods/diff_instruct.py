"""Diff-Instruct (arXiv 2305.18455): JDM's fidelity term and nothing else (JDM Eq. 2)."""

from __future__ import annotations

from dataclasses import dataclass, field

from jdm.methods.declared import Declared
from jdm.methods.engine import Distillation
from jdm.methods.networks import Branch, Fake, Student
from jdm.terms import Fidelity


@dataclass(frozen=True)
class DiffInstruct(Declared):
    """Grad = alpha_t lambda_t [ s_real(x_t) - s_fake(x_t) ]: a student without control.

    Attributes:
        student: the generator that is trained.
        fake: the score of the student's samples.
        fidelity: the one term.
    """

    student: Student = field(default_factory=Student)
    fake: Fake = field(default_factory=Fake)
    fidelity: Fidelity = field(default_factory=Fidelity)

    def distillation(self) -> Distillation:
        return Distillation("diff-instruct", self.student, self.fake, {"fidelity": self.fidelity})


@dataclass(frozen=True)
class ImplicitVSD(Declared):
    """Diff-Instruct with a ControlNet that sees c, without any term for the control (JDM Eq. 12).

    Attributes:
        control: a control by name, or an import path, "my_controls.py:Posterize".
        student: the generator that is trained.
        controlnet: the student's ControlNet.
        fake: the score of the student's samples.
        fidelity: the one term.
    """

    control: str = "canny"
    student: Student = field(default_factory=Student)
    controlnet: Branch = field(default_factory=Branch)
    fake: Fake = field(default_factory=Fake)
    fidelity: Fidelity = field(default_factory=Fidelity)

    def distillation(self) -> Distillation:
        return Distillation("diff-instruct", self.student, self.fake, {"fidelity": self.fidelity}, self.control,
                            self.controlnet)
