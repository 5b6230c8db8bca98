"""Noise levels: the four re-noising schedules as distributions, and what they do to a few-step student."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jdm.data.noise import Noise
from jdm.errors import UsageError
from jdm.levels import RENOISING, Levels
from jdm.methods.diff_instruct import DiffInstruct
from jdm.methods.networks import Student
from jdm.methods.refusals import refuse_impossible
from jdm.methods.step import Step, View
from jdm.schedule import FlowSchedule, NoiseSchedule
from jdm.terms import Fidelity

SCHEDULE = NoiseSchedule.scaled_linear()
FOUR = (999, 749, 499, 249)
CONTENT = (1.0, 0.75, 0.5, 0.25)  # t of what each step is given
N = 4000


def views(name: str, last: int, steps=FOUR, schedule: NoiseSchedule = SCHEDULE) -> tuple[View, View]:
    """The views of (distribution matching, augmentation) where denoising step `last` was drawn, N samples each."""
    networks: Any = SimpleNamespace(settings=SimpleNamespace(levels=steps), schedule=schedule)
    step: Any = Step.__new__(Step)
    vars(step).update(_networks=networks, noise=Noise(0, 0), last=last, _x=torch.zeros(N, 1), _has_graph=True, y=[])
    declared: Any = SimpleNamespace(terms={})
    dm, ca = (View(step, networks, declared, levels) for levels in RENOISING[name])
    return dm, ca


def assert_uniform(t: torch.Tensor, low: float, high: float) -> None:
    """Every draw lies on the grid in [low, high], and no share of them is further off than 4000 draws may be."""
    assert float(t.min()) >= low - 1e-9
    assert float(t.max()) <= high + 1e-9
    points = torch.arange(round(low * 1000), round(high * 1000) + 1) / 1000
    expected = torch.arange(1, len(points) + 1) / len(points)
    found = (t[None] <= points[:, None] + 1e-9).double().mean(1)
    assert (found - expected).abs().max() < 1.95 / N**0.5  # Kolmogorov's bound at one in a thousand


@pytest.mark.parametrize("last", range(4))
@pytest.mark.parametrize(("name", "dm_bounded", "ca_bounded"), [
    ("coupled-shared", False, False), ("decoupled-full", False, False), ("decoupled-constrained", True, True),
    ("decoupled-hybrid", False, True)])
def test_each_schedule_draws_its_distributions(name, dm_bounded, ca_bounded, last):
    dm, ca = views(name, last)
    assert_uniform(dm.t, 0.02, min(0.98, CONTENT[last]) if dm_bounded else 0.98)
    assert_uniform(ca.t, 0.02, min(0.98, CONTENT[last]) if ca_bounded else 0.98)
    shared = name == "coupled-shared"
    assert torch.equal(dm.x_t, ca.x_t) == shared
    if not shared:  # levels and noises of their own: four standard errors of a correlation
        assert abs(float(torch.corrcoef(torch.stack([dm.t, ca.t]))[0, 1])) < 4 / N**0.5
        noises = torch.stack([(v.x_t / v.sigma)[:, 0] for v in (dm, ca)])
        assert abs(float(torch.corrcoef(noises)[0, 1])) < 4 / N**0.5


def test_one_step_makes_the_decoupled_schedules_equal():
    full, *others = (views(name, 0, steps=(625,)) for name in list(RENOISING)[1:])
    for other in others:
        for a, b in zip(full, other, strict=True):
            assert torch.equal(a.t, b.t)
            assert torch.equal(a.x_t, b.x_t)


def test_a_flows_levels_are_bounded_before_the_shift():
    flow = FlowSchedule(shift=3.0)
    _, ca = views("decoupled-hybrid", 2, schedule=flow)
    assert_uniform(ca.t, 0.02, 0.5)
    # s = 3 t / (1 + 2 t): t = 0.5 before the shift is sigma = 0.75 after it
    assert float(ca.sigma.max()) == pytest.approx(0.75, abs=2e-3)


def test_a_range_above_the_cleanest_input_is_refused():
    def check(levels: Levels, steps=FOUR) -> None:
        declared = DiffInstruct(Student(steps), fidelity=Fidelity(levels=levels)).distillation()
        refuse_impossible(declared, SCHEDULE, 100)

    noisy = Levels(low=0.3, within="input")
    with pytest.raises(UsageError, match=r"begin at 0.3, above the student's cleanest input, 0.25 \(level 249\); lower "
                                         r"--fidelity.levels.low, or set --fidelity.levels.within all"):
        check(noisy)
    check(replace(noisy, within="all"))
    check(replace(noisy, low=0.25))
    check(noisy, steps=(625,))
