"""JDM for text-to-image (arXiv 2503.06652, Secs. 3.1 and Eq. 9): guidance from another teacher, and rewards."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from jdm.data import cache as prepared
from jdm.data.sources import load_pictures
from jdm.errors import UsageError
from jdm.library import load_model
from jdm.methods.networks import (
    Networks,
    Step,
    cosine,
    distillation,
    fake_phase,
    generator_phase,
    posterior_phase,
    rms,
)
from jdm.models.family import Family
from jdm.rewards import Reward, checked_reward, load_reward
from jdm.run import Optimiser, Run, Task
from jdm.schedule import NoiseSchedule, matched, precise
from jdm.score import Estimate, ScoreModel
from jdm.size import height_width
from jdm.space import unit
from jdm.terms import (
    Weighting,
    cfg_augmentation,
    clean_alignment,
    clipped_to,
    condition_alignment,
    distribution_matching,
    lambda_t,
    on_x,
)


@dataclass(frozen=True)
class TextToImage:
    """Grad = alpha_t lambda_t [ s_real - s_fake + (w or w - 1) (s'(x_t | y) - s'(x_t)) + grad r(f(x_t)) ].

    Attributes:
        guide: whose classifier-free guidance directs: another teacher's, with its own text encoder and schedule, on the
            same latents; the real teacher's own where empty. SD2.1 guides SD1.5 so (Sec. 3.1).
        guidance: w.
        fidelity: "prompt": s_real(x_t | y) - s_fake(x_t | y) with w - 1, Decoupled DMD's reading. "blind": the prompt
            is the condition and fidelity does not see it, s_real(x_t) - s_fake(x_t) with w: Eq. 5 to the letter.
        reward: of `jdm.rewards`, or an import path; empty for none (Eq. 9). reward_weight, reward_clip: as `JDM`'s
            condition_weight and condition_clip. reward_on: "posterior" as Eq. 9, or the clean "sample".
        others: as in `JDM`.
    """

    guide: str = ""
    guidance: float = 2.0
    fidelity: Literal["prompt", "blind"] = "prompt"
    reward: str = ""
    reward_weight: float = 1.0
    reward_clip: float = 1.0
    reward_on: Literal["posterior", "sample"] = "posterior"
    t_init: int = 625
    t_range: tuple[float, float] = (0.02, 0.98)
    fake_range: tuple[float, float] = (0.0, 1.0)
    weighting: Weighting = "dmd"
    fake_updates: int = 1
    rank: int = 16
    levels: int = 18
    student_rank: int = 0
    fake_rank: int = 0
    unet: Optimiser = field(default_factory=lambda: Optimiser(lr=2e-6, betas=(0.0, 0.95)))
    fake: Optimiser = field(default_factory=lambda: Optimiser(lr=1e-5, betas=(0.0, 0.95)))
    posterior: Optimiser = field(default_factory=lambda: Optimiser(lr=1e-5, betas=(0.0, 0.95)))

    def task(self, run: Run) -> Task:
        networks = Networks.of(run, self.t_init, student_rank=self.student_rank, fake_rank=self.fake_rank)
        reward = None
        if self.reward:
            pictures = load_pictures(run.data.source, run.data.split, run.data.size)
            prompts = pictures.prompts(torch.zeros(1).long(), torch.zeros(1))
            reward = checked_reward(load_reward(self.reward, run.device), run.data.size, prompts)
            if self.reward_on == "posterior":
                networks = networks.with_posterior(self.rank, self.levels, self.t_range)
        guide = guide_of(self.guide, networks.teacher, run) if self.guide else None
        phases = [fake_phase(networks, self.fake, self.fake_updates, self.fake_range, blind=self.fidelity == "blind")]
        if "posterior" in networks.adapters:
            phases.append(posterior_phase(networks, self.posterior))
        phases.append(generator_phase(networks, partial(self.direction, networks, guide, reward), self.unet))
        export = networks.exporter("jdm", None, reward=self.reward or None, guide=self.guide or None)
        return distillation(networks, run, None, phases, export, also=[guide.net] if guide else [])

    def direction(self, networks: Networks, guide: ScoreModel | None, reward: Reward | None,
                  step: Step) -> tuple[Tensor, dict]:
        """The ascent direction on x, detached, and what to log."""
        x_t, t, _ = step.noised("generator", networks.schedule, self.t_range)
        blind = self.fidelity == "blind"
        with torch.no_grad():
            cond, uncond = networks.real.conditional_and_unconditional(x_t, t, step.y)
            fake = networks.fake(x_t, t, [""] * len(x_t) if blind else step.y)
            real = uncond if blind else cond
            guided = (cond, uncond) if guide is None else guidance_of(guide, networks.schedule, x_t, t, step.y)
        w = self.guidance - (0.0 if blind else 1.0)
        matching, augmentation = distribution_matching(real, fake), cfg_augmentation(*guided)
        weight = lambda_t(self.weighting, real, step.x.detach())
        fidelity = on_x(matching + w * augmentation, real, weight)
        logs = {"fidelity": rms(on_x(matching, real, weight)), "guidance": rms(on_x(w * augmentation, real, weight)),
                "cos_real_fake": cosine(real.eps, fake.eps)}
        if reward is None:
            return fidelity, logs
        return self._rewarded(networks, reward, step, (x_t, t, real, weight), fidelity, logs)

    def _rewarded(self, networks: Networks, reward: Reward, step: Step,
                  shared: tuple[Tensor, Tensor, Estimate, Tensor], fidelity: Tensor, logs: dict) -> tuple[Tensor, dict]:
        """Eq. 9: the fidelity direction with the reward's beside it."""
        x_t, t, real, weight = shared

        def rewards(x: Tensor, rows: slice) -> Tensor:
            return reward(unit(networks.space.decode(x)), step.y[rows])

        value = networks.of_pictures(rewards)
        if self.reward_on == "sample":
            aligned = clean_alignment(value, step.x)
        else:
            assert networks.posterior is not None
            aligned = on_x(condition_alignment(value, networks.posterior, x_t, t, step.y), real, weight)
        aligned = aligned * self.reward_weight
        if self.reward_clip:
            aligned = clipped_to(aligned, fidelity, self.reward_clip)
        with torch.no_grad():
            now = rewards(step.x.detach(), slice(None)).mean()
        return fidelity + aligned, logs | {"reward": now, "reward_direction": rms(aligned)}


