"""The bound of Lemma 3.1 in closed form, and jdm.terms as its gradient (JDM Eq. 5)."""

import math
from types import SimpleNamespace

import pytest
import torch

from jdm.directions import ascend, condition_alignment, distribution_matching
from jdm.schedule import NoiseSchedule
from jdm.terms import NoisyTerm
from mixtures import MixtureWorld
from worlds import Gaussian, LinearGaussianWorld, Student, ascended, coarse_schedule, tensor

FINE = NoiseSchedule.scaled_linear()
COARSE = coarse_schedule()
WORLD = LinearGaussianWorld.example(COARSE)


def levels_of(schedule: NoiseSchedule, low: float = 0.02, high: float = 0.98) -> torch.Tensor:
    """Every grid point of a t-range."""
    t = schedule.t(torch.arange(schedule.n))
    return t[(t >= low - 1e-9) & (t <= high + 1e-9)]


def weights_of(weighting: str, schedule: NoiseSchedule, t: torch.Tensor) -> torch.Tensor:
    """lambda_t in closed form: 1, or sigma^2 / alpha^2."""
    acp = schedule.alphas_cumprod[schedule.timestep(t)]
    return {"constant": torch.ones_like(acp), "x0": (1 - acp) / acp}[weighting]


def student_of(seed: int, d: int = 3, k: int = 2) -> Student:
    random = torch.Generator().manual_seed(seed)
    return Student(*(torch.randn(*shape, generator=random).double() for shape in ((d, k), (d, d), (d,))))


# --- the oracles themselves ---


def test_posteriors_agree_with_conditioning_one_joint_gaussian():
    t = tensor([0.3])
    data, S, A = WORLD.data, WORLD.data.cov, WORLD.A
    a, b = float(COARSE.alpha(t)), float(COARSE.sigma(t))
    # (x, c, x_t) in one covariance.
    joint = torch.cat([torch.cat([S, S @ A.T, a * S], 1),
                       torch.cat([A @ S, WORLD.c_cov, a * A @ S], 1),
                       torch.cat([a * S, a * S @ A.T, a**2 * S + b**2 * torch.eye(3)], 1)])

    def given(u, v):
        gain = joint[u][:, v] @ torch.linalg.inv(joint[v][:, v])
        return gain, joint[u][:, u] - gain @ joint[v][:, u]

    x, c, x_t = slice(0, 3), slice(3, 5), slice(5, 8)
    at, offset = torch.randn(1, 3).double(), torch.randn(1, 2).double()
    close = dict(atol=1e-6, rtol=1e-6)
    gain, cov = given(x, x_t)
    torch.testing.assert_close(data.posterior_gain(t)[0], gain, **close)
    torch.testing.assert_close(data.posterior_cov(t)[0], cov, **close)
    gain, cov = given(c, x_t)
    mean, c_cov = WORLD.c_given(at, t)
    torch.testing.assert_close(mean, WORLD.c_mean + (at - a * data.mean) @ gain.T, **close)
    torch.testing.assert_close(c_cov[0], cov, **close)
    gain, cov = given(x, c)
    mean, x_cov = WORLD.x_given_c(WORLD.c_mean + offset)
    torch.testing.assert_close(mean, data.mean + offset @ gain.T, **close)
    torch.testing.assert_close(x_cov, cov, **close)


def test_the_consistency_function_is_the_odes_endpoint():
    data = Gaussian(WORLD.data.mean, WORLD.data.cov, FINE)
    start = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    t = torch.cat([tensor([0.0]), levels_of(FINE, 0, 1)])
    alpha, sigma = FINE.alpha(t).double(), FINE.sigma(t).double()
    # y = x_t / alpha and u = sigma / alpha obey dy/du = eps(x_t); Heun's method over all 1000 levels.
    y = start / alpha[-1]
    for k in range(1000, 0, -1):
        step = sigma[k - 1] / alpha[k - 1] - sigma[k] / alpha[k]
        slope = data.score(alpha[k] * y, t[k].expand(4)).eps
        guess = y + step * slope
        y = y + step / 2 * (slope + data.score(alpha[k - 1] * guess, t[k - 1].expand(4)).eps)
    # The step of Heun's method limits the agreement.
    torch.testing.assert_close(data.consistency(start, torch.ones(4)), y, atol=1e-3, rtol=1e-3)


