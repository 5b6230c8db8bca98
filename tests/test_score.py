"""Readings of a network's output, and classifier-free guidance."""

import pytest
import torch

from jdm.errors import UsageError
from jdm.schedule import FlowSchedule, NoiseSchedule
from jdm.score import Estimate, ScoreModel

SCHEDULE = NoiseSchedule.scaled_linear()
ZERO = NoiseSchedule(torch.cat([SCHEDULE.alphas_cumprod[:-1], torch.zeros(1)]))
FLOW = FlowSchedule(shift=3.0)
KINDS = [("epsilon", SCHEDULE), ("v_prediction", SCHEDULE), ("sample", SCHEDULE), ("flow", FLOW)]


def rows(schedule, n=64, dtype=torch.float64):
    """x, eps, x_t, t; t over the whole grid."""
    random = torch.Generator().manual_seed(1)
    x, eps = torch.randn(2, n, 3, generator=random).to(dtype)
    t = schedule.grid(torch.rand(n, generator=random), 0.02, 1.0)
    t[0] = schedule.t(0)
    return x, eps, schedule.noised(x, t, eps), t


def output_of(prediction, x, eps, alpha, sigma):
    return {"epsilon": eps, "v_prediction": alpha * eps - sigma * x, "sample": x, "flow": eps - x}[prediction]


