"""Joint Distribution Matching (arXiv 2503.06652): a one-step student learns a control its teacher never knew."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from jdm.controls import Control
from jdm.evaluate import validation_probe
from jdm.methods.networks import Networks, Step, cosine, fake_phase, loaded_control, steps_of
from jdm.run import Optimiser, Phase, Run, Task
from jdm.space import unit
from jdm.terms import Weighting, ascend, clipped_to, condition_alignment, distribution_matching, lambda_t, on_x


@dataclass(frozen=True)
class JDM:
    """Grad = alpha_t lambda_t [ grad log p(c | x_t) + s_real(x_t) - s_fake(x_t) ]  (Eq. 5), on ONE x_t.

    Attributes:
        control: "canny", or an import path, "my_controls.py:Posterize".
        t_init: level index the generator runs at; sigma / alpha = 2.5 at SD's 625.
        guidance: of the real score; 1 is none.
        t_range: noise levels of both terms. fake_range: those of the fake score's own training.
        weighting: lambda_t, shared by both terms.
        condition_weight: of the condition term.
        condition_clip: bound on each sample's condition term, in units of the fidelity term's mean norm over the
            batch; 0 leaves it alone. Paper: none is printed; here: the two differ by orders of magnitude.
        shared_noise: Paper: one x_t for both terms. False gives the condition term a t and noise of its own.
        use_reference: compare with the picture c came from, where the control can; False trains from c alone.
        fake_updates: per student step. rank: of the posterior's LoRA. levels: K of Eq. 8.
        unet, controlnet, fake, posterior: Paper: no rate is printed; here: those of the same group's nearest work,
            for SD1.5. A recipe for a smaller model raises them.
    """

    control: str = "canny"
    t_init: int = 625
    guidance: float = 2.0
    t_range: tuple[float, float] = (0.02, 0.98)
    fake_range: tuple[float, float] = (0.0, 1.0)
    weighting: Weighting = "dmd"
    condition_weight: float = 1.0
    condition_clip: float = 1.0
    shared_noise: bool = True
    use_reference: bool = True
    fake_updates: int = 1
    rank: int = 16
    levels: int = 18
    unet: Optimiser = field(default_factory=lambda: Optimiser(lr=2e-6, betas=(0.0, 0.95)))
    controlnet: Optimiser = field(default_factory=lambda: Optimiser(lr=1e-5, betas=(0.9, 0.95)))
    fake: Optimiser = field(default_factory=lambda: Optimiser(lr=1e-5, betas=(0.0, 0.95)))
    posterior: Optimiser = field(default_factory=lambda: Optimiser(lr=1e-5, betas=(0.0, 0.95)))

    def task(self, run: Run) -> Task:
        control = loaded_control(self.control, run.data.size)
        networks = Networks.of(run, self.t_init, self.guidance, with_control=True, rank=self.rank,
                               levels=self.levels, span=self.t_range)
        card = {"kind": "one-step", "method": "jdm", "control": self.control, "t_init": self.t_init}
        return Task(
            phases=[
                fake_phase(networks, self.fake, self.fake_updates, self.fake_range),
                self._posterior_phase(networks),
                self._generator_phase(networks, control),
            ],
            begin=steps_of(networks, run, control),
            modules=networks.modules,
            averaged=("unet", "controlnet"),
            export=lambda folder, averages: networks.export(folder, averages, self.t_init, card),
            probe=validation_probe(networks, run, control),
        )

    def direction(self, networks: Networks, control: Control, step: Step) -> tuple[Tensor, dict]:
        """The ascent direction on x, detached, and what to log (Eq. 5)."""
        x_t, t, _ = step.noised("generator", networks.schedule, self.t_range)
        with torch.no_grad():
            real, fake = networks.real.guided(x_t, t, step.y), networks.fake(x_t, t, step.y)
        weight = lambda_t(self.weighting, real, step.x.detach())
        fidelity = on_x(distribution_matching(real, fake), real, weight)
        if self.shared_noise:
            estimate, weight_c = real, weight
        else:  # the pilot's variant: a t and noise of its own
            x_t, t, _ = step.noised("condition", networks.schedule, self.t_range)
            with torch.no_grad():
                estimate = networks.fake(x_t, t, step.y)
            weight_c = lambda_t(self.weighting, estimate, step.x.detach())
        assert networks.posterior is not None
        aligned = condition_alignment(self._log_prob(networks, control, step), networks.posterior, x_t, t, step.y)
        condition = on_x(aligned, estimate, weight_c) * self.condition_weight
        raw = condition
        if self.condition_clip:
            condition = clipped_to(condition, fidelity, self.condition_clip)
        logs = {"fidelity": _size(fidelity), "condition": _size(condition), "condition_raw": _size(raw),
                "cos_fidelity_condition": cosine(fidelity, condition), "cos_real_fake": cosine(real.eps, fake.eps),
                "std_x": step.x.detach().std()}
        return fidelity + condition, logs

    def _log_prob(self, networks: Networks, control: Control, step: Step):
        c, reference = step.c, step.images if self.use_reference else None
        assert c is not None
        return lambda x: control.log_prob(unit(networks.space.decode(x)), c, reference)

    def _generator_phase(self, networks: Networks, control: Control) -> Phase:
        def loss(step: Step, _: int) -> tuple[Tensor, dict]:
            direction, logs = self.direction(networks, control, step)
            return ascend(step.x, direction), logs

        student = networks.student
        assert student.controlnet is not None
        groups = [(list(student.unet.parameters()), self.unet),
                  (list(student.controlnet.parameters()), self.controlnet)]
        return Phase("generator", groups, loss)

    def _posterior_phase(self, networks: Networks) -> Phase:
        posterior, adapter = networks.posterior, networks.adapter
        assert posterior is not None
        assert adapter is not None

        def loss(step: Step, _: int) -> tuple[Tensor, dict]:
            uniform = step.noise.uniform("k", len(step.z))
            eps = step.noise.normal("eps/posterior", step.z.shape)
            return posterior.consistency_loss(step.x, step.y, uniform, eps), {}

        return Phase("posterior", [(adapter.parameters, self.posterior)], loss)


def _size(direction: Tensor) -> Tensor:
    """Root mean square, over samples and components."""
    return direction.square().mean().sqrt()