def test_mixture_scores_are_gradients_of_log_densities():
    """Tweedie's formula gives the posterior mean."""
    world = MixtureWorld.example(FINE)
    x_t = torch.randn(50, 2, dtype=torch.float64, requires_grad=True)
    t = (torch.arange(50).double() + 1) / 50
    (exact,) = torch.autograd.grad(world.log_density(x_t, t).sum(), x_t)
    torch.testing.assert_close(world.score(x_t, t).score, exact, atol=1e-6, rtol=1e-6)
    c = torch.arange(50) % 3
    (exact,) = torch.autograd.grad(world.log_prob(c, x_t, t).sum(), x_t)
    torch.testing.assert_close(world.condition_gradient(c, x_t, t), exact, atol=1e-6, rtol=1e-6)
    # sigma and alpha are float32 here: alpha^2 + sigma^2 = 1 to 1e-7, divided by alpha at t = 1.
    mean, _ = world.posterior_moments(x_t, t)
    torch.testing.assert_close(world.score(x_t, t).x0, mean, atol=1e-4, rtol=1e-4)


def line_mixture(means, variances) -> MixtureWorld:
    return MixtureWorld(tensor([0.6, 0.4]), tensor(means)[:, None], tensor(variances), FINE)


def test_p_c_given_x_t_integrates_the_posterior():
    world = line_mixture([-0.7, 1.0], [0.2, 0.5])
    x = torch.linspace(-12, 12, 4001).double()[:, None]
    for t in (0.05, 0.4, 0.9):
        x_t, t = tensor([[0.3]]), tensor([t])
        weights, means, variances = (v[0] for v in world.posterior(x_t, t))
        bells = (-0.5 * (x - means[:, 0]) ** 2 / variances).exp() / (2 * math.pi * variances).sqrt()
        density = (weights * bells).sum(1)
        likelihood = world.log_prob(torch.ones(4001).long(), x, torch.zeros(4001)).exp()
        integral = torch.trapezoid(density * likelihood, x[:, 0])
        torch.testing.assert_close(world.log_prob(torch.ones(1).long(), x_t, t).exp()[0], integral)


# --- Lemma 3.1 ---


def test_a_discrete_bounds_gap_is_conditional_entropy():
    data, student = line_mixture([-0.7, 1.0], [0.2, 0.5]), line_mixture([-0.4, 0.6], [0.3, 0.1])
    x_t = torch.linspace(-15, 15, 6001).double()[:, None]
    gaps = []
    for t in (0.02, 0.3, 0.6, 0.98):
        t = torch.full((6001,), t).double()
        ours, theirs = student.log_joint(x_t, t), data.log_joint(x_t, t)
        blind = student.log_density(x_t, t)

        def mean(value, ours=ours):
            return float(torch.trapezoid((ours.exp() * value).sum(1), x_t[:, 0]))

        bound, kl = mean(blind[:, None] - theirs), mean(ours - theirs)
        assert bound - kl == pytest.approx(mean(blind[:, None] - ours), abs=1e-8)
        gaps.append(bound - kl)
        assert 0 <= kl <= bound
    # Nearly zero where x_t tells c, and all of H(c) = .673 nats where it does not.
    assert gaps[0] < gaps[1] < gaps[2] < gaps[3] < 0.6731


