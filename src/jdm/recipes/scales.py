"""The scales that recipes are laid over: nano-sd on a CPU, and Stable Diffusion 1.5 on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jdm.levels import RENOISING, Bound, Levels
from jdm.methods.diff_instruct import DiffInstruct
from jdm.methods.jdm import JDM
from jdm.methods.networks import Branch, Fake, Student
from jdm.methods.text_to_image import TextToImage
from jdm.posterior import ConsistencyPosterior
from jdm.run import Data, Optimiser, Run
from jdm.terms import CFGAugmentation, Condition, Fidelity

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SD21 = "stabilityai/stable-diffusion-2-1-base"
OWN = Levels(0.02, 0.98, "condition")  # a level and noise of the condition term's own
FOUR = (999, 749, 499, 249)  # the levels of a student of four steps
LOW = Levels(0.02, 0.3, "condition")  # the levels at which the posterior's one sample points the right way


@dataclass(frozen=True)
class Scale:
    """The part of a recipe that its scale decides: the teacher, its rates, and the models it starts from.

    Attributes:
        name: prefix of the recipes' names.
        run: (name, method) -> Run with the scale's budget for one row of a table.
        student: optimiser of a backbone.
        fake: optimiser of a fake score or a posterior.
        control: optimiser of a ControlNet.
        adapter: optimiser of a ControlNet on a frozen generator, in methods without distribution matching.
        guidance: guidance of the real score.
        fake_rank: rank of the fake score's LoRA; 0 for a full copy.
        bound: bound of the condition term in phase 1.
        student_folder: the phase-1 student whose backbone is shared.
        generator: the one-step generator without control.
        controlnet: the multi-step model with a ControlNet.
        guide: the teacher whose guidance is lent.
        text_teacher: the teacher of text-to-image students.
        text_guidance: w of text-to-image students.
        reward: the reward that is climbed.
        shared: the control of phase 2, unless another is asked for.
        prompted: the control of image prompts, with its encoder.
    """

    name: str
    run: Callable[..., Run]
    student: Optimiser
    fake: Optimiser
    control: Optimiser
    adapter: Optimiser
    guidance: float
    fake_rank: int
    bound: Bound
    student_folder: str
    generator: str
    controlnet: str
    guide: str
    text_teacher: str
    text_guidance: float
    reward: str
    shared: str
    prompted: str

    def jdm(self, condition: Any = None, **changes: Any) -> JDM:
        """JDM at the scale's rates."""
        method = JDM(student=Student(optimiser=self.student), controlnet=Branch(optimiser=self.control),
                     fake=self.fakes(), fidelity=Fidelity(guidance=self.guidance),
                     condition=condition or self.condition())
        return replace(method, **changes)

    def condition(self, **changes: Any) -> Condition:
        """The condition term of phase 1."""
        return replace(Condition(bound=self.bound, posterior=ConsistencyPosterior(optimiser=self.fake)), **changes)

    def frozen(self, start: str, trains: bool = False, **changes: Any) -> JDM:
        """JDM for a ControlNet alone on the frozen backbone of `start`, or with the backbone trained on.

        A frozen backbone draws well already, so that the control may weigh more. Levels, weight and bound are the best
        of nine short runs on nano-sd's validation pictures (docs/log.md).

        Args:
            changes: fields of the condition term to change.
        """
        condition = self.condition(**{"weight": 4.0, "levels": LOW, "normaliser": "fake", "bound": Bound(2.0, 0.8),
                                      **changes})
        return self.jdm(condition, student=Student(start=start, optimiser=self.student if trains else None))

    def hybrid(self, method: JDM) -> JDM:
        """The method in four steps, its guidance apart at levels cleaner than the generator's input."""
        augmentation = CFGAugmentation(weight=self.guidance - 1, levels=RENOISING["decoupled-hybrid"][1])
        return replace(method, student=replace(method.student, levels=FOUR), augmentation=augmentation,
                       fidelity=replace(method.fidelity, guidance=1.0))

    def fakes(self, **changes: Any) -> Fake:
        """The fake score at the scale's rate."""
        return replace(Fake(rank=self.fake_rank, optimiser=self.fake), **changes)

    def diff_instruct(self, **changes: Any) -> DiffInstruct:
        """Diff-Instruct at the scale's rates. `changes` are of the fidelity term."""
        return DiffInstruct(student=Student(optimiser=self.student), fake=self.fakes(),
                            fidelity=replace(Fidelity(guidance=self.guidance), **changes))

    def text(self, guide: str = "", reward: Any = None, blind: bool = False) -> TextToImage:
        """A text-to-image student at the scale's rates."""
        w = self.text_guidance if blind else self.text_guidance - 1
        return TextToImage(student=Student(optimiser=self.student), fake=self.fakes(prompt=not blind),
                           guidance=CFGAugmentation(teacher=guide, weight=w), reward=reward)

    def model(self, recipe: str) -> str:
        """The folder that another recipe of this scale leaves its model in."""
        return f"runs/{self.name}-{recipe}/model"


