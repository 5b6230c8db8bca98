"""Text-to-image students: human-feedback learning and another teacher's guidance (JDM Secs. 3.1, 4.4, Eq. 9)."""

from __future__ import annotations

from dataclasses import dataclass, field

from jdm.methods.declared import Declared
from jdm.methods.engine import Distillation
from jdm.methods.networks import Fake, Student
from jdm.terms import CFGAugmentation, CleanReward, Fidelity, Reward


@dataclass(frozen=True)
class TextToImage(Declared):
    """Grad = alpha_t lambda_t [ s_real - s_fake + w (s'(x_t | y) - s'(x_t)) + grad r(f(x_t)) ].

    Attributes:
        student: the generator that is trained.
        fake: the score of the student's samples. Told no prompt, it makes fidelity blind to the prompt, which is Eq. 5
            to the letter; told it, the reading of Decoupled DMD.
        fidelity: the first term, without guidance of its own.
        guidance: the direction of a teacher's guidance; its weight is w where fidelity is blind and w - 1 elsewhere.
        reward: the reward's term; None for none.
    """

    student: Student = field(default_factory=Student)
    fake: Fake = field(default_factory=Fake)
    fidelity: Fidelity = field(default_factory=lambda: Fidelity(guidance=1.0))
    guidance: CFGAugmentation = field(default_factory=CFGAugmentation)
    reward: Reward | CleanReward | None = None

    def distillation(self) -> Distillation:
        terms = {"fidelity": self.fidelity, "guidance": self.guidance}
        rewarded = {} if self.reward is None else {"reward_direction": self.reward}
        return Distillation("jdm", self.student, self.fake, terms | rewarded)