@pytest.mark.parametrize("seed", range(3))
def test_the_bounds_gap_is_the_students_entropy(seed):
    """The entropy is H(c | x_t), in nats."""
    student, t = student_of(seed), levels_of(COARSE)
    gap = WORLD.bound(student, t) - WORLD.joint_kl(student, t)
    torch.testing.assert_close(gap, WORLD.control_entropy(student, t), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_bound_is_likelihood_plus_marginal_divergence(seed):
    student, t = student_of(seed), levels_of(COARSE)
    rows, c, z, eps = WORLD.drawn(t)
    x_t = COARSE.noised(student(c, z), rows, eps)
    nats = -WORLD.log_prob_t(c, x_t, rows).view(len(t), -1).mean(1)
    ours = nats + WORLD.fidelity(student, t)
    torch.testing.assert_close(ours, WORLD.bound(student, t), atol=1e-6, rtol=1e-6)


def test_the_ideal_student_has_zero_joint_kl():
    assert WORLD.joint_kl(WORLD.ideal(), levels_of(COARSE)).abs().max() < 1e-8
    assert WORLD.joint_kl(WORLD.ignorant(), levels_of(COARSE)).min() > 0


def test_the_bound_prefers_too_wide_overconfident_students(record_property):
    """Its x is wider than the data, and its x given c narrower than the posterior."""
    t = levels_of(COARSE)
    ideal = WORLD.ideal()
    for weighting in ("constant", "x0"):
        best = WORLD.optimum(objective_of(weighting, t))
        assert objective_of(weighting, t)(best) < objective_of(weighting, t)(ideal)
        wider = float(WORLD.marginal(best).cov.trace() / WORLD.data.cov.trace())
        surer = float(best.spread.trace() / ideal.spread.trace())
        record_property(weighting, (wider, surer))
        print(f"{weighting}: var x / data {wider:.3f}, var(x | c) / ideal {surer:.3f}")
        assert wider > 1
        assert surer < 1
        # z survives only where c says nothing: in d - k = 1 direction, although c is noisy in the others.
        assert torch.linalg.eigvalsh(best.spread)[:2].abs().max() < 1e-6


def objective_of(weighting: str, t: torch.Tensor, world: LinearGaussianWorld = WORLD):
    weights = weights_of(weighting, world.schedule, t)
    return lambda student: (weights * world.bound(student, t)).mean()


# --- jdm.terms as the gradient ---


def loss(student: Student, t, weighting="constant", condition=True, sees_c=False, world=WORLD):
    """JDM's generator loss in exact mode: one lambda_t, no clipping, exact p(c | x_t), exact fake score."""
    t, c, z, eps = world.drawn(t)
    x = student(c, z)
    x_t = world.schedule.noised(x, t, eps).detach()
    still = Student(*(p.detach() for p in (student.B, student.L, student.b)))
    fake = world.seeing_fake(still, c) if sees_c else world.marginal(still).score
    real = world.data.score(x_t, t)
    direction = distribution_matching(real, fake(x_t, t))
    if condition:
        direction = direction + condition_alignment(
            lambda v: world.log_prob_t(c, v, t), lambda v, t, y: v, x_t, t)
    at = SimpleNamespace(alpha=real.alpha, sigma=real.sigma)
    return ascend(x, NoisyTerm(lambda_t=weighting, normaliser="none").on_x(direction, at))


def gradient(value, student: Student) -> torch.Tensor:
    parts = torch.autograd.grad(value, (student.B, student.L, student.b))
    return torch.cat([p.flatten() for p in parts])


@pytest.mark.parametrize("weighting", ["constant", "x0"])
@pytest.mark.parametrize("seed", range(3))
def test_jdms_direction_is_the_gradient_of_the_bound(weighting, seed):
    student, t = student_of(seed).trainable(), levels_of(COARSE)
    exact = gradient(objective_of(weighting, t)(student), student)
    ours = gradient(loss(student, t, weighting), student)
    torch.testing.assert_close(ours, exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_a_fake_seeing_c_gives_joint_kl_gradients(seed):
    student, t = student_of(seed).trainable(), levels_of(COARSE)
    exact = gradient(WORLD.joint_kl(student, t).mean(), student)
    ours = gradient(loss(student, t, sees_c=True), student)
    torch.testing.assert_close(ours, exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_diff_instruct_descends_the_marginal_divergence(seed):
    student, t = student_of(seed).trainable(), levels_of(COARSE)
    exact = gradient(WORLD.fidelity(student, t).mean(), student)
    ours = gradient(loss(student, t, condition=False), student)
    torch.testing.assert_close(ours, exact, atol=1e-4, rtol=1e-4)


def test_diff_instruct_cannot_see_obedience_to_c():
    t = levels_of(COARSE)
    mixed = Student(0.5 * WORLD.ideal().B, torch.zeros(3, 3), torch.zeros(3))
    rest = WORLD.data.cov - mixed.B @ WORLD.c_cov @ mixed.B.T
    mixed = Student(mixed.B, torch.linalg.cholesky(rest), WORLD.data.mean - mixed.B @ WORLD.c_mean)
    for student in (WORLD.ideal().trainable(), WORLD.ignorant().trainable(), mixed.trainable()):
        assert WORLD.fidelity(student, t).abs().max() < 1e-8
        assert gradient(loss(student, t, condition=False), student).abs().max() < 1e-6


def test_only_jdm_teaches_a_blind_student_c():
    start = student_of(0)
    blind, t = Student(0 * start.B, start.L, start.b - WORLD.data.mean).trainable(), levels_of(COARSE)
    at_zero_mean = LinearGaussianWorld(0 * WORLD.data.mean, WORLD.data.cov, WORLD.A, WORLD.R, COARSE)
    (fidelity_only,) = torch.autograd.grad(loss(blind, t, condition=False, world=at_zero_mean), blind.B)
    (with_condition,) = torch.autograd.grad(loss(blind, t, world=at_zero_mean), blind.B)
    assert fidelity_only.abs().max() < 1e-6
    assert with_condition.abs().max() > 0.1


def assert_same_student(ours: Student, exact: Student, tolerance: float):
    """B, b and L L^T: z is isotropic, so L is known up to a rotation."""
    for name in ("B", "b", "spread"):
        torch.testing.assert_close(getattr(ours, name), getattr(exact, name), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("weighting", "low", "high"),
                         [("constant", 0.02, 0.98), ("x0", 0.02, 0.98), ("constant", 0.3, 0.7)])
def test_training_reaches_the_optimum_of_the_bound(weighting, low, high, record_property):
    t = levels_of(COARSE, low, high)
    best = WORLD.optimum(objective_of(weighting, t))
    ours = ascended(WORLD.ignorant(), 300, lambda student: loss(student, t, weighting))
    objective = objective_of(weighting, t)
    record_property("bound", (float(objective(ours)), float(objective(best))))
    assert_same_student(ours, best, 1e-4)


def test_only_the_exact_kl_recovers_the_posterior():
    t, ideal = levels_of(COARSE), WORLD.ideal()
    ours = {"exact": ascended(WORLD.ignorant(), 300, lambda student: loss(student, t, sees_c=True)),
            "bound": ascended(WORLD.ignorant(), 300, lambda student: loss(student, t))}
    assert_same_student(ours["exact"], ideal, 1e-4)
    wide = {k: float((WORLD.marginal(v).cov.trace() / WORLD.data.cov.trace()).sqrt()) for k, v in ours.items()}
    free = {k: float((v.spread.trace() / ideal.spread.trace()).sqrt()) for k, v in ours.items()}
    found = (f"std(x) / the data's: exact {wide['exact']:.4f}, bound {wide['bound']:.4f}; "
             f"std(x | c) / the posterior's: exact {free['exact']:.4f}, bound {free['bound']:.4f}")
    print(found)
    assert abs(wide["exact"] - 1) < 0.02, found
    assert abs(free["exact"] - 1) < 0.02, found
    assert wide["bound"] > 1.02, found
    assert free["bound"] < 0.98, found


# --- the 1-D table: x ~ N(0, 1), c = x exactly ---


def line_optimum(schedule: NoiseSchedule, t: torch.Tensor, weighting: str) -> tuple[float, float]:
    """std(x) and std(x | c) of the bound's optimum."""
    one = tensor([[1.0]])
    world = LinearGaussianWorld(tensor([0.0]), one, one, 0 * one, schedule)
    best = world.optimum(objective_of(weighting, t, world), Student(0.9 * one, 0.3 * one, tensor([0.1])))
    return float(world.marginal(best).cov.sqrt()), float(best.L.abs())


@pytest.mark.parametrize(("alpha_squared", "std"), [(0.9, 1.09), (0.5, 1.47), (0.05, 3.05)])
def test_at_one_level_the_bound_overshoots_forgetting_z(alpha_squared, std):
    x, given_c = line_optimum(NoiseSchedule(tensor([alpha_squared])), tensor([1.0]), "constant")
    assert round(x, 2) == std
    assert given_c < 1e-6


@pytest.mark.parametrize(("weighting", "std"), [("constant", 1.13), ("x0", 1.87)])
def test_over_levels_the_overshoot_depends_on_lambda(weighting, std, record_property):
    """Uniform over the 961 levels of Stable Diffusion 1.5 with t in [.02, .98]."""
    x, given_c = line_optimum(FINE, levels_of(FINE), weighting)
    record_property("std", x)
    assert round(x, 2) == std
    assert given_c < 1e-6