def _nano(name: str, method: Any, **changes: Any) -> Run:
    # One budget for every row of a table: samples and updates, not seconds.
    run = Run(method=method, out=Path("runs") / name, steps=1500, batch=32, ema=0.999, probe_every=500)
    return replace(run, **changes)


def _sd15(name: str, method: Any, **changes: Any) -> Run:
    # Paper: no batch is printed, its group's are 256 and, for a ControlNet, 128; here: 16, for one 80 GB GPU with room
    # to spare; --accumulate or more processes raise it. Paper: no number of steps; here: a budget to be raised. EMA
    # .9999 is the group's.
    run = Run(method=method, out=Path("runs") / name, model=SD15, data=Data(source="my_pictures", size=512),
              steps=30_000, batch=16, ema=0.9999, device="cuda", precision="bf16", checkpointing=True, save_every=1000)
    return replace(run, **{k: v for k, v in changes.items() if k not in ("model", "steps", "probe_every")})


# Rates for a UNet of 3M parameters, chosen on validation pictures (docs/log.md).
NANO = Scale(
    "nano", _nano, student=Optimiser(lr=1e-4, betas=(0.0, 0.95)), fake=Optimiser(lr=5e-4, betas=(0.0, 0.95)),
    control=Optimiser(lr=2e-3, betas=(0.9, 0.95)), adapter=Optimiser(lr=2e-3, betas=(0.9, 0.95)), guidance=2.0,
    fake_rank=0, bound=Bound(0.3, 0.8), student_folder="nano-canny", generator="nano-diff-instruct",
    controlnet="nano-controlnet", guide="nano-sd", text_teacher="runs/nano-weak-teacher/model", text_guidance=2.0,
    reward="nano-reward", shared="soft-edge", prompted="image-prompt")

# Paper: no rate is printed; here: those of the same group's nearest work, with its fake score five times faster.
# Paper: no guidance is printed; here: 4.5, at which SiD-LSG's one-step SD1.5 follows prompts best; FID is better at
# 1.5. Paper: a fake score is a copy of the UNet; here: a LoRA of the frozen one, which on nano-sd costs nothing at
# ranks 8 to 128 (docs/scale.md) and saves 8 GiB. Paper: no level at which the student runs is printed; here: 625
# (Student.levels), where sigma / alpha = 2.5, because at the group's other value, 799, an error in eps weighs twice as
# much: 5.1.
SD15_SCALE = Scale(
    "sd15", _sd15, student=Optimiser(lr=2e-6, betas=(0.0, 0.95)), fake=Optimiser(lr=1e-5, betas=(0.0, 0.95)),
    control=Optimiser(lr=1e-5, betas=(0.9, 0.95)), adapter=Optimiser(lr=1e-5, betas=(0.9, 0.95)), guidance=4.5,
    fake_rank=64, bound=Bound(1.0, 1.0), student_folder="runs/sd15-canny/model",
    generator="runs/sd15-diff-instruct/model", controlnet="runs/sd15-controlnet/model", guide=SD21, text_teacher=SD15,
    text_guidance=4.5, reward="image-reward", shared="depth", prompted="image-prompt:openai/clip-vit-large-patch14")

SCALES = {scale.name: scale for scale in (NANO, SD15_SCALE)}
