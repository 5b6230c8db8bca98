"""Noise schedules against diffusers' schedulers and their own definitions."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from jdm.errors import UsageError
from jdm.models.schedulers import alphas_cumprod
from jdm.schedule import FlowSchedule, NoiseSchedule, matched
from worlds import coarse_schedule

SCHEDULE = NoiseSchedule.scaled_linear()
FLOW = FlowSchedule(shift=3.0)
BOTH = pytest.mark.parametrize("schedule", [SCHEDULE, FLOW], ids=["table", "flow"])
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
REFERENCE = DDPMScheduler(**BETAS)
ALL = torch.arange(1000)


def test_alphas_cumprod_are_those_of_stable_diffusion():
    # diffusers multiplies 1000 float32 numbers; here float64.
    ours = SCHEDULE.alphas_cumprod.float()
    torch.testing.assert_close(ours, REFERENCE.alphas_cumprod, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
def test_noised_is_the_schedulers_add_noise(scheduler):
    reference = scheduler.from_config(REFERENCE.config)
    x, eps = torch.randn(2, 1000, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(SCHEDULE.noised(x, SCHEDULE.t(ALL), eps), reference.add_noise(x, eps, ALL),
                               atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("zero", [False, True])
def test_noised_from_a_schedulers_table_is_add_noise(zero):
    reference = DDIMScheduler(**BETAS, rescale_betas_zero_snr=zero)
    schedule = NoiseSchedule(alphas_cumprod({"_class_name": "DDIMScheduler", **reference.config}))
    x, eps = torch.randn(2, 1000, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(schedule.noised(x, schedule.t(ALL), eps), reference.add_noise(x, eps, ALL),
                               atol=1e-6, rtol=1e-6)
    assert (schedule.alpha(torch.ones(1)) == 0) == zero


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flows_levels_are_those_of_diffusers(shift):
    reference = FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = FlowSchedule(shift)
    t = schedule.t(ALL)
    torch.testing.assert_close(schedule.sigma(t).flip(0), reference.sigmas, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(schedule.timestep(t).flip(0), reference.timesteps, atol=1e-3, rtol=1e-6)


def test_a_flow_is_a_straight_line():
    t = torch.rand(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = 3 * t / (1 + 2 * t)
    torch.testing.assert_close(FLOW.sigma(t), s.float())
    torch.testing.assert_close(FLOW.alpha(t) + FLOW.sigma(t), torch.ones(100))
    ends = torch.tensor([0.0, 1.0])
    assert (FLOW.alpha(ends).tolist(), FLOW.sigma(ends).tolist()) == ([1, 0], [0, 1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_index_survives_the_way_through_t(dtype):
    assert torch.equal(SCHEDULE.timestep(SCHEDULE.t(ALL).to(dtype)), ALL)
    assert torch.equal(SCHEDULE.t(999), torch.tensor(1.0, dtype=torch.float64))


@BOTH
def test_t_zero_is_clean_and_levels_get_noisier(schedule):
    x = torch.randn(2, 3)
    assert torch.equal(schedule.noised(x, torch.zeros(2), torch.randn(2, 3)), x)
    t = schedule.t(ALL)
    assert (schedule.sigma(t).diff() > 0).all()
    assert (schedule.alpha(t).diff() < 0).all()


def test_the_table_preserves_variance():
    t = SCHEDULE.t(ALL)
    torch.testing.assert_close(SCHEDULE.alpha(t) ** 2 + SCHEDULE.sigma(t) ** 2, torch.ones(1000))


@BOTH
def test_grid_draws_each_level_equally_often(schedule):
    uniform = (torch.arange(9610) + 0.5) / 9610
    drawn, counts = schedule.grid(uniform, 0.02, 0.98).unique(return_counts=True)
    torch.testing.assert_close(drawn, schedule.t(torch.arange(19, 980)))
    assert (counts == 10).all()
    assert schedule.grid(torch.zeros(1), 0.0, 1.0) == 1 / 1000, "never t = 0"
    assert schedule.grid(torch.tensor([1 - 2**-24]), 0.0, 1.0) == 1


@BOTH
@pytest.mark.parametrize(("t", "message"), [
    (937.0, r"t must be in \[0, 1\], got 0\.500\.\.937.*timestep indices"), (-0.1, "t must be in"),
    (math.nan, r"t must be in \[0, 1\], got nan")])
def test_t_outside_zero_to_one_is_refused(schedule, t, message):
    for of in (schedule.alpha, schedule.sigma, schedule.timestep, schedule.log_snr):
        with pytest.raises(UsageError, match=message):
            of(torch.tensor([0.5, t]))


@pytest.mark.parametrize(("low", "high"), [(0.9, 0.2), (0.5, 1.5)])
def test_an_empty_range_of_t_is_refused(low, high):
    with pytest.raises(UsageError, match="t range"):
        SCHEDULE.grid(torch.zeros(1), low, high)


@pytest.mark.parametrize("levels", [[0.5, 0.9], [0.9, 0.5, 0.5], [0.9, 0.0, 0.0], [1.0, 0.5], [0.9, -0.1],
                                    [math.nan], []])
def test_levels_that_do_not_decrease_are_refused(levels):
    with pytest.raises(UsageError, match=r"strictly decreases inside \(0, 1\)"):
        NoiseSchedule(torch.tensor(levels))


@pytest.mark.parametrize(("shift", "n"), [(0.0, 1000), (-1.0, 1000), (math.nan, 1000), (1.0, 0)])
def test_a_flow_without_a_shift_is_refused(shift, n):
    with pytest.raises(UsageError, match="shift must be above 0"):
        FlowSchedule(shift, n)


def test_zero_terminal_snr_is_an_ordinary_level():
    schedule = NoiseSchedule(torch.tensor([0.9, 0.5, 0.0]))
    assert (schedule.alpha(torch.ones(1)), schedule.sigma(torch.ones(1))) == (0, 1)


def test_a_coarse_schedule_keeps_every_twentieth_level():
    torch.testing.assert_close(coarse_schedule().alphas_cumprod[-1], SCHEDULE.alphas_cumprod[-1])
    assert coarse_schedule().n == 50


# --- two schedules at one signal-to-noise ratio ---

ZERO = NoiseSchedule(alphas_cumprod({"_class_name": "DDIMScheduler", **BETAS, "rescale_betas_zero_snr": True}))
SCHEDULES = [SCHEDULE, FLOW, FlowSchedule(), ZERO]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_matches_itself_everywhere(schedule):
    t = torch.cat([torch.zeros(1).double(), schedule.t(ALL)])
    torch.testing.assert_close(matched(schedule, schedule, t), t)


@pytest.mark.parametrize("ours", [SCHEDULE, ZERO])
def test_a_flow_meets_a_tables_ratio_exactly(ours):
    t = ours.t(ALL)
    own = matched(FLOW, ours, t)
    ratio = FLOW.alpha(own).double() / FLOW.sigma(own).double()
    torch.testing.assert_close(ratio, (ours.alphas_cumprod / (1 - ours.alphas_cumprod)).sqrt(), atol=1e-6, rtol=1e-5)


def test_a_table_matches_flows_to_half_a_level():
    t = FLOW.t(torch.arange(100, 800))
    found, wanted = SCHEDULE.log_snr(matched(SCHEDULE, FLOW, t)), FLOW.log_snr(t)
    levels = SCHEDULE.log_snr(SCHEDULE.t(ALL))
    above = torch.searchsorted(-levels, -wanted).clamp(1, 999)
    assert ((found - wanted).abs() <= (levels[above - 1] - levels[above]) / 2 + 1e-9).all()


@pytest.mark.parametrize(("theirs", "ours", "t"), [
    (NoiseSchedule(SCHEDULE.alphas_cumprod[:500]), SCHEDULE, 1.0),
    (NoiseSchedule(SCHEDULE.alphas_cumprod[500:]), SCHEDULE, 0.1),
    (SCHEDULE, FLOW, 1.0), (SCHEDULE, ZERO, 1.0), (SCHEDULE, FLOW, 0.001)])
def test_a_ratio_out_of_reach_is_refused(theirs, ours, t):
    with pytest.raises(UsageError, match=r"lies outside the other schedule's \S+\.\.\S+; this one's are \S+\.\.\S+: "):
        matched(theirs, ours, torch.tensor([0.5, t], dtype=torch.float64))


def test_half_a_level_out_of_reach_is_matched():
    levels = torch.sigmoid(torch.tensor([3.0, 1.0, -1.0]))
    theirs, beyond = NoiseSchedule(levels), NoiseSchedule(torch.sigmoid(torch.tensor([3.9, -1.9])))
    torch.testing.assert_close(matched(theirs, beyond, beyond.t(torch.arange(2))), theirs.t(torch.tensor([0, 2])))
    further = NoiseSchedule(torch.sigmoid(torch.tensor([4.1, -2.1])))
    for t in further.t(torch.arange(2)):
        with pytest.raises(UsageError, match="lies outside"):
            matched(theirs, further, t[None])
