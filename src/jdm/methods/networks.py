"""The networks of a distillation around one teacher: student, fake score and posteriors, shared where they can be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from jdm.controls import Control
from jdm.errors import UsageError
from jdm.evaluation.evaluate import validation_probe
from jdm.evaluation.preview import preview
from jdm.evaluation.questions import Questions, answers, at_once
from jdm.evaluation.sampling import Sampler
from jdm.generator import Generator
from jdm.levels import refuse_empty
from jdm.loading import Loaded
from jdm.methods.previews import TEACHER, asked_pictures, guidance_of, many_steps
from jdm.methods.references import References
from jdm.models.adapters import Adapter, base_parameters
from jdm.models.execution import picture_by_picture
from jdm.models.family import Denoiser, Family, copied, placed, with_merged
from jdm.models.folder import save_pipeline
from jdm.models.text import TextEncoder
from jdm.posterior import ConsistencyPosterior, FakePosterior, FrozenPosterior, Posterior
from jdm.ranges import Count, Positive, Share, Whole
from jdm.rewards import Reward
from jdm.run import Optimiser, Product, Shown
from jdm.schedule import NoiseSchedule
from jdm.score import ScoreModel
from jdm.space import Space
from jdm.terms import AnyPosterior, WithModule

Groups = list[tuple[list[nn.Parameter], Optimiser]]


# Paper: no rate is printed; here: those of the same group's nearest work, for SD1.5. Smaller models raise them.
SLOW, FAST, CONTROL = Optimiser(2e-6, (0.0, 0.95)), Optimiser(1e-5, (0.0, 0.95)), Optimiser(1e-5, (0.9, 0.95))


@dataclass(frozen=True)
class Student:
    """The generator that is trained.

    Attributes:
        levels: level indices at which it denoises, falling; one level is a one-step generator. sigma / alpha is 2.5 at
            SD's 625.
        start: a generator at the same levels, whose backbone is the initial one; empty for the teacher's.
        rank: rank of a LoRA on the frozen initial backbone; 0 trains a full copy.
        optimiser: trains the backbone; None freezes it, and it must then be a generator's: phase 2 of the shared
            generator (JDM Sec. 3.2.1).
        clip: bound on the norm of the whole student's gradient, its ControlNet's included.
    """

    levels: tuple[Whole, ...] = (625,)
    start: str = ""
    rank: Whole = 0
    optimiser: Optimiser | None = SLOW
    clip: Positive = 1.0


@dataclass(frozen=True)
class Branch:
    """The student's ControlNet, which shows it the control (JDM Eq. 10).

    Attributes:
        start: a model or folder whose ControlNet is the initial one. If empty, the teacher's own where it has one, else
            a new one, whose zero convolutions change nothing at first.
        optimiser: trains the ControlNet.
    """

    start: str = ""
    optimiser: Optimiser = CONTROL


@dataclass(frozen=True)
class Fake:
    """The score of the student's own samples (JDM Eq. 6).

    Attributes:
        prompt: whether it, and with it the real score of the fidelity term, sees the prompt; False is Eq. 5 to the
            letter where the prompt itself is the condition.
        controlnet: trains a ControlNet of its own, through which it sees the control; None for a fake score that does
            not see the control, as in JDM.
        rank: rank of a LoRA on the teacher's frozen backbone; 0 trains a full copy.
        updates: updates per step of the student.
        low: smallest noise level it is trained at, in [0, 1].
        high: largest noise level it is trained at, in [0, 1].
        optimiser: trains the fake score.
        clip: bound on the norm of its whole gradient.
        loss: quantity whose error is measured: eps (JDM Eq. 6), x0 (Decoupled DMD), or own, the network's own output,
            for a flow: where little signal is left, its eps hardly depends on the velocity.
        warm_up: number of steps at the start of the run in which only the fake score is trained; from no paper.
    """

    prompt: bool = True
    controlnet: Optimiser | None = None
    rank: Whole = 0
    updates: Count = 1
    low: Share = 0.0
    high: Share = 1.0
    optimiser: Optimiser = FAST
    clip: Positive = 1.0
    loss: Literal["eps", "x0", "own"] = "eps"
    warm_up: Whole = 0

    def __post_init__(self):
        refuse_empty(self.low, self.high)


class Networks:
    """Teacher, student, fake score and posteriors; networks are shared wherever a LoRA makes a copy needless.

    Args:
        controlled: the teacher's own ControlNet is part of the real score, and student and fake begin with it.
        teacher_may_start: a frozen backbone may be the multi-step teacher's.

    Attributes:
        real: the teacher's denoiser.
        student: the student's denoiser, with its ControlNet where it has one.
        adapters: the LoRAs that train, by name: "student", "fake", "posterior".
        guides: scores of further teachers, by role.
        posteriors: by the settings they were made from.
        parts: modules that terms bring, by the term's name.
        references: what regularisers compare samples with (`methods.references`).
    """

    def __init__(self, loaded: Loaded, student: Student, branch: Branch | None = None, fake: Fake | None = None,
                 controlled: bool = False, teacher_may_start: bool = False):
        if student.optimiser is None and student.rank:
            raise UsageError(f"a frozen backbone has no LoRA to train; leave out --student.rank {student.rank}")
        if student.optimiser is None and not student.start and not teacher_may_start:
            raise UsageError("a frozen backbone must be a one-step generator's; name it with --student.start, such as "
                             "nano-canny")
        self.loaded, self.settings, self.teacher = loaded, student, loaded.teacher
        self.own = self.teacher.controlnet if controlled else None
        self.real = self.teacher.denoiser(self.teacher.backbone, self.own)
        self.references = References(loaded, self.real)
        self.parts: dict[str, nn.Module] = {}
        self.adapters: dict[str, Adapter] = {}
        self.guides: dict[str, ScoreModel] = {}
        self.posteriors: dict[AnyPosterior, Posterior | None] = {}
        first = loaded.student("start", student.levels).backbone if student.start else self.teacher.backbone
        self.student = self._denoiser("student", first, student.rank, student.optimiser is not None)
        if fake:
            net = self._denoiser("fake", self.teacher.backbone, fake.rank)
        if branch:
            self._add_controlnet(self.student, self._controlnet(branch.start, self.student.backbone))
        self._fake: ScoreModel[Denoiser] | None = None
        if fake:
            _ = loaded.decoder  # one that does not fit is found out first
            if fake.controlnet:
                self._add_controlnet(net, self._controlnet("", self.teacher.backbone))
            self._fake = self.teacher.score_of(self.text, net)

    def _denoiser(self, name: str, backbone: nn.Module, rank: int, trains: bool = True) -> Denoiser:
        """A LoRA of that name on the backbone itself, or a full copy of it."""
        if not rank:
            return self.teacher.denoiser(copied(backbone).requires_grad_(trains))
        self._add_adapter(name, backbone, rank)
        return self.teacher.denoiser(backbone, adapters=(self.adapters[name],))

    def _add_adapter(self, name: str, backbone: nn.Module, rank: int) -> None:
        with self.loaded.making():
            self.adapters[name] = Adapter(backbone, name, rank, self.teacher.lora_targets)

    def _controlnet(self, start: str, backbone: nn.Module) -> nn.Module:
        own = self.loaded.controlnet("controlnet") if start else self.own
        with self.loaded.making():
            return copied(own) if own is not None else self.teacher.new_controlnet(backbone)

    def _add_controlnet(self, net: Denoiser, controlnet: nn.Module) -> None:
        net.controlnet = placed(controlnet, self.loaded.run.device).requires_grad_(True)

    def add_posterior(self, settings: AnyPosterior) -> None:
        """Make the posterior of these settings, once."""
        if settings in self.posteriors:
            return
        if isinstance(settings, FrozenPosterior):
            model = self.loaded.model("posterior")
            if not self.loaded.same_latents(model):
                raise UsageError(f"{settings.model} works on other latents than the teacher; train a posterior for "
                                 "this teacher: jdm train nano-posterior")
            score = self.teacher.score_of(self.text, self.teacher.denoiser(model.backbone))
            self.posteriors[settings] = Posterior(score, self.schedule)
        elif isinstance(settings, ConsistencyPosterior):
            if "posterior" in self.adapters:
                raise UsageError("two terms have posteriors with different settings; give both the same settings")
            base = self.fake.net
            self._add_adapter("posterior", base.backbone, settings.rank)
            net = self.teacher.denoiser(base.backbone, adapters=(*base.adapters, self.adapters["posterior"]))
            self.posteriors[settings] = Posterior(self.teacher.score_of(self.text, net), self.schedule,
                                                  settings.levels, settings.low, settings.high)
        else:
            assert isinstance(settings, FakePosterior)
            if self.fake.net.controlnet is not None:
                raise UsageError("a fake score that sees the control cannot be the posterior, because its x0 "
                                 "depends on the control; use a consistency posterior")
            self.posteriors[settings] = None

    def add_guide(self, role: str) -> None:
        """Load another teacher's score, with its own text encoder and schedule, for guidance on these latents."""
        self.guides[role] = guide(self.loaded, role)

    def add_part(self, name: str, term: WithModule) -> None:
        """Make the module that a term brings."""
        if term.reads_features:
            _ = self.references.widths  # a pass through the teacher, which an estimate cannot make inside `making`
        with self.loaded.making():
            self.parts[name] = placed(term.module(self), self.loaded.run.device)

    @property
    def text(self) -> TextEncoder:
        return self.loaded.text()

    @property
    def fake(self) -> ScoreModel[Denoiser]:
        """The fake score."""
        if self._fake is None:
            raise UsageError("this method trains no fake score")
        return self._fake

    def real_score(self, guidance: float) -> ScoreModel[Denoiser]:
        """The teacher's score at a guidance."""
        return self.teacher.score_of(self.text, self.real, guidance)

    @property
    def real_sees_control(self) -> bool:
        return self.real.controlnet is not None

    @property
    def fake_sees_control(self) -> bool:
        return self.fake.net.controlnet is not None

    @property
    def control(self) -> Control | None:
        return self.loaded.control

    @property
    def reward(self) -> Reward | None:
        return self.loaded.reward

    @property
    def generator(self) -> Generator:
        return self.teacher.generator(self.text, self.student, self.settings.levels)

    @property
    def schedule(self) -> NoiseSchedule:
        return self.teacher.schedule

    @property
    def decoder(self) -> nn.Module:
        return self.loaded.decoder or self.teacher.vae

    @property
    def space(self) -> Space:
        return Space(self.decoder, self.student.autocast)

    def of_pictures(self, value: Callable[[Tensor, slice], Tensor]) -> Callable[[Tensor], Tensor]:
        """Turns value(x of some rows, the rows) into x [B, ...] -> [B]; picture by picture with checkpointing."""
        return picture_by_picture(value) if self.loaded.run.checkpointing else lambda x: value(x, slice(None))

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The modules that train. The posterior's LoRA on a full fake score is part of that network."""
        trains = self.settings.optimiser is not None
        found = {self.teacher.BACKBONE: self.adapters.get("student", self.student.backbone if trains else None),
                 "controlnet": self.student.controlnet}
        if self._fake is not None:
            found["fake"] = self.adapters.get("fake", self.fake.net)
            if "fake" in self.adapters:
                found |= {"fake_controlnet": self.fake.net.controlnet, "posterior": self.adapters.get("posterior")}
        return {name: module for name, module in (found | self.parts).items() if module is not None}

    def student_groups(self, branch: Branch | None) -> Groups:
        """(parameters, optimiser) of what trains in the student."""
        groups: Groups = []
        if self.settings.optimiser is not None:
            groups.append((list(self.modules[self.teacher.BACKBONE].parameters()), self.settings.optimiser))
        if branch and self.student.controlnet is not None:
            groups.append((list(self.student.controlnet.parameters()), branch.optimiser))
        return groups

    def fake_groups(self, fake: Fake) -> Groups:
        """(parameters, optimiser) of what trains in the fake score, the posterior's LoRA apart."""
        own = self.adapters["fake"].parameters() if "fake" in self.adapters else \
            base_parameters(self.fake.net.backbone)
        groups: Groups = [(list(own), fake.optimiser)]
        if fake.controlnet and self.fake.net.controlnet is not None:
            groups.append((list(self.fake.net.controlnet.parameters()), fake.controlnet))
        return groups

    def product(self, method: str, control: str, **more: Any) -> Product:
        """The student as a folder that stock diffusers runs at its levels.

        Args:
            method: its name in the model's card.
            more: further entries of the card.
        """
        levels = self.settings.levels
        card = {"kind": "one-step" if len(levels) == 1 else "few-step", "method": method, "control": control or None,
                "levels": list(levels), **more}

        def write(folder: Path, averages: dict[str, nn.Module]) -> object:
            shown = {"preprocessor": self.loaded.preprocessor} if control else {}
            return save_pipeline(self._with(averages), folder, self.teacher.step_scheduler(levels), card=card | shown)

        trained = (self.teacher.BACKBONE, "controlnet")
        modules = {name: module for name, module in self.modules.items() if name in trained}
        return Product(modules, write)

    def _with(self, averages: dict[str, nn.Module]) -> Family:
        """The teacher's folder with the student's averaged networks in it."""
        lora = self.adapters.get("student")
        backbone: Any = self.student.backbone if lora else averages.get(self.teacher.BACKBONE, self.student.backbone)
        if lora or backbone is self.teacher.backbone:
            backbone = with_merged(backbone, lora)
        return self.teacher.with_networks(backbone=backbone,
                                          controlnet=averages.get("controlnet", self.student.controlnet))

    def probe(self) -> Callable[[dict[str, nn.Module]], dict[str, float]] | None:
        """Measurements of the averaged student on validation pictures; None if the run makes none, or has too few."""
        loaded, run = self.loaded, self.loaded.run
        if not run.probe_every:
            return None
        return validation_probe(run, loaded.control, loaded.held_out, loaded.split("test"), self.teacher,
                                lambda: self.generator)

    def preview(self, guidance: float = 1.0) -> Callable[[dict[str, nn.Module]], Shown] | None:
        """Pictures of the averaged student beside the teacher's; None where the run draws none or has nothing to ask.

        `guidance` is the teacher's; 1 stands for that of its card, or 2.
        """
        loaded, teacher, control = self.loaded, self.teacher, self.loaded.control
        if not loaded.run.preview_every:
            return None
        score = self.real_score(guidance if guidance != 1 else guidance_of(teacher))
        seen = control if self.real_sees_control else None

        def student(asked: Questions) -> Tensor:
            return answers(Sampler(teacher, generator=self.generator), asked, control, at_once(asked.images))

        others = {TEACHER: many_steps(score, teacher.space, teacher.latent_shape, loaded.run.device, seen)}
        return preview(asked_pictures(loaded), control, {"student": student}, others, loaded.run.device)

    @property
    def running(self) -> list[nn.Module]:
        """Every network that runs in a step: student, real and fake score, posteriors, guides, decoder."""
        if self._fake is None:
            return [self.student, self.decoder]
        scores = [self.fake, *(p.score for p in self.posteriors.values() if p is not None), *self.guides.values()]
        return [self.student, self.real, *(score.net for score in scores), self.decoder]  # type: ignore[attr-defined]


def guide(loaded: Loaded, role: str) -> ScoreModel:
    """Another teacher's score, for guidance on this teacher's latents.

    Raises:
        UsageError: its latents are not this teacher's: the autoencoders' configurations or encodings differ.
    """
    model, teacher, name = loaded.model(role), loaded.teacher, loaded.needs.models[role]
    for key in ("latent_channels", "block_out_channels", "scaling_factor", "shift_factor"):
        ours, theirs = teacher.vae.config.get(key), model.vae.config.get(key)
        if ours != theirs:
            raise UsageError(f"{name} cannot guide this teacher: its autoencoder has {key} {theirs}, the teacher's "
                             f"{ours}; both must share one latent space")
    apart = loaded.apart(role)
    if apart > 0.05:  # half precision on disk moves an encoding by less than 1%
        raise UsageError(f"{name} cannot guide this teacher: its autoencoder's latents of a probe picture differ by "
                         f"{100 * apart:.0f}% (at most 5%); both must share one latent space")
    return model.score_of(loaded.text(role), model.denoiser(model.backbone))


def controlnet_need(branch: Branch) -> dict[str, str]:
    """Role and name of the model whose ControlNet a branch starts from; empty for a new ControlNet."""
    return {"controlnet": branch.start} if branch.start else {}
