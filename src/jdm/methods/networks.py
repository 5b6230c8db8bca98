"""What distillation methods share: the four networks, the batch of a step, and the fake score's phase."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jdm.controls import Control, checked, load_control
from jdm.data import cache as prepared
from jdm.data.batches import Batches
from jdm.data.noise import Noise
from jdm.data.sources import load_pictures
from jdm.errors import UsageError
from jdm.evaluation.evaluate import validation_probe
from jdm.generator import Generator
from jdm.library import load_controlnet, load_model, tiny_decoder
from jdm.models.adapters import Adapter, base_parameters
from jdm.models.family import Denoiser, Family, copied, placed, with_merged
from jdm.models.folder import save_pipeline
from jdm.models.text import TextEncoder
from jdm.posterior import Posterior
from jdm.run import Optimiser, Phase, Run, Task
from jdm.schedule import NoiseSchedule
from jdm.score import ScoreModel
from jdm.size import Size
from jdm.space import Space, from_bytes, unit
from jdm.terms import ascend, picture_by_picture


@dataclass(frozen=True)
class Networks:
    """Teacher (real), student (generator), fake and posterior, around one text encoder.

    Attributes:
        student: UNet, or UNet + ControlNet. t_init: level index it runs at.
        train_unet: False freezes the student's UNet: only its ControlNet is trained, saved and averaged.
        tiny: the decoder inside the likelihood, where it is not the teacher's own. one_by_one: pictures are decoded
            and measured one after the other, each with its gradient.
        adapters: the LoRAs that train, by name: "student" and "fake", where these are not networks of their own, and
            "posterior", where it is not frozen or absent.
    """

    teacher: Family
    text: TextEncoder
    real: ScoreModel[Denoiser]
    fake: ScoreModel[Denoiser]
    student: Denoiser
    t_init: int
    train_unet: bool = True
    posterior: Posterior | None = None
    adapters: dict[str, Adapter] = field(default_factory=dict)
    tiny: nn.Module | None = None
    one_by_one: bool = False

    @classmethod
    def of(cls, run: Run, t_init: int, guidance: float = 1.0, start: str | None = None, train_unet: bool = True,
           student_rank: int = 0, fake_rank: int = 0) -> Networks:
        """Student and fake start as the teacher, the student as `start`'s UNet if one is named.

        Args:
            guidance: of the real score.
            start: a one-step generator at the same t_init: Diff-Instruct's, or phase 1 of a shared one (Sec. 3.2.1).
            student_rank, fake_rank: of a LoRA on the frozen network it starts as; 0 is a full copy, trained whole.
        """
        if student_rank and not train_unet:
            raise UsageError(f"a frozen UNet has no LoRA to train; leave out --student-rank {student_rank} or "
                             "--no-train-unet")
        teacher = load_model(run.model).at(run.data.size).to(run.device)
        text = prepared.text(run, teacher.text(one_by_one=True))
        first = placed(_one_step(start, teacher, t_init).at(run.data.size).backbone, run.device) if start else \
            teacher.backbone
        student, fake, adapters = teacher.denoiser(first), teacher.denoiser(), {}
        if not student_rank:
            student = teacher.denoiser(copied(first).requires_grad_(train_unet))
        if not fake_rank:
            fake = teacher.denoiser(copied(teacher.backbone))
        for name, net, rank in (("student", student, student_rank), ("fake", fake, fake_rank)):
            if rank:
                adapters[name] = Adapter(net.backbone, name, rank, teacher.lora_targets)
                net.adapters = (adapters[name],)
        real = teacher.score_of(text, teacher.denoiser(), guidance)
        return cls(teacher, text, real, teacher.score_of(text, fake), student, t_init, train_unet, adapters=adapters,
                   tiny=placed(tiny_decoder(run.decoder, teacher), run.device) if run.decoder else None,
                   one_by_one=run.checkpointing)

    def with_controlnet(self, start: str = "") -> Networks:
        """The student with a new ControlNet, zero convolutions and all (Eq. 10), or with that of `start`."""
        net = copied(load_controlnet(start, self.teacher)[0]) if start else \
            self.teacher.new_controlnet(self.student.backbone)
        net = placed(net, self._device).requires_grad_(True)
        return replace(self, student=self.teacher.denoiser(self.student.backbone, net, self.student.adapters))

    def with_controlled_fake(self) -> Networks:
        """The fake score with a ControlNet of its own: s_fake(x_t | y, c). Before `with_posterior`."""
        net = placed(self.teacher.new_controlnet(), self._device).requires_grad_(True)
        fake = self.teacher.denoiser(self.fake.net.backbone, net, self.fake.net.adapters)
        return replace(self, fake=self.teacher.score_of(self.text, fake))

    def with_posterior(self, rank: int, levels: int, span: tuple[float, float]) -> Networks:
        """A posterior of LoRA `rank` on the fake score, at `levels` noise levels in `span` (Eq. 8)."""
        adapter = Adapter(self.fake.net.backbone, "posterior", rank, self.teacher.lora_targets)
        net = self.teacher.denoiser(self.fake.net.backbone, adapters=(*self.fake.net.adapters, adapter))
        posterior = Posterior(self.teacher.score_of(self.text, net), self.schedule, levels, *span)
        return replace(self, posterior=posterior, adapters=self.adapters | {"posterior": adapter})

    def with_frozen_posterior(self, model: str) -> Networks:
        """A posterior trained beforehand, by `methods/posterior_training.py`."""
        loaded = load_model(model).to(self._device)
        if loaded.latent_shape(1, loaded.size)[1] != self.teacher.latent_shape(1, self.teacher.size)[1]:
            raise UsageError(f"{model} works on other latents than the teacher; train a posterior for this teacher: "
                             "jdm train nano-posterior")
        net = self.teacher.denoiser(loaded.backbone)
        return replace(self, posterior=Posterior(self.teacher.score_of(self.text, net), self.schedule))

    @property
    def generator(self) -> Generator:
        return self.teacher.generator(self.text, self.student, (self.t_init,))

    @property
    def schedule(self) -> NoiseSchedule:
        return self.teacher.schedule

    @property
    def decoder(self) -> nn.Module:
        return self.tiny or self.teacher.space.vae  # type: ignore[return-value]

    @property
    def space(self) -> Space:
        return Space(self.decoder, self.student.autocast)

    def of_pictures(self, value: Callable[[Tensor, slice], Tensor]) -> Callable[[Tensor], Tensor]:
        """A likelihood or reward of (x of some rows, the rows) -> x [B, ...] -> [B], as memory allows."""
        return picture_by_picture(value) if self.one_by_one else lambda x: value(x, slice(None))

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What trains. A posterior's LoRA on a full fake score is part of that network."""
        unet = self.adapters.get("student", self.student.backbone if self.train_unet else None)
        parts = {"unet": unet, "controlnet": self.student.controlnet, "fake": self.adapters.get("fake", self.fake.net)}
        if "fake" in self.adapters:
            parts |= {"fake_controlnet": self.fake.net.controlnet, "posterior": self.adapters.get("posterior")}
        return {k: v for k, v in parts.items() if v is not None}

    @property
    def averaged(self) -> tuple[str, ...]:
        """Names of the modules that are exported."""
        return tuple(k for k in self.modules if k in ("unet", "controlnet"))

    @property
    def fake_parameters(self) -> list[nn.Parameter]:
        """What trains in the fake score, the posterior's LoRA apart."""
        return [p for parameters, _ in self.fake_groups(Optimiser(lr=0.0)) for p in parameters]

    def fake_groups(self, fake: Optimiser, controlnet: Optimiser | None = None) -> list:
        """(parameters, optimiser) of what trains in the fake score; its ControlNet's own, where one is given."""
        own = self.adapters["fake"].parameters() if "fake" in self.adapters else base_parameters(self.fake.net.backbone)
        sees = [] if self.fake.net.controlnet is None else list(self.fake.net.controlnet.parameters())
        if not sees or controlnet is None:
            return [([*own, *sees], fake)]
        return [(list(own), fake), (sees, controlnet)]

    def student_groups(self, unet: Optimiser, controlnet: Optimiser | None = None) -> list:
        """(parameters, optimiser) of what trains in the student."""
        trained = self.modules.get("unet")
        groups = [] if trained is None else [(list(trained.parameters()), unet)]
        if self.student.controlnet is not None and controlnet is not None:
            groups.append((list(self.student.controlnet.parameters()), controlnet))
        return groups

    def with_averages(self, averages: dict[str, nn.Module]) -> Family:
        """The teacher's folder with the student's averaged networks in it."""
        unet = self.student.backbone if "student" in self.adapters else averages.get("unet", self.student.backbone)
        if unet is self.teacher.backbone or "student" in self.adapters:
            unet = with_merged(unet, self.adapters.get("student"))
        return self.teacher.with_networks(backbone=unet, controlnet=averages.get("controlnet", self.student.controlnet))

    def exporter(self, method: str, control: str | None, **more: Any) -> Callable[[Path, dict[str, nn.Module]], object]:
        """(folder, averages) -> writes the one-step student as a folder that stock diffusers runs in one step."""
        scheduler = self.teacher.step_scheduler((self.t_init,))
        card = {"kind": "one-step", "method": method, "control": control, "levels": [self.t_init], **more}
        return lambda folder, averages: save_pipeline(self.with_averages(averages), folder, scheduler, card=card)

    @property
    def running(self) -> list[nn.Module]:
        """Every network that runs in a step: student, real and fake score, posterior where there is one, decoder."""
        scores = [self.real, self.fake, *([self.posterior.score] if self.posterior else [])]
        return [self.student, *(score.net for score in scores), self.decoder]  # type: ignore[union-attr]

    @property
    def _device(self) -> torch.device:
        return next(self.teacher.backbone.parameters()).device


