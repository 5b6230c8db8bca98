"""Diff-Instruct (arXiv 2305.18455): JDM's fidelity term and nothing else; the student has no control."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from jdm.evaluate import validation_probe
from jdm.methods.networks import Networks, Step, cosine, fake_phase, steps_of
from jdm.run import Optimiser, Phase, Run, Task
from jdm.terms import Weighting, ascend, distribution_matching, lambda_t, on_x


@dataclass(frozen=True)
class DiffInstruct:
    """Grad = alpha_t lambda_t [ s_real(x_t) - s_fake(x_t) ]  (JDM Eq. 2). Fields as in `JDM`."""

    t_init: int = 625
    guidance: float = 2.0
    t_range: tuple[float, float] = (0.02, 0.98)
    fake_range: tuple[float, float] = (0.0, 1.0)
    weighting: Weighting = "dmd"
    fake_updates: int = 1
    unet: Optimiser = field(default_factory=lambda: Optimiser(lr=2e-6, betas=(0.0, 0.95)))
    fake: Optimiser = field(default_factory=lambda: Optimiser(lr=1e-5, betas=(0.0, 0.95)))

    def task(self, run: Run) -> Task:
        networks = Networks.of(run, self.t_init, self.guidance, with_control=False)
        card = {"kind": "one-step", "method": "diff-instruct", "control": None, "t_init": self.t_init}

        def loss(step: Step, _: int) -> tuple[Tensor, dict]:
            x_t, t, _eps = step.noised("generator", networks.schedule, self.t_range)
            with torch.no_grad():
                real, fake = networks.real.guided(x_t, t, step.y), networks.fake(x_t, t, step.y)
            weight = lambda_t(self.weighting, real, step.x.detach())
            direction = on_x(distribution_matching(real, fake), real, weight)
            return ascend(step.x, direction), {
                "fidelity": direction.square().mean().sqrt(),
                "cos_real_fake": cosine(real.eps, fake.eps),
                "std_x": step.x.detach().std(),
            }

        student = list(networks.student.unet.parameters())
        return Task(
            phases=[fake_phase(networks, self.fake, self.fake_updates, self.fake_range),
                    Phase("generator", [(student, self.unet)], loss)],
            begin=steps_of(networks, run, None),
            modules=networks.modules,
            averaged=("unet",),
            export=lambda folder, averages: networks.export(folder, averages, self.t_init, card),
            probe=validation_probe(networks, run, None),
        )
