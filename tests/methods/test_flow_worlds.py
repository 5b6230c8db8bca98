"""Flow velocities of Gaussians: every reading equals its closed form, at t from 0 to 1 with both ends."""

import pytest
import torch

from jdm.directions import distribution_matching
from jdm.posterior import Posterior
from jdm.schedule import FlowSchedule, NoiseSchedule, matched
from jdm.score import Estimate
from worlds import Gaussian, LinearGaussianWorld

T = torch.linspace(0, 1, 21, dtype=torch.float64)
SHIFTS = pytest.mark.parametrize("shift", [1.0, 3.0])


def line(t, schedule):
    """(alpha, sigma) [B, 1] in float64, from the definition."""
    s = schedule.shift * t / (1 + (schedule.shift - 1) * t)
    return (1 - s)[:, None], s[:, None]


def velocity(gaussian, x_t, t):
    """E[eps - x | x_t] of x ~ N(mean, cov) in closed form: the drift of the flow."""
    alpha, sigma = line(t, gaussian.schedule)
    cov = alpha[..., None] ** 2 * gaussian.cov + sigma[..., None] ** 2 * torch.eye(len(gaussian.cov)).double()
    inner = torch.linalg.solve(cov, (x_t - alpha * gaussian.mean).unsqueeze(2))
    x = gaussian.mean + (alpha[..., None] * gaussian.cov @ inner).squeeze(2)
    return (sigma[..., None] * inner).squeeze(2) - x


def estimate(gaussian, x_t, t):
    return Estimate.of(velocity(gaussian, x_t, t), "flow", x_t, t, gaussian.schedule)


def setting(shift):
    world = LinearGaussianWorld.example(FlowSchedule(shift))
    x_t = torch.randn(len(T), 3, generator=torch.Generator().manual_seed(0)).double()
    return world.data, x_t


@SHIFTS
def test_readings_of_a_velocity_are_the_closed_forms(shift):
    """x0 and eps at every t; the score from any noise on: at t = 0 a velocity says nothing of it."""
    data, x_t = setting(shift)
    found, (alpha, sigma) = estimate(data, x_t, T), line(T, data.schedule)
    # The schedule keeps alpha and sigma in float32.
    torch.testing.assert_close(found.x0, data.posterior_mean(x_t, T), atol=1e-6, rtol=1e-6)
    cov = alpha[..., None] ** 2 * data.cov + sigma[..., None] ** 2 * torch.eye(3).double()
    inner = torch.linalg.solve(cov, (x_t - alpha * data.mean).unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(found.eps, sigma * inner, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.score[1:], -inner[1:], atol=1e-5, rtol=1e-5)
    assert torch.equal(found.x0[0], x_t[0])
    assert float(found.alpha[-1]) == 0
    torch.testing.assert_close(found.x0[-1], data.mean, atol=1e-6, rtol=0)


@SHIFTS
def test_a_posterior_on_velocities_is_exact(shift):
    data, x_t = setting(shift)
    posterior = Posterior(lambda x, t, y: estimate(data, x, t), data.schedule)
    torch.testing.assert_close(posterior(x_t, T), data.posterior_mean(x_t, T), atol=1e-6, rtol=1e-6)
    assert torch.equal(posterior(x_t, T)[0], x_t[0])
    one = x_t[10:11].requires_grad_()
    slope = torch.stack([torch.autograd.grad(posterior(one, T[10:11])[0, i], one)[0][0] for i in range(3)])
    torch.testing.assert_close(slope, data.posterior_gain(T[10:11])[0], atol=1e-6, rtol=1e-6)


@SHIFTS
def test_training_targets_are_minimised_by_the_velocity(shift):
    """E[error | x_t] of the network's own output is 0 at the closed form, t = 0 and t = 1 included."""
    data, _ = setting(shift)
    root, random = torch.linalg.cholesky(data.cov), torch.Generator().manual_seed(1)
    n = 200_000
    for t in (0.0, 0.5, 1.0):
        x = data.mean + torch.randn(n, 3, generator=random).double() @ root.T
        eps, at = torch.randn(n, 3, generator=random).double(), torch.full((n,), t).double()
        x_t = data.schedule.noised(x, at, eps)
        error = estimate(data, x_t, at).error(x, eps, "own")
        centred = x_t - x_t.mean(0)
        correlation = (error * centred).mean(0) / (error.std(0) * centred.std(0)).clamp(min=1e-9)
        assert error.mean(0).abs().max() < 0.02, "of a mean over 200,000 draws"
        assert correlation.abs().max() < 0.02


@SHIFTS
@pytest.mark.parametrize("level", [20, 400, 900])
def test_scores_meet_across_schedules(shift, level):
    """Real minus fake, the real score a table's and the fake a flow's, at equal alpha / sigma."""
    flow, table = FlowSchedule(shift), NoiseSchedule.scaled_linear()
    world = LinearGaussianWorld.example(table)
    real, fake = world.data, world.marginal(world.ideal())
    fake = Gaussian(fake.mean + 0.3, 0.7 * fake.cov, flow)
    t = table.t(level).expand(5)
    own = matched(flow, table, t)
    x_t = torch.randn(5, 3, generator=torch.Generator().manual_seed(level)).double()
    scale = (flow.alpha(own).double() / table.alpha(t).double())[:, None]
    theirs = estimate(fake, x_t * scale, own)
    alpha, sigma = table.alpha(t, x_t), table.sigma(t, x_t)
    across = distribution_matching(real.score(x_t, t), Estimate(x_t, theirs.eps, alpha, sigma))
    exact = distribution_matching(real.score(x_t, t), Gaussian(fake.mean, fake.cov, table).score(x_t, t))
    torch.testing.assert_close(across, exact, atol=1e-5, rtol=1e-5)
