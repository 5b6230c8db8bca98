"""A new method: one declaration. This one is Decoupled DMD in one step (arXiv 2511.22677)."""

from dataclasses import dataclass, field, replace

from jdm.levels import Levels
from jdm.methods.engine import Declared, Distillation
from jdm.methods.networks import Fake, Student
from jdm.recipes import find
from jdm.run import Run
from jdm.terms import CFGAugmentation, Fidelity


@dataclass(frozen=True)
class DecoupledDMD(Declared):
    """Grad = DM at one noise level + (w - 1) CA at another, without a normaliser.

    Attributes:
        student: the generator that is trained.
        fake: the score of the student's samples.
        matching: distribution matching, at levels of its own.
        augmentation: CFG augmentation with weight w - 1, at levels of its own.
    """

    student: Student = field(default_factory=Student)
    fake: Fake = field(default_factory=Fake)
    matching: Fidelity = field(default_factory=lambda: Fidelity(guidance=1.0, normaliser="none"))
    augmentation: CFGAugmentation = field(default_factory=lambda: CFGAugmentation(
        normaliser="none", levels=Levels(0.02, 0.98, "augmentation")))

    def distillation(self) -> Distillation:
        terms = {"matching": self.matching, "augmentation": self.augmentation}
        return Distillation("decoupled-dmd", self.student, self.fake, terms)


def recipe() -> Run:
    """nano-diff-instruct's budget and rates with two noise schedules."""
    run = find("nano-diff-instruct")()
    return replace(run, method=DecoupledDMD(student=run.method.student, fake=run.method.fake))