def _one_step(name: str, teacher: Family, t_init: int) -> Family:
    """A one-step generator to start from, of the teacher's kind and at the level asked for.

    Raises:
        UsageError: it is no such generator.
    """
    model = load_model(name)
    if not model.levels:
        raise UsageError(f"{name} is no one-step generator; name one, such as nano-canny, or train one first: "
                         "jdm train nano-diff-instruct")
    if model.levels != (t_init,):
        raise UsageError(f"{name} runs at level {model.levels[0]}, asked for t_init {t_init}; use "
                         f"--t-init {model.levels[0]}")
    if model.latent_shape(1, model.size)[1] != teacher.latent_shape(1, teacher.size)[1]:
        raise UsageError(f"{name} works on other latents than the teacher; both must share one autoencoder")
    return model


class Step:
    """One step's batch. (y, c) come from ONE picture; x = G(z, y, c) is computed once, with its graph.

    Attributes:
        y: prompts. c: control [B, k, H, W] or None; shown: as the ControlNet takes it, [B, 3, H, W] in [0, 1].
        images: the pictures c came from, [B, 3, H, W] in [0, 1].
        z: generator noise. noise: every other random number of the step, by stream name.
        progress: share of the run that is done, in [0, 1).
    """

    def __init__(self, networks: Networks, run: Run, batches: Batches, control: Control | None, step: int):
        self.noise, self.progress = Noise(run.seed, step, run.device), step / run.steps
        rows, images = batches(step)
        self.images = unit(from_bytes(images)).to(run.device)
        self.y = batches.pictures.prompts(rows, self.noise.uniform("caption", len(rows)).cpu())
        self.c = None if control is None else control.h(self.images)
        self.shown = None if control is None or self.c is None else control.image(self.c)
        self.z = self.noise.normal("z", networks.teacher.latent_shape(len(rows), run.data.size))
        self._networks = networks

    @cached_property
    def x(self) -> Tensor:
        """The student's sample, differentiable in its parameters."""
        return self._networks.generator(self.z, self.y, self.shown)

    def noised(self, stream: str, schedule: NoiseSchedule, span: tuple[float, float]) -> tuple[Tensor, ...]:
        """(x_t, t, eps) of the detached sample, t uniform on the grid points of `span`."""
        x = self.x.detach()
        t = schedule.grid(self.noise.uniform(f"t/{stream}", len(x)), *span)
        eps = self.noise.normal(f"eps/{stream}", x.shape)
        return schedule.noised(x, t, eps), t, eps


