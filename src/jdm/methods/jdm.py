"""Joint Distribution Matching (arXiv 2503.06652): a one-step student learns a control its teacher never knew."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from jdm.controls import Control
from jdm.errors import UsageError
from jdm.methods.networks import (
    Networks,
    Step,
    cosine,
    distillation,
    fake_phase,
    generator_phase,
    loaded_control,
    posterior_phase,
    rms,
)
from jdm.run import Optimiser, Run, Task
from jdm.score import Estimate
from jdm.space import unit
from jdm.terms import (
    Weighting,
    clean_alignment,
    clipped_to,
    condition_alignment,
    distribution_matching,
    lambda_t,
    on_x,
)


@dataclass(frozen=True)
class JDM:
    """Grad = alpha_t lambda_t [ grad log p(c | x_t) + s_real(x_t) - s_fake(x_t) ]  (Eq. 5), on ONE x_t.

    Attributes:
        control: "canny", or an import path, "my_controls.py:Posterize".
        start: one-step generator whose UNet the student begins as; the teacher's where empty.
        controlnet_start: a model or folder whose ControlNet the student's begins as; a new one where empty.
        train_unet: False trains a new ControlNet on the frozen UNet of `start`: phase 2 of Sec. 3.2.1.
        t_init: level index the generator runs at; sigma / alpha = 2.5 at SD's 625.
        guidance: of the real score; 1 is none.
        t_range: noise levels of both terms. fake_range: those of the fake score's own training.
        weighting: lambda_t, shared by both terms.
        condition_weight: of the condition term.
        condition_clip: bound on each sample's condition term, in units of the fidelity term's mean norm over the
            batch, in the first half of the run and in the second, when rates have fallen and the fake score keeps up;
            0 leaves it alone. Paper: none is printed; here: the two differ by orders of magnitude.
        condition_on: where the likelihood is read: on the posterior's sample f(x_t) (Eq. 7); on the fake score's own
            x0, the paper's easy way; or on the clean sample x, its ablation.
        draws: samples of p(x | x_t) in Eq. 7's integral; 0 is the plug-in f(x_t) alone. Paper: one; in no paper: more.
        frozen_posterior: a posterior trained beforehand on real pictures, in place of the moving one; in no paper.
        fake_sees_control: s_fake(x_t | y, c) in the fidelity term: the exact joint KL, where the paper has its bound.
            Its ControlNet learns as the student's does.
        shared_noise: Paper: one x_t for both terms. False gives the condition term a t, from condition_range, and noise
            of its own: two schedules, as Decoupled DMD has for its two terms.
        use_reference: compare with the picture c came from, where the control can; False trains from c alone.
        fake_updates: per student step. rank: of the posterior's LoRA. levels: K of Eq. 8.
        student_rank, fake_rank: of a LoRA on the frozen UNet it starts as, which then serves real, fake and posterior
            alike; 0 trains a full copy.
        unet, controlnet, fake, posterior: Paper: no rate is printed; here: those of the same group's nearest work,
            for SD1.5. A recipe for a smaller model raises them.
    """

    control: str = "canny"
    start: str = ""
    controlnet_start: str = ""
    train_unet: bool = True
    t_init: int = 625
    guidance: float = 2.0
    t_range: tuple[float, float] = (0.02, 0.98)
    fake_range: tuple[float, float] = (0.0, 1.0)
    weighting: Weighting = "dmd"
    condition_weight: float = 1.0
    condition_clip: tuple[float, float] = (1.0, 1.0)
    condition_on: Literal["posterior", "fake", "sample"] = "posterior"
    draws: int = 0
    frozen_posterior: str = ""
    fake_sees_control: bool = False
    shared_noise: bool = True
    condition_range: tuple[float, float] = (0.02, 0.98)
    use_reference: bool = True
    fake_updates: int = 1
    rank: int = 16
    levels: int = 18
    student_rank: int = 0
    fake_rank: int = 0
    unet: Optimiser = field(default_factory=lambda: Optimiser(lr=2e-6, betas=(0.0, 0.95)))
    controlnet: Optimiser = field(default_factory=lambda: Optimiser(lr=1e-5, betas=(0.9, 0.95)))
    fake: Optimiser = field(default_factory=lambda: Optimiser(lr=1e-5, betas=(0.0, 0.95)))
    posterior: Optimiser = field(default_factory=lambda: Optimiser(lr=1e-5, betas=(0.0, 0.95)))

    def task(self, run: Run) -> Task:
        control = loaded_control(self.control, run.data.size)
        networks = self._networks(run)
        phases = [fake_phase(networks, self.fake, self.fake_updates, self.fake_range, controlnet=self.controlnet)]
        if "posterior" in networks.adapters:
            phases.append(posterior_phase(networks, self.posterior))
        phases.append(generator_phase(networks, partial(self.direction, networks, control), self.unet, self.controlnet))
        return distillation(networks, run, control, phases, networks.exporter("jdm", self.control))

    def direction(self, networks: Networks, control: Control, step: Step) -> tuple[Tensor, dict]:
        """The ascent direction on x, detached, and what to log (Eq. 5)."""
        x_t, t, _ = step.noised("generator", networks.schedule, self.t_range)
        with torch.no_grad():
            real = networks.real.guided(x_t, t, step.y)
            fake = networks.fake(x_t, t, step.y, step.shown if self.fake_sees_control else None)
        weight = lambda_t(self.weighting, real, step.x.detach())
        fidelity = on_x(distribution_matching(real, fake), real, weight)
        raw = condition = self._condition(networks, control, step, (x_t, t, real, weight)) * self.condition_weight
        if bound := self.condition_clip[step.progress >= 0.5]:
            condition = clipped_to(condition, fidelity, bound)
        logs = {"fidelity": rms(fidelity), "condition": rms(condition), "condition_raw": rms(raw),
                "cos_fidelity_condition": cosine(fidelity, condition), "cos_real_fake": cosine(real.eps, fake.eps)}
        return fidelity + condition, logs

    def _condition(self, networks: Networks, control: Control, step: Step,
                   shared: tuple[Tensor, Tensor, Estimate, Tensor]) -> Tensor:
        """The condition term on x (Eqs. 5 and 7), at the x_t of the fidelity term or at one of its own."""
        c, reference = step.c, step.images if self.use_reference else None
        assert c is not None

        def log_prob(x: Tensor, rows: slice) -> Tensor:
            return control.log_prob(unit(networks.space.decode(x)), c[rows],
                                    None if reference is None else reference[rows])

        likelihood = networks.of_pictures(log_prob)
        if self.condition_on == "sample":
            return clean_alignment(likelihood, step.x)
        x_t, t, estimate, weight = shared
        if not self.shared_noise:
            x_t, t, _ = step.noised("condition", networks.schedule, self.condition_range)
            with torch.no_grad():
                estimate = networks.fake(x_t, t, step.y)
            weight = lambda_t(self.weighting, estimate, step.x.detach())
        posterior = networks.posterior or (lambda x_t, t, y: networks.fake(x_t, t, y).x0)
        again = [step.noise.normal(f"eps/draw/{k}", x_t.shape) for k in range(self.draws)]
        aligned = condition_alignment(likelihood, posterior, x_t, t, step.y, networks.schedule, again)
        return on_x(aligned, estimate, weight)

    def _networks(self, run: Run) -> Networks:
        if not self.train_unet and not self.start:
            raise UsageError("a frozen UNet must be a one-step generator's; name it with --start, such as nano-canny")
        if self.condition_on != "posterior" and (self.draws or self.frozen_posterior):
            raise UsageError(f"draws and a frozen posterior need condition_on posterior, got {self.condition_on}")
        if self.condition_on == "fake" and self.fake_sees_control:
            raise UsageError("a fake score that sees the control has no x0 blind to it; use condition_on posterior")
        networks = Networks.of(run, self.t_init, self.guidance, self.start, self.train_unet, self.student_rank,
                               self.fake_rank).with_controlnet(self.controlnet_start)
        if self.fake_sees_control:
            networks = networks.with_controlled_fake()
        if self.condition_on != "posterior":
            return networks
        if self.frozen_posterior:
            return networks.with_frozen_posterior(self.frozen_posterior)
        return networks.with_posterior(self.rank, self.levels, self.t_range)
