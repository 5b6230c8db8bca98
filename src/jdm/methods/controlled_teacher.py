"""What JDM argues against (Eq. 2): train a controlled teacher first, then distil it with a controlled fake score."""

from __future__ import annotations

from dataclasses import dataclass, field

from jdm.errors import UsageError
from jdm.loading import Loaded
from jdm.methods.declared import Declared
from jdm.methods.engine import Distillation
from jdm.methods.networks import Branch, Fake, Student
from jdm.run import Optimiser, Task
from jdm.terms import Fidelity


@dataclass(frozen=True)
class ControlledTeacher(Declared):
    """Grad = alpha_t lambda_t [ s_real(x_t | y, c) - s_fake(x_t | y, c) ]  (JDM Eq. 2).

    Its cost is that of both stages: the multi-step ControlNet's training, then this one.

    Attributes:
        teacher: a multi-step model with a ControlNet for this control; real, fake and student start from it, and
            distances are measured to the run's model.
        control: a control by name, or an import path, "my_controls.py:Posterize".
        student: the generator that is trained.
        controlnet: the student's ControlNet, which begins as the teacher's.
        fake: the score of the student's samples, with a ControlNet that begins as the teacher's.
        fidelity: the one term.
    """

    teacher: str = "nano-controlnet"
    control: str = "canny"
    student: Student = field(default_factory=Student)
    controlnet: Branch = field(default_factory=Branch)
    fake: Fake = field(default_factory=lambda: Fake(controlnet=Optimiser(lr=1e-5, betas=(0.0, 0.95))))
    fidelity: Fidelity = field(default_factory=Fidelity)

    def distillation(self) -> Distillation:
        return Distillation("controlled-teacher", self.student, self.fake, {"fidelity": self.fidelity}, self.control,
                            self.controlnet, self.teacher)

    def task(self, loaded: Loaded) -> Task:
        if loaded.teacher.controlnet is None or loaded.teacher.levels is not None:
            raise UsageError(f"{self.teacher} is not a multi-step model with a ControlNet; train one first: jdm train "
                             "nano-controlnet")
        return super().task(loaded)
