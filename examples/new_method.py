"""A new method: one declaration. This one is DMD2 in one step (arXiv 2405.14867): guided matching and a GAN."""

from dataclasses import dataclass, field, replace

from jdm.methods.declared import Declared
from jdm.methods.engine import Distillation
from jdm.methods.networks import Fake, Student
from jdm.recipes import find
from jdm.regularisers import Adversarial
from jdm.run import Run
from jdm.terms import Fidelity


@dataclass(frozen=True)
class DMD2(Declared):
    """Grad = guided distribution matching, divided by mean|x0_real - x|, + 1e-3 grad log sigmoid D(x_t).

    Attributes:
        student: the generator that is trained.
        fake: the score of the student's samples, updated five times a step.
        matching: distribution matching.
        adversarial: the discriminator's term, which brings heads and a phase of its own.
    """

    student: Student = field(default_factory=Student)
    fake: Fake = field(default_factory=lambda: Fake(updates=5))
    matching: Fidelity = field(default_factory=lambda: Fidelity(guidance=1.75))
    adversarial: Adversarial = field(default_factory=lambda: Adversarial(weight=1e-3))

    def distillation(self) -> Distillation:
        terms = {"matching": self.matching, "adversarial": self.adversarial}
        return Distillation("dmd2", self.student, self.fake, terms)


def recipe() -> Run:
    """nano-diff-instruct's budget and rates with five updates of the fake score a step."""
    run = find("nano-diff-instruct")()
    return replace(run, method=DMD2(student=run.method.student, fake=replace(run.method.fake, updates=5)))
