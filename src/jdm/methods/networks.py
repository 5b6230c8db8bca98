"""What distillation methods share: the four networks, the batch of a step, and the fake score's phase."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from jdm.controls import Control, checked, load_control
from jdm.data import Noise, Pictures, load_pictures, rows_at
from jdm.generator import Generator
from jdm.models.adapters import Adapter, base_parameters
from jdm.models.library import load_model
from jdm.models.stable_diffusion import (
    Denoiser,
    StableDiffusion,
    TextEncoder,
    copied,
    new_controlnet,
    one_step_scheduler,
    placed,
    save_pipeline,
)
from jdm.posterior import Posterior
from jdm.run import Optimiser, Phase, Run
from jdm.schedule import NoiseSchedule
from jdm.score import ScoreModel
from jdm.space import Space, from_bytes, unit


@dataclass(frozen=True)
class Networks:
    """Teacher (real), student (generator), fake and posterior, around one text encoder."""

    teacher: StableDiffusion
    text: TextEncoder
    real: ScoreModel
    fake: ScoreModel
    student: Denoiser
    generator: Generator
    posterior: Posterior | None
    adapter: Adapter | None

    @classmethod
    def of(cls, run: Run, t_init: int, guidance: float, with_control: bool, rank: int = 0,
           levels: int = 18, span: tuple[float, float] = (0.02, 0.98)) -> Networks:
        """Student and fake start as copies of the teacher; a posterior of LoRA `rank` sits on the fake."""
        teacher = load_model(run.model).to(run.device)
        text = teacher.text(one_by_one=True)
        control = placed(new_controlnet(teacher.unet, teacher.downscale), run.device) if with_control else None
        student = Denoiser(copied(teacher.unet), control)
        fake_unet = copied(teacher.unet)
        fake = teacher.score(text, fake_unet)
        adapter = Adapter(fake_unet, "posterior", rank) if rank else None
        posterior = Posterior(fake, teacher.schedule, adapter.active, levels, *span) if adapter else None
        real = teacher.score(text, guidance=guidance)
        generator = teacher.generator(text, student, t_init)
        return cls(teacher, text, real, fake, student, generator, posterior, adapter)

    @property
    def schedule(self) -> NoiseSchedule:
        return self.teacher.schedule

    @property
    def space(self) -> Space:
        return self.teacher.space

    @property
    def modules(self) -> dict[str, nn.Module]:
        parts = {"unet": self.student.unet, "controlnet": self.student.controlnet, "fake": self.fake.net}
        return {k: v for k, v in parts.items() if v is not None}  # type: ignore[misc]

    def fake_parameters(self) -> list[nn.Parameter]:
        return base_parameters(self.fake.net)  # type: ignore[arg-type]

    def averaged(self, averages: dict[str, nn.Module]) -> StableDiffusion:
        """The teacher's folder with the student's averaged networks in it."""
        return self.teacher.with_parts(unet=averages["unet"], controlnet=averages.get("controlnet"))

    def export(self, folder: Path, averages: dict[str, nn.Module], t_init: int, card: dict) -> None:
        """The one-step student as a folder that stock diffusers runs in one step."""
        scheduler = one_step_scheduler(self.teacher.scheduler, t_init)
        save_pipeline(self.averaged(averages), folder, scheduler, card=card)


class Step:
    """One step's batch. (y, c) come from ONE picture; x = G(z, y, c) is computed once, with its graph.

    Attributes:
        y: prompts. c: control [B, k, H, W] or None. images: the pictures c came from, [B, 3, H, W] in [0, 1].
        z: generator noise. noise: every other random number of the step, by stream name.
    """

    def __init__(self, networks: Networks, run: Run, pictures: Pictures, control: Control | None, step: int):
        self.noise = Noise(run.seed, step, run.device)
        rows = rows_at(len(pictures), run.batch, run.seed, step)
        self.images = unit(from_bytes(pictures.batch(rows))).to(run.device)
        self.y = pictures.prompts(rows, self.noise.uniform("caption", len(rows)).cpu())
        self.c = None if control is None else control.h(self.images)
        self.z = self.noise.normal("z", networks.teacher.latent_shape(run.batch, run.data.size))
        self._networks, self._control = networks, control

    @cached_property
    def x(self) -> Tensor:
        """The student's sample, differentiable in its parameters."""
        shown = None if self._control is None or self.c is None else self._control.image(self.c)
        return self._networks.generator(self.z, self.y, shown)

    def noised(self, stream: str, schedule: NoiseSchedule, span: tuple[float, float]) -> tuple[Tensor, ...]:
        """(x_t, t, eps) of the detached sample, t uniform on the grid points of `span`."""
        x = self.x.detach()
        t = schedule.grid(self.noise.uniform(f"t/{stream}", len(x)), *span)
        eps = self.noise.normal(f"eps/{stream}", x.shape)
        return schedule.noised(x, t, eps), t, eps


def steps_of(networks: Networks, run: Run, control: Control | None) -> Callable[[int], Step]:
    pictures = load_pictures(run.data.source, run.data.split, run.data.size)
    return lambda step: Step(networks, run, pictures, control, step)


def fake_phase(networks: Networks, optimiser: Optimiser, repeats: int, span: tuple[float, float],
               every: int = 1) -> Phase:
    """The fake score follows the student's samples: E || eps_psi(x_t, t, y) - eps ||^2 (JDM Eq. 6)."""

    def loss(step: Step, repeat: int) -> tuple[Tensor, dict]:
        x_t, t, eps = step.noised(f"fake/{repeat}", networks.schedule, span)
        return (networks.fake(x_t, t, step.y).eps - eps).square().mean(), {}

    return Phase("fake", [(networks.fake_parameters(), optimiser)], loss, repeats, every)


def loaded_control(spec: str, size: int) -> Control:
    """A control by name or import path, probed at the size it will see."""
    return checked(load_control(spec), size)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Mean cosine between two directions, over samples; for the log."""
    return torch.cosine_similarity(a.flatten(1), b.flatten(1), dim=1).mean()