def guide_of(name: str, teacher: Family, run: Run) -> ScoreModel:
    """Another teacher's score, with its own text encoder and schedule, for guidance on this teacher's latents.

    Raises:
        UsageError: its latents are not this teacher's: the autoencoders' configurations or encodings differ.
    """
    guide = load_model(name).at(run.data.size).to(run.device)
    keys = ("latent_channels", "block_out_channels", "scaling_factor", "shift_factor")
    for key in keys:
        ours, theirs = (model.space.vae.config.get(key) for model in (teacher, guide))  # type: ignore[union-attr]
        if ours != theirs:
            raise UsageError(f"{name} cannot guide this teacher: its autoencoder has {key} {theirs}, the teacher's "
                             f"{ours}; both must share one latent space")
    probe = torch.rand(1, 3, *height_width(run.data.size), generator=torch.Generator().manual_seed(0)).to(run.device)
    a, b = teacher.space.encode(probe * 2 - 1), guide.space.encode(probe * 2 - 1)
    apart = float((a - b).abs().mean() / a.abs().mean().clamp(min=1e-6))
    if apart > 0.05:  # half precision on disk moves an encoding by less than 1%
        raise UsageError(f"{name} cannot guide this teacher: its autoencoder encodes a probe picture "
                         f"{100 * apart:.0f}% apart (at most 5%); both must share one latent space")
    return guide.score_of(prepared.text(run, guide.text(one_by_one=True)), guide.denoiser())


def guidance_of(guide: ScoreModel, schedule: NoiseSchedule, x_t: Tensor, t: Tensor,
                y: list[str]) -> tuple[Estimate, Estimate]:
    """The guide's conditional and unconditional estimates of x_t, read at this schedule's (alpha, sigma).

    Two schedules meet at equal signal-to-noise ratio: the guide sees x_t rescaled to its own alpha there. Its levels
    are discrete, so the ratios agree to half a level.
    """
    alpha, sigma = schedule.alpha(t, x_t), schedule.sigma(t, x_t)
    own = matched(guide.schedule, schedule, t)
    scale = guide.schedule.alpha(own, x_t) / alpha
    both = guide.conditional_and_unconditional(x_t * scale, own, y)
    cond, uncond = (Estimate(precise(x_t), e.eps, alpha, sigma) for e in both)
    return cond, uncond