@pytest.mark.parametrize(("prediction", "schedule"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_output_has_the_same_four_readings(prediction, schedule, dtype):
    x, eps, x_t, t = rows(schedule, dtype=dtype)
    alpha, sigma = schedule.alpha(t, x), schedule.sigma(t, x)
    if prediction in ("v_prediction", "flow") and dtype == torch.float64:
        # The levels are float32, so that alpha^2 + sigma^2 and alpha + sigma are 1 to 1e-7.
        tolerance = 1e-6
    else:  # x from eps, or eps from x: rounding over alpha or sigma, at worst .03
        tolerance = 1e-4 if dtype == torch.float32 else 1e-8
    estimate = Estimate.of(output_of(prediction, x, eps, alpha, sigma), prediction, x_t, t, schedule)
    for ours, exact in ((estimate.eps, eps), (estimate.x0, x), (estimate.v, alpha * eps - sigma * x),
                        (estimate.score * sigma, -eps)):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, exact, atol=tolerance, rtol=tolerance)


def test_epsilon_is_read_as_it_always_was():
    _, eps, x_t, t = rows(SCHEDULE, dtype=torch.float32)
    alpha, sigma = SCHEDULE.alpha(t, x_t), SCHEDULE.sigma(t, x_t)
    estimate = Estimate(x_t, eps, alpha, sigma)
    x0 = (x_t - sigma * eps) / alpha
    assert torch.equal(estimate.x0, x0)
    assert torch.equal(estimate.v, alpha * eps - sigma * x0)
    assert torch.equal(estimate.score, -eps / sigma)


@pytest.mark.parametrize(("prediction", "schedule"), [("v_prediction", ZERO), ("flow", FLOW)])
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_both_ends_are_ordinary_levels(prediction, schedule, t):
    x, eps, _, _ = rows(schedule, dtype=torch.float32)
    t = torch.full((len(x),), t)
    alpha, sigma = schedule.alpha(t, x), schedule.sigma(t, x)
    estimate = Estimate.of(output_of(prediction, x, eps, alpha, sigma), prediction, schedule.noised(x, t, eps), t,
                           schedule)
    torch.testing.assert_close(estimate.x0, x, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(estimate.eps, eps, atol=1e-6, rtol=1e-6)


def test_x0_of_v_is_accurate_near_zero_signal():
    """By way of eps its rounding would be divided by alpha = 4e-4."""
    x, eps, _, _ = rows(SCHEDULE)
    alpha = torch.tensor(4e-4, dtype=torch.float64)
    sigma = (1 - alpha**2).sqrt()
    parts = [v.float() for v in (alpha * x + sigma * eps, alpha * eps - sigma * x, alpha, sigma)]
    x0 = Estimate(*parts, "v_prediction").x0.double()
    assert (x0 - x).abs().max() < 3e-7
    by_eps = Estimate(parts[0], Estimate(*parts, "v_prediction").eps, *parts[2:]).x0.double()
    assert (by_eps - x).abs().max() > 1e-4


def test_an_unknown_prediction_is_refused():
    x, _, _, t = rows(SCHEDULE)
    with pytest.raises(UsageError, match="must be one of epsilon, v_prediction, sample, flow, got 'velocity'"):
        Estimate.of(x, "velocity", x, t, SCHEDULE)


# --- guidance ---


class Net:
    """eps = text [B, 1] x_t + timestep; counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x_t, timestep, text):
        self.calls += 1
        return (0 if text is None else text) * x_t + timestep[:, None]


def lengths(y):
    return torch.tensor([[float(len(prompt))] for prompt in y])


def test_guidance_extrapolates_from_the_empty_prompt():
    net, x_t, t = Net(), torch.randn(2, 3), SCHEDULE.t(torch.tensor([10, 700]))
    model = ScoreModel(net, SCHEDULE, text=lengths, guidance=3.0)
    timestep = torch.tensor([[10.0], [700.0]])
    prompts = ("a", "cat")
    cond, uncond = model.conditional_and_unconditional(x_t, t, prompts)
    assert net.calls == 1
    size = torch.tensor([[1.0], [3.0]])
    torch.testing.assert_close(cond.eps, size * x_t + timestep)
    torch.testing.assert_close(uncond.eps, timestep.expand(-1, 3))
    torch.testing.assert_close(model.guided(x_t, t, prompts).eps, 3 * size * x_t + timestep)
    torch.testing.assert_close(model(x_t, t, prompts).eps, cond.eps)
    torch.testing.assert_close(model(x_t, t).eps, uncond.eps)


@pytest.mark.parametrize(("prediction", "schedule"), KINDS)
def test_guided_outputs_are_guided_in_every_reading(prediction, schedule):
    x_t, t = torch.randn(2, 3, dtype=torch.float64), schedule.t(torch.tensor([300, 700]))
    model = ScoreModel(Net(), schedule, prediction, lengths, guidance=3.0)
    cond, uncond = model.conditional_and_unconditional(x_t, t, ("a", "cat"))
    guided = model.guided(x_t, t, ("a", "cat"))
    for name in ("x0", "eps", "v", "score"):
        a, b = getattr(cond, name), getattr(uncond, name)
        torch.testing.assert_close(getattr(guided, name), b + 3 * (a - b))


def test_guidance_of_one_is_one_plain_pass():
    net, x_t, t = Net(), torch.randn(2, 3), SCHEDULE.t(torch.tensor([10, 700]))
    model = ScoreModel(net, SCHEDULE, text=lengths)
    torch.testing.assert_close(model.guided(x_t, t, ("a", "cat")).eps, model(x_t, t, ("a", "cat")).eps)
    assert net.calls == 2


@pytest.mark.parametrize(("prediction", "schedule"), KINDS)
def test_errors_are_of_the_reading_asked_for(prediction, schedule):
    x, eps, bump = (torch.randn(4, 3, generator=torch.Generator().manual_seed(k)).double() for k in range(3))
    t = schedule.t(torch.tensor([100, 400, 700, 900]))
    x_t, alpha, sigma = schedule.noised(x, t, eps), schedule.alpha(t, x), schedule.sigma(t, x)
    found = Estimate.of(output_of(prediction, x, eps, alpha, sigma) + bump, prediction, x_t, t, schedule)
    torch.testing.assert_close(found.error(x, eps, "own"), bump)
    torch.testing.assert_close(found.error(x, eps, "eps"), found.eps - eps)
    torch.testing.assert_close(found.error(x, eps, "x0"), found.x0 - x)
    assert not torch.allclose(found.error(x, eps, "x0"), found.error(x, eps, "own")) or prediction == "sample"
