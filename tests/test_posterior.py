"""f(x_t, t): the plug-in of Eqs. 7-8 and consistency training, in closed form."""

import pytest
import torch

from jdm.directions import condition_alignment
from jdm.posterior import Posterior
from jdm.schedule import NoiseSchedule
from jdm.score import Estimate
from mixtures import MixtureWorld
from worlds import LinearGaussianWorld, cubature, tensor

SCHEDULE = NoiseSchedule.scaled_linear()
WORLD = LinearGaussianWorld.example(SCHEDULE)
DATA = WORLD.data
MIXTURE = MixtureWorld.example(SCHEDULE)
PROBED = (0.02, 0.1, 0.25, 0.5, 0.75, 0.98)


def noisy(t: float, n: int = 256):
    """x_t, t, c of a linear-Gaussian world's own joint law."""
    noise = torch.randn(n, 8, generator=torch.Generator().manual_seed(2)).double()
    x = DATA.mean + noise[:, :3] @ torch.linalg.cholesky(DATA.cov).T
    c = x @ WORLD.A.T + noise[:, 3:5] @ torch.linalg.cholesky(WORLD.R).T
    t = torch.full((n,), t, dtype=torch.float64)
    return SCHEDULE.noised(x, t, noise[:, 5:]), t, c


def test_at_t_zero_the_posterior_is_the_identity():
    x = torch.randn(5, 3, dtype=torch.float64)
    assert torch.equal(Posterior(DATA.score, SCHEDULE)(x, torch.zeros(5)), x)
    torch.testing.assert_close(DATA.consistency(x, torch.zeros(5)), x)


def test_the_score_at_t_zero_is_ignored():
    def score(x_t, t, y=None):
        return Estimate.of(0.25 * x_t / t[:, None], "sample", x_t, t, SCHEDULE)

    x, t = torch.randn(2, 3), torch.tensor([0.0, 0.5])
    assert not score(x, t).x0[0].isfinite().any()
    assert torch.equal(Posterior(score, SCHEDULE)(x, t)[0], x[0])
    torch.testing.assert_close(Posterior(score, SCHEDULE)(x, t)[1], 0.5 * x[1])


def test_t_zero_is_the_identity_row_by_row():
    x = torch.randn(2, 3, dtype=torch.float64)
    mixed = Posterior(DATA.score, SCHEDULE)(x, tensor([0.0, 0.5]))
    assert torch.equal(mixed[0], x[0])
    torch.testing.assert_close(mixed[1:], DATA.posterior_mean(x[1:], tensor([0.5])))


