"""Ablations: one change a row, and what could make JDM better."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jdm.levels import Bound, Levels
from jdm.methods.networks import Branch
from jdm.posterior import FakePosterior, FrozenPosterior
from jdm.recipes.scales import LOW, OWN, Scale
from jdm.recipes.students import canny
from jdm.recipes.yardsticks import nct
from jdm.run import Run
from jdm.terms import CleanCondition, CleanReward, Reward


def joint(s: Scale) -> Run:
    """The opposite of phase 2: phase 1's UNet is trained further on the new control, together with its ControlNet."""
    return s.run(f"{s.name}-joint", replace(s.frozen(s.student_folder, trains=True), control=s.shared))


def no_warm_up(s: Scale) -> Run:
    """A frozen Diff-Instruct UNet in place of phase 1."""
    return s.run(f"{s.name}-no-warm-up", s.frozen(s.generator))


def clean_likelihood(s: Scale) -> Run:
    """log p(c | x) on the clean sample in place of log p(c | x_t)."""
    return s.run(f"{s.name}-clean-likelihood", s.jdm(CleanCondition(bound=s.bound)))


def fake_x0(s: Scale) -> Run:
    """The fake score's own x0 as the posterior's sample, the paper's easy way."""
    return s.run(f"{s.name}-fake-x0", s.jdm(s.condition(posterior=FakePosterior())))


def canny_own_t(s: Scale) -> Run:
    """The condition term draws a t and noise of its own."""
    return replace(canny(s), method=s.jdm(s.condition(levels=OWN, normaliser="fake")),
                   out=canny(s).out.with_name(f"{s.name}-canny-own-t"))


def low_t(s: Scale) -> Run:
    """The condition term at low noise levels of its own: two schedules, as Decoupled DMD has."""
    return s.run(f"{s.name}-low-t", s.jdm(s.condition(levels=LOW, normaliser="fake")))


def controlled_fake(s: Scale) -> Run:
    """The exact joint KL: a fake score that sees c in the fidelity term."""
    return s.run(f"{s.name}-controlled-fake", replace(s.frozen(s.generator), fake=s.fakes(controlnet=s.control)))


def draws(s: Scale) -> Run:
    """Four samples of p(x | x_t) in the condition term."""
    return s.run(f"{s.name}-draws", s.frozen(s.generator, draws=4))


def frozen_posterior(s: Scale) -> Run:
    """A frozen posterior of real pictures in the condition term."""
    posterior = FrozenPosterior(s.model("posterior"))
    return s.run(f"{s.name}-frozen-posterior", s.frozen(s.generator, posterior=posterior))


def from_nct(s: Scale) -> Run:
    """JDM that goes on from the ControlNet of NCT."""
    method = replace(s.frozen(s.generator), controlnet=Branch(s.model("nct"), s.control))
    return s.run(f"{s.name}-from-nct", method)


def one_t(s: Scale) -> Run:
    """One noise level for both terms, as Eq. 5 has it, in place of two schedules."""
    return s.run(f"{s.name}-one-t", s.frozen(s.generator, levels=Levels(), normaliser="real"))


def unfrozen(s: Scale) -> Run:
    """The Diff-Instruct UNet trained on, together with the ControlNet."""
    return s.run(f"{s.name}-unfrozen", s.frozen(s.generator, trains=True))


def nct_no_consistency(s: Scale) -> Run:
    """NCT without its consistency loss."""
    return _nct(s, "no-consistency", consistency=False)


def nct_no_boundary(s: Scale) -> Run:
    """NCT without its boundary loss."""
    return _nct(s, "no-boundary", boundary=False)


def nct_no_dual(s: Scale) -> Run:
    """NCT with a fixed multiplier."""
    return _nct(s, "no-dual", dual_rate=0.0)


def text_guided(s: Scale) -> Run:
    """A better teacher's guidance, fidelity on the prompt."""
    return _text(s, "guided", guide=s.guide)


def text_reward_clean(s: Scale) -> Run:
    """The reward on the clean sample."""
    return _text(s, "reward-clean", reward=CleanReward(model=s.reward))


def text_reward_strong(s: Scale) -> Run:
    """The reward on the noisy posterior, up to four times the fidelity term's length: where hacking shows."""
    reward = Reward(model=s.reward, posterior=s.condition().posterior, weight=20.0, bound=Bound(4.0, 4.0))
    return _text(s, "reward-strong", reward=reward)


def text_reward_clean_strong(s: Scale) -> Run:
    """The same strength on the clean sample."""
    return _text(s, "reward-clean-strong", reward=CleanReward(model=s.reward, weight=20.0, bound=Bound(4.0, 4.0)))


def _nct(s: Scale, name: str, **changes: Any) -> Run:
    return s.run(f"{s.name}-nct-{name}", replace(nct(s).method, **changes))


def _text(s: Scale, name: str, **parts: Any) -> Run:
    return s.run(f"{s.name}-text-{name}", s.text(**parts), model=s.text_teacher, probe_every=100)