def steps_of(networks: Networks, run: Run, control: Control | None) -> Callable[[int], Step]:
    pictures = prepared.pictures(run, load_pictures(run.data.source, run.data.split, run.data.size))
    batches = Batches(pictures, run.batch, run.seed)
    return lambda step: Step(networks, run, batches, control, step)


def distillation(networks: Networks, run: Run, control: Control | None, phases: list[Phase],
                 export: Callable[[Path, dict[str, nn.Module]], object], also: Sequence[nn.Module] = ()) -> Task:
    """The task of these phases: one batch a step for all of them, the student saved, averaged, probed and exported.

    Args:
        also: further frozen networks that run.
    """
    return Task(phases, steps_of(networks, run, control), networks.modules, export, networks.averaged,
                validation_probe(networks, run, control), [*networks.running, *also])


def fake_phase(networks: Networks, optimiser: Optimiser, repeats: int, span: tuple[float, float],
               every: int = 1, blind: bool = False, controlnet: Optimiser | None = None) -> Phase:
    """The fake score follows the student's samples: E || eps_psi(x_t, t, y) - eps ||^2 (JDM Eq. 6).

    A fake score with a ControlNet sees c as well; a new one's zero convolutions want a rate of their own, `controlnet`.
    blind: it does not see the prompt either.
    """
    controlled = networks.fake.net.controlnet is not None

    def loss(step: Step, repeat: int) -> tuple[Tensor, dict]:
        x_t, t, eps = step.noised(f"fake/{repeat}", networks.schedule, span)
        y = [""] * len(x_t) if blind else step.y
        estimate = networks.fake(x_t, t, y, step.shown if controlled else None)
        return (estimate.eps - eps).square().mean(), {}

    return Phase("fake", networks.fake_groups(optimiser, controlnet), loss, repeats, every)


