"""Diff-Instruct (arXiv 2305.18455): JDM's fidelity term and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from jdm.methods.networks import Networks, Step, cosine, distillation, fake_phase, generator_phase, loaded_control, rms
from jdm.run import Optimiser, Run, Task
from jdm.terms import Weighting, distribution_matching, lambda_t, on_x


@dataclass(frozen=True)
class DiffInstruct:
    """Grad = alpha_t lambda_t [ s_real(x_t) - s_fake(x_t) ]  (JDM Eq. 2). Fields as in `JDM`.

    Attributes:
        control: empty for a student without control. With one, the student has a ControlNet that sees c and nothing
            asks it to obey: implicit score distillation, the baseline of JDM Eq. 12.
    """

    control: str = ""
    t_init: int = 625
    guidance: float = 2.0
    t_range: tuple[float, float] = (0.02, 0.98)
    fake_range: tuple[float, float] = (0.0, 1.0)
    weighting: Weighting = "dmd"
    fake_updates: int = 1
    student_rank: int = 0
    fake_rank: int = 0
    unet: Optimiser = field(default_factory=lambda: Optimiser(lr=2e-6, betas=(0.0, 0.95)))
    controlnet: Optimiser = field(default_factory=lambda: Optimiser(lr=1e-5, betas=(0.9, 0.95)))
    fake: Optimiser = field(default_factory=lambda: Optimiser(lr=1e-5, betas=(0.0, 0.95)))

    def task(self, run: Run) -> Task:
        control = loaded_control(self.control, run.data.size) if self.control else None
        networks = Networks.of(run, self.t_init, self.guidance, student_rank=self.student_rank,
                               fake_rank=self.fake_rank)
        networks = networks.with_controlnet() if control else networks
        phases = [fake_phase(networks, self.fake, self.fake_updates, self.fake_range),
                  generator_phase(networks, partial(self.direction, networks), self.unet, self.controlnet)]
        return distillation(networks, run, control, phases, networks.exporter("diff-instruct", self.control or None))

    def direction(self, networks: Networks, step: Step) -> tuple[Tensor, dict]:
        """The ascent direction on x, detached, and what to log."""
        x_t, t, _ = step.noised("generator", networks.schedule, self.t_range)
        with torch.no_grad():
            real, fake = networks.real.guided(x_t, t, step.y), networks.fake(x_t, t, step.y)
        weight = lambda_t(self.weighting, real, step.x.detach())
        fidelity = on_x(distribution_matching(real, fake), real, weight)
        return fidelity, {"fidelity": rms(fidelity), "cos_real_fake": cosine(real.eps, fake.eps)}