@pytest.mark.parametrize("t", PROBED)
def test_the_exact_scores_posterior_is_the_mean(t):
    x_t, t, _ = noisy(t)
    ours = Posterior(DATA.score, SCHEDULE)(x_t, t)
    torch.testing.assert_close(ours, DATA.posterior_mean(x_t, t), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("t", PROBED)
@pytest.mark.parametrize("f", ["posterior_mean", "consistency"])
def test_the_plug_ins_bias_is_the_missing_width(t, f, record_property):
    x_t, t, c = noisy(t)
    gain = DATA.posterior_gain(t) if f == "posterior_mean" else DATA.consistency_gain(t)
    exact = WORLD.condition_gradient(c, x_t, t)
    ours = condition_alignment(lambda x: WORLD.log_prob(c, x), getattr(DATA, f), x_t, t)
    torch.testing.assert_close(ours, WORLD.plug_in_gradient(c, x_t, t, gain), atol=1e-4, rtol=1e-4)
    ratio, cosine = compared(ours, exact)
    record_property("norm_ratio", ratio)
    record_property("cosine", cosine)
    print(f"{f} t={float(t[0]):.2f}: |plug-in| / |exact| = {ratio:.2f}, cosine = {cosine:.3f}")
    # With f the posterior mean, exact = (A K)^T (R + A P A^T)^-1 r and plug-in = (A K)^T R^-1 r.
    if f == "posterior_mean":
        A, P, K = WORLD.A, DATA.posterior_cov(t)[0], gain[0]
        turned = ours @ torch.linalg.pinv(A @ K) @ WORLD.R @ torch.linalg.inv(WORLD.R + A @ P @ A.T) @ (A @ K)
        torch.testing.assert_close(turned, exact, atol=1e-4, rtol=1e-4)
    assert ratio > 1


@pytest.mark.parametrize("t", [0.001, *PROBED])
def test_on_a_mixture_the_plug_in_overshoots(t, record_property):
    random = torch.Generator().manual_seed(4)
    c = torch.multinomial(MIXTURE.weights, 512, replacement=True, generator=random)
    x = MIXTURE.means[c] + MIXTURE.variances[c, None].sqrt() * torch.randn(512, 2, generator=random)
    t = torch.full((512,), t, dtype=torch.float64)
    x_t = SCHEDULE.noised(x, t, torch.randn(512, 2, generator=random))
    ratio, cosine = compared(MIXTURE.plug_in_gradient(c, x_t, t), MIXTURE.condition_gradient(c, x_t, t))
    record_property("norm_ratio", ratio)
    record_property("cosine", cosine)
    print(f"mixture t={float(t[0]):.2f}: |plug-in| / |exact| = {ratio:.2f}, cosine = {cosine:.3f}")
    if float(t[0]) == 0.001:
        assert ratio == pytest.approx(1, abs=0.02)
        assert cosine > 0.999
    else:
        assert ratio > 1.5
        assert 0.7 < cosine < 0.95


def compared(ours: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Root-mean-square norm of `ours` over that of `exact`, and the cosine of the two stacks."""
    return float(ours.norm() / exact.norm()), float((ours * exact).sum() / ours.norm() / exact.norm())


# --- draws: f(x_t) noised to the same t and mapped back ---


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_draws_have_the_posteriors_mean_and_covariance(t):
    x_t, t, c = noisy(t, 8)
    drawn = []

    def log_prob(x):
        drawn.append(x.detach())
        return WORLD.log_prob(c, x)

    draws = [eps.expand(8, 3) for eps in cubature(3)]
    condition_alignment(log_prob, DATA.consistency, x_t, t, schedule=SCHEDULE, draws=draws)
    x = torch.stack(drawn)
    mean = x.mean(0)
    torch.testing.assert_close(mean, DATA.posterior_mean(x_t, t), atol=1e-6, rtol=1e-6)
    cov = torch.einsum("kbi,kbj->bij", x - mean, x - mean) / len(x)
    torch.testing.assert_close(cov, DATA.posterior_cov(t), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_one_draw_averages_to_the_means_plug_in(t):
    x_t, t, c = noisy(t, 8)
    ours = torch.stack([
        condition_alignment(lambda x: WORLD.log_prob(c, x), DATA.consistency, x_t, t, schedule=SCHEDULE,
                            draws=[eps.expand(8, 3)]) for eps in cubature(3)]).mean(0)
    exact = WORLD.plug_in_gradient(c, x_t, t, DATA.posterior_gain(t))
    torch.testing.assert_close(ours, exact, atol=1e-4, rtol=1e-4)


ONE = tensor([[1.0]])
LINE = LinearGaussianWorld(tensor([0.0]), ONE, ONE, 0.09 * ONE, SCHEDULE)


def error_of_draws(world: LinearGaussianWorld, level: float, draws: int, points: int = 6400, repeats: int = 4):
    """(relative error, cosine) of the expected gradient against that of log p(c | x_t), over (x_t, c) of the world.

    draws = 0 is the plug-in. Squares are products of two independent halves, so that the noise of an average does not
    count as error.
    """
    random = torch.Generator().manual_seed(0)
    d, k = len(world.data.mean), len(world.c_mean)
    u, v, w = torch.randn(points, 2 * d + k, generator=random).double().split([d, d, k], 1)
    x = world.data.mean + u @ torch.linalg.cholesky(world.data.cov).T
    c, t = x @ world.A.T + w @ torch.linalg.cholesky(world.R).T, torch.full((points,), level).double()
    x_t = SCHEDULE.noised(x, t, v)
    gain, alpha = world.data.consistency_gain(t[:1])[0], float(SCHEDULE.alpha(t[:1]))
    many, precision = c.repeat(repeats, 1), torch.linalg.inv(world.R)

    def log_prob(x):
        residual = many - x @ world.A.T
        return -0.5 * ((residual @ precision) * residual).sum(1)

    ours = condition_alignment(
        log_prob, lambda x_t, t, y: world.data.mean + (x_t - alpha * world.data.mean) @ gain.T, x_t.repeat(repeats, 1),
        t.repeat(repeats), schedule=SCHEDULE,
        draws=[torch.randn(points * repeats, d, generator=random).double() for _ in range(draws)])
    ours, exact = ours.view(2, -1, points, d).mean(1), world.condition_gradient(c, x_t, t)
    square = ((ours[0] - exact) * (ours[1] - exact)).sum().clamp(min=0)
    length = (ours[0] * ours[1]).sum().clamp(min=0).sqrt()
    return float(square.sqrt() / exact.norm()), float((ours.mean(0) * exact).sum() / length / exact.norm())


@pytest.mark.parametrize("t", [0.05, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("world", [WORLD, LINE], ids=["two-of-three", "line"])
def test_more_draws_shrink_the_condition_terms_bias(world, t, record_property):
    errors = {k: error_of_draws(world, t, k) for k in (0, 1, 4, 16, 64)}
    record_property("errors", errors)
    print(f"t={t}: " + ", ".join(f"K={k}: {error:.2f} (cosine {cosine:.2f})" for k, (error, cosine) in errors.items()))
    for fewer, more in ((1, 4), (4, 16), (16, 64)):
        assert errors[more][0] < 0.8 * errors[fewer][0]


# --- consistency training ---


class LinearScore:
    """f_k(x_t) = mean + gains_k (x_t - alpha mean) on the levels of a Posterior, read as a Score."""

    def __init__(self, gains: torch.Tensor, levels: torch.Tensor):
        self.gains, self.levels = gains, levels

    def __call__(self, x_t, t, y=None):
        alpha, sigma = (v.double()[:, None] for v in (SCHEDULE.alpha(t), SCHEDULE.sigma(t)))
        gain = self.gains[torch.searchsorted(self.levels, t)]
        f = DATA.mean + torch.einsum("bij,bj->bi", gain, x_t - alpha * DATA.mean)
        return Estimate(x_t, f, alpha, sigma, "sample")


def every_pair(levels: int):
    """x, eps, uniform: the exact expectation over x, eps and the level k of the consistency loss."""
    noise = cubature(6).repeat(levels, 1)
    uniform = ((torch.arange(levels) + 0.5) / levels).repeat_interleave(12)
    return DATA.mean + noise[:, :3] @ torch.linalg.cholesky(DATA.cov).T, noise[:, 3:], uniform


def regressed(levels: torch.Tensor) -> torch.Tensor:
    """Gains of consistency training's minimiser: f_k is the regression of f_{k-1}(x_{t_{k-1}}) on x_{t_k}."""
    alpha, sigma = SCHEDULE.alpha(levels).double(), SCHEDULE.sigma(levels).double()
    gains = [torch.eye(3).double()]
    for k in range(1, len(levels)):
        cross = alpha[k - 1] * alpha[k] * DATA.cov + sigma[k - 1] * sigma[k] * torch.eye(3)
        own = alpha[k] ** 2 * DATA.cov + sigma[k] ** 2 * torch.eye(3)
        gains.append(gains[-1] @ cross @ torch.linalg.inv(own))
    return torch.stack(gains)


def test_levels_are_grid_points_from_clean_up():
    levels = Posterior(DATA.score, SCHEDULE).levels
    assert levels[0] == 0
    assert len(levels) == 19
    assert torch.equal(SCHEDULE.t(SCHEDULE.timestep(levels[1:])), levels[1:])
    assert (levels.diff() > 0).all()
    torch.testing.assert_close(levels[[1, -1]], tensor([0.02, 0.98]))


def test_the_exact_scores_consistency_loss_is_known():
    posterior = Posterior(DATA.score, SCHEDULE)
    levels = posterior.levels
    x, eps, uniform = every_pair(18)
    alpha, sigma = SCHEDULE.alpha(levels).double(), SCHEDULE.sigma(levels).double()
    K = DATA.posterior_gain(levels)
    expected = 0
    for k in range(1, 19):
        on_x = alpha[k] * K[k] - alpha[k - 1] * K[k - 1]
        on_eps = sigma[k] * K[k] - sigma[k - 1] * K[k - 1]
        expected += (on_x @ DATA.cov @ on_x.T + on_eps @ on_eps.T).trace() / 3 / 18
    ours = posterior.consistency_loss(x, None, uniform, eps)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)


def test_the_consistency_target_carries_no_gradient():
    posterior = Posterior(DATA.score, SCHEDULE)
    gains = DATA.posterior_gain(posterior.levels).requires_grad_()
    posterior.score = LinearScore(gains, posterior.levels)
    x, eps, uniform = every_pair(18)
    posterior.consistency_loss(x.requires_grad_(), None, uniform, eps).backward()
    assert x.grad is None
    alpha, sigma = SCHEDULE.alpha(posterior.levels).double(), SCHEDULE.sigma(posterior.levels).double()
    K, one = gains.detach(), torch.eye(3)
    expected = torch.zeros_like(K)
    for k in range(1, 19):
        own = alpha[k] ** 2 * DATA.cov + sigma[k] ** 2 * one
        cross = alpha[k - 1] * alpha[k] * DATA.cov + sigma[k - 1] * sigma[k] * one
        expected[k] = 2 / 3 / 18 * (K[k] @ own - K[k - 1] @ cross)
    torch.testing.assert_close(gains.grad, expected, atol=1e-6, rtol=1e-6)


def test_regression_is_consistency_trainings_fixed_point():
    posterior = Posterior(DATA.score, SCHEDULE)
    gains = regressed(posterior.levels).requires_grad_()
    posterior.score = LinearScore(gains, posterior.levels)
    x, eps, uniform = every_pair(18)
    posterior.consistency_loss(x, None, uniform, eps).backward()
    assert gains.grad.abs().max() < 1e-8


@pytest.mark.parametrize(("n", "low", "high", "most"), [
    (18, 0.02, 0.98, 0.116), (50, 0.02, 0.98, 0.067), (961, 0.02, 0.98, 0.040), (1000, 0.001, 1.0, 0.005)])
def test_finer_grids_near_the_ode_from_below(
    n, low, high, most, record_property
):
    levels = Posterior(DATA.score, SCHEDULE, levels=n, low=low, high=high).levels
    gains, exact = regressed(levels), DATA.consistency_gain(levels)
    short = 1 - torch.linalg.eigvalsh(gains) / torch.linalg.eigvalsh(exact)
    record_property("shortfall", float(short.max()))
    print(f"{n} levels from {low}: f falls short of the ODE's endpoint by up to {float(short.max()):.1%}")
    assert (short > -1e-9).all()
    # Each step multiplies f by the cosine of an angle between (alpha std, sigma) at its two levels, so coarse
    # levels pull f to the mean. From low = .02 most of what is left is the first step: no count mends it.
    assert short.max() < most