def posterior_phase(networks: Networks, optimiser: Optimiser) -> Phase:
    """Consistency training of the posterior's LoRA on the student's samples (JDM Eq. 8)."""
    posterior = networks.posterior
    assert posterior is not None

    def loss(step: Step, _: int) -> tuple[Tensor, dict]:
        uniform = step.noise.uniform("k", len(step.z))
        eps = step.noise.normal("eps/posterior", step.z.shape)
        return posterior.consistency_loss(step.x, step.y, uniform, eps), {}

    return Phase("posterior", [(list(networks.adapters["posterior"].parameters()), optimiser)], loss)


def generator_phase(networks: Networks, direction: Callable[[Step], tuple[Tensor, dict]], unet: Optimiser,
                    controlnet: Optimiser | None = None) -> Phase:
    """The student's samples move along `direction`."""

    def loss(step: Step, _: int) -> tuple[Tensor, dict]:
        along, logs = direction(step)
        return ascend(step.x, along), logs | {"std_x": step.x.detach().std()}

    return Phase("generator", networks.student_groups(unet, controlnet), loss)


def loaded_control(spec: str, size: Size) -> Control:
    """A control by name or import path, probed at the size it will see."""
    return checked(load_control(spec), size)


def rms(direction: Tensor) -> Tensor:
    """Root mean square, over samples and components; for the log."""
    return direction.square().mean().sqrt()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Mean cosine between two directions, over samples; for the log."""
    return torch.cosine_similarity(a.flatten(1), b.flatten(1), dim=1).mean()
