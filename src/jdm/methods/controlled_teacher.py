"""The way JDM argues against (its Eq. 2): train a controlled teacher first, then distil it with a controlled fake."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from jdm.errors import UsageError
from jdm.methods.networks import Networks, Step, cosine, distillation, fake_phase, generator_phase, loaded_control, rms
from jdm.models.family import copied
from jdm.run import Optimiser, Run, Task
from jdm.score import ScoreModel
from jdm.terms import Weighting, distribution_matching, lambda_t, on_x


@dataclass(frozen=True)
class ControlledTeacher:
    """Grad = alpha_t lambda_t [ s_real(x_t | y, c) - s_fake(x_t | y, c) ]  (JDM Eq. 2). Fields as in `JDM`.

    Its cost is that of both stages: the multi-step ControlNet's training, then this one.

    Attributes:
        teacher: a multi-step model with a ControlNet for this control; real, fake and student start from it, the
            run's model is what distances are measured to.
    """

    teacher: str = "nano-controlnet"
    control: str = "canny"
    t_init: int = 625
    guidance: float = 2.0
    t_range: tuple[float, float] = (0.02, 0.98)
    fake_range: tuple[float, float] = (0.0, 1.0)
    weighting: Weighting = "dmd"
    fake_updates: int = 1
    unet: Optimiser = field(default_factory=lambda: Optimiser(lr=2e-6, betas=(0.0, 0.95)))
    controlnet: Optimiser = field(default_factory=lambda: Optimiser(lr=1e-5, betas=(0.9, 0.95)))
    fake: Optimiser = field(default_factory=lambda: Optimiser(lr=1e-5, betas=(0.0, 0.95)))

    def task(self, run: Run) -> Task:
        control = loaded_control(self.control, run.data.size)
        networks = self._networks(run)
        phases = [fake_phase(networks, self.fake, self.fake_updates, self.fake_range),
                  generator_phase(networks, partial(self.direction, networks), self.unet, self.controlnet)]
        return distillation(networks, run, control, phases, networks.exporter("controlled-teacher", self.control))

    def direction(self, networks: Networks, step: Step) -> tuple[Tensor, dict]:
        """The ascent direction on x, detached, and what to log."""
        x_t, t, _ = step.noised("generator", networks.schedule, self.t_range)
        with torch.no_grad():
            real = networks.real.guided(x_t, t, step.y, step.shown)
            fake = networks.fake(x_t, t, step.y, step.shown)
        weight = lambda_t(self.weighting, real, step.x.detach())
        fidelity = on_x(distribution_matching(real, fake), real, weight)
        return fidelity, {"fidelity": rms(fidelity), "cos_real_fake": cosine(real.eps, fake.eps)}

    def _networks(self, run: Run) -> Networks:
        networks = Networks.of(replace(run, model=self.teacher), self.t_init)
        controlnet = networks.teacher.controlnet
        if controlnet is None or networks.teacher.levels:
            raise UsageError(f"{self.teacher} is no multi-step model with a ControlNet; train one first: jdm train "
                             "nano-controlnet")

        def score(unet: nn.Module, controlnet: nn.Module, guidance: float = 1.0) -> ScoreModel:
            teacher = networks.teacher
            return teacher.score_of(networks.text, teacher.denoiser(unet, controlnet), guidance)

        return replace(networks, student=networks.teacher.denoiser(networks.student.backbone, copied(controlnet)),
                       fake=score(networks.fake.net.backbone, copied(controlnet)),
                       real=score(networks.teacher.backbone, controlnet, self.guidance))
