"""Each term of jdm.terms against its closed form."""

from types import SimpleNamespace

import pytest
import torch

from jdm.directions import (
    ascend,
    cfg_augmentation,
    clean_alignment,
    condition_alignment,
    distribution_matching,
    lambda_t,
    mean_error,
    together,
)
from jdm.errors import UsageError
from jdm.models.execution import picture_by_picture
from jdm.schedule import NoiseSchedule
from jdm.score import Estimate
from jdm.terms import Fidelity, NoisyTerm
from mixtures import MixtureWorld
from worlds import LinearGaussianWorld, tensor

SCHEDULE = NoiseSchedule.scaled_linear()
WORLD = LinearGaussianWorld.example(SCHEDULE)
OTHER = LinearGaussianWorld.example(SCHEDULE, seed=3)
MIXTURE = MixtureWorld.example(SCHEDULE)


def rows(n: int = 64, d: int = 3, k: int = 2):
    """x, x_t, t, c: arbitrary, float64, t over the whole grid."""
    random = torch.Generator().manual_seed(1)
    x, eps, c = (torch.randn(n, m, generator=random).double() for m in (d, d, k))
    t = SCHEDULE.grid(torch.rand(n, generator=random), 0.02, 1.0)
    t[0] = SCHEDULE.t(0)
    return x, SCHEDULE.noised(x, t, eps), t, c


def test_distribution_matching_is_the_scores_difference():
    _, x_t, t, _ = rows()
    real, fake = WORLD.data.score(x_t, t), OTHER.data.score(x_t, t)

    def exact(world):
        alpha, sigma = SCHEDULE.alpha(t).double()[:, None], SCHEDULE.sigma(t).double()[:, None]
        cov = alpha[:, :, None] ** 2 * world.data.cov + sigma[:, :, None] ** 2 * torch.eye(3)
        return -torch.linalg.solve(cov, (x_t - alpha * world.data.mean)[:, :, None]).squeeze(2)

    ours = distribution_matching(real, fake)
    torch.testing.assert_close(ours, exact(WORLD) - exact(OTHER), atol=1e-4, rtol=1e-4)
    # s_real - s_fake = (alpha / sigma^2) (x0_real - x0_fake)
    in_x0 = real.alpha / real.sigma**2 * (real.x0 - fake.x0)
    torch.testing.assert_close(ours, in_x0, atol=1e-4, rtol=1e-4)


def test_distribution_matching_vanishes_at_the_data():
    _, x_t, t, _ = rows()
    for student in (WORLD.ignorant(), WORLD.ideal()):
        gap = distribution_matching(WORLD.data.score(x_t, t), WORLD.marginal(student).score(x_t, t))
        assert gap.abs().max() < 1e-8


@pytest.mark.parametrize("w", [1.0, 2.0, 7.5])
def test_guided_matching_adds_the_weighted_augmentation(w):
    _, x_t, t, _ = rows()
    third = LinearGaussianWorld.example(SCHEDULE, seed=5)
    cond, uncond, fake = (world.data.score(x_t, t) for world in (WORLD, OTHER, third))
    guided = Estimate(x_t, uncond.eps + w * (cond.eps - uncond.eps), cond.alpha, cond.sigma)
    torch.testing.assert_close(
        distribution_matching(guided, fake),
        distribution_matching(cond, fake) + (w - 1) * cfg_augmentation(cond, uncond), atol=1e-8, rtol=1e-8)


def test_cfg_augmentation_is_the_prompts_likelihood_gradient():
    _, x_t, t, _ = rows(d=2)
    y = torch.arange(len(t)) % 3
    alpha, sigma = (v.double()[:, None] for v in (SCHEDULE.alpha(t), SCHEDULE.sigma(t)))
    own = -(x_t - alpha * MIXTURE.means[y]) / (alpha**2 * MIXTURE.variances[y, None] + sigma**2)
    uncond = MIXTURE.score(x_t, t)
    ours = cfg_augmentation(Estimate(x_t, -sigma * own, uncond.alpha, uncond.sigma), uncond)
    where = x_t.clone().requires_grad_()
    (exact,) = torch.autograd.grad(MIXTURE.log_prob(y, where, t).sum(), where)
    torch.testing.assert_close(ours, exact, atol=1e-4, rtol=1e-4)
    assert not ours.requires_grad


def test_clean_alignment_is_the_likelihoods_gradient():
    x, _, _, c = rows()
    exact = torch.linalg.solve(WORLD.R, (c - x @ WORLD.A.T).T).T @ WORLD.A
    torch.testing.assert_close(clean_alignment(lambda v: WORLD.log_prob(c, v), x), exact, atol=1e-4, rtol=1e-4)
    x, _, t, _ = rows(d=2)
    c, clean = torch.arange(len(t)) % 3, torch.zeros_like(t)
    with torch.no_grad():
        ours = clean_alignment(lambda v: MIXTURE.log_prob(c, v, clean), x)
    torch.testing.assert_close(ours, MIXTURE.condition_gradient(c, x, clean), atol=1e-4, rtol=1e-4)
    assert not ours.requires_grad
    assert not x.requires_grad


def test_picture_by_picture_equals_all_at_once():
    x, x_t, t, c = rows()
    together = 0

    def log_prob(x, at):
        nonlocal together
        together = max(together, len(x))
        return WORLD.log_prob(c[at], x)

    one_by_one = picture_by_picture(log_prob)
    torch.testing.assert_close(one_by_one(x), log_prob(x, slice(None)))
    together = 0
    random = torch.Generator().manual_seed(2)
    for draws in ([], [torch.randn(x.shape, generator=random).double() for _ in range(3)]):
        a, b = (condition_alignment(value, WORLD.data.consistency, x_t, t, schedule=SCHEDULE, draws=draws)
                for value in (one_by_one, lambda x: WORLD.log_prob(c, x)))
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(clean_alignment(one_by_one, x), clean_alignment(lambda x: WORLD.log_prob(c, x), x))
    assert together == 1
    with pytest.raises(UsageError, match="log_prob has no gradient"):
        clean_alignment(picture_by_picture(lambda x, _: x.detach().sum(1)), x)
    with pytest.raises(UsageError, match=r"one value per sample, shape \(1,\), got \(1, 3\)"):
        clean_alignment(picture_by_picture(lambda x, _: x), x)


@pytest.mark.parametrize("through", ["posterior_mean", "consistency"])
def test_condition_alignment_equals_its_plug_ins_closed_form(through):
    _, x_t, t, c = rows()
    data = WORLD.data
    gain = {"posterior_mean": data.posterior_gain, "consistency": data.consistency_gain}[through](t)
    ours = condition_alignment(lambda x: WORLD.log_prob(c, x), getattr(data, through), x_t, t)
    torch.testing.assert_close(ours, WORLD.plug_in_gradient(c, x_t, t, gain), atol=1e-4, rtol=1e-4)
    assert not ours.requires_grad


def test_draws_are_weighed_by_their_likelihood():
    _, x_t, t, c = rows()
    draws = [torch.randn(*x_t.shape, generator=torch.Generator().manual_seed(k)).double() for k in range(3)]
    ours = condition_alignment(lambda x: WORLD.log_prob(c, x), WORLD.data.consistency, x_t, t, schedule=SCHEDULE,
                               draws=draws)
    gain, alpha = WORLD.data.consistency_gain(t), SCHEDULE.alpha(t).double()[:, None, None]
    once = WORLD.data.consistency(x_t, t)
    x = [WORLD.data.consistency(SCHEDULE.noised(once, t, eps), t) for eps in draws]
    weights = torch.stack([WORLD.log_prob(c, v) for v in x]).softmax(0)
    residuals = (weights[:, :, None] * torch.stack([c - v @ WORLD.A.T for v in x])).sum(0)
    exact = (WORLD.A @ gain @ gain * alpha).mT @ torch.linalg.solve(WORLD.R, residuals.T).T[:, :, None]
    torch.testing.assert_close(ours, exact.squeeze(2), atol=1e-4, rtol=1e-4)


def test_draws_without_a_schedule_are_refused():
    _, x_t, t, c = rows()
    with pytest.raises(UsageError, match="need the noise schedule"):
        condition_alignment(lambda x: WORLD.log_prob(c, x), WORLD.data.consistency, x_t, t, draws=[x_t])


def test_alignment_is_exact_with_the_exact_log_prob():
    _, x_t, t, c = rows()
    ours = condition_alignment(lambda v: WORLD.log_prob_t(c, v, t), lambda v, t, y: v, x_t, t)
    torch.testing.assert_close(ours, WORLD.condition_gradient(c, x_t, t), atol=1e-4, rtol=1e-4)


def test_on_a_mixture_alignment_is_the_plug_in():
    _, x_t, t, _ = rows(d=2)
    c = torch.arange(len(t)) % 3
    ours = condition_alignment(lambda x: MIXTURE.log_prob(c, x, torch.zeros_like(t)),
                               lambda v, t, y: MIXTURE.score(v, t).x0, x_t, t)
    torch.testing.assert_close(ours, MIXTURE.plug_in_gradient(c, x_t, t), atol=1e-4, rtol=1e-4)


def test_condition_alignment_moves_no_parameter():
    _, x_t, t, c = rows()
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    ours = condition_alignment(lambda x: WORLD.log_prob(c, x), lambda v, t, y: v * weight, x_t, t)
    assert weight.grad is None
    assert not ours.requires_grad
    assert not x_t.requires_grad


def test_condition_alignment_works_under_no_grad():
    _, x_t, t, c = rows()
    expected = condition_alignment(lambda x: WORLD.log_prob(c, x), WORLD.data.posterior_mean, x_t, t)
    with torch.no_grad():
        ours = condition_alignment(lambda x: WORLD.log_prob(c, x), WORLD.data.posterior_mean, x_t, t)
    assert expected.abs().sum() > 0
    assert torch.equal(ours, expected)


def test_a_summed_or_constant_log_prob_is_refused():
    _, x_t, t, c = rows()

    def identity(v, t, y):
        return v

    with pytest.raises(UsageError, match="one value per sample"):
        condition_alignment(lambda x: WORLD.log_prob(c, x).sum(), identity, x_t, t)
    with pytest.raises(UsageError, match="no gradient"):
        condition_alignment(lambda x: WORLD.log_prob(c, x.detach()), identity, x_t, t)


def view(x_t: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> SimpleNamespace:
    """A term's view of x_t with the exact scores of two worlds."""
    real, fake = WORLD.data.score(x_t, t), OTHER.data.score(x_t, t)
    return SimpleNamespace(x=x, x_t=x_t, t=t, alpha=SCHEDULE.alpha(t, x), sigma=SCHEDULE.sigma(t, x), y=(),
                           real=lambda guidance=None: real, fake=lambda: fake, log=lambda **values: None)


def test_lambda_t_equals_its_closed_forms():
    _, _, t, _ = rows()
    acp = SCHEDULE.alphas_cumprod[SCHEDULE.timestep(t)][:, None]
    alpha, sigma = (v.double()[:, None] for v in (SCHEDULE.alpha(t), SCHEDULE.sigma(t)))
    for kind, value in {"constant": torch.ones_like(acp), "x0": (1 - acp) / acp}.items():
        torch.testing.assert_close(lambda_t(kind, alpha, sigma), value, atol=1e-4, rtol=1e-4)
    with pytest.raises(UsageError, match="lambda_t must be x0 or constant, got 'snr'"):
        lambda_t("snr", alpha, sigma)  # type: ignore[arg-type]


def test_dmds_normaliser_is_a_mean_with_a_floor():
    x, x_t, t, _ = rows()
    mean = (WORLD.data.posterior_mean(x_t, t) - x).abs().mean(1, keepdim=True)
    assert (mean < 0.1).any()
    torch.testing.assert_close(mean_error(WORLD.data.score(x_t, t).x0, x), mean.clamp(min=0.1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("normaliser", ["none", "real", "fake"])
def test_x0_weighting_makes_matching_a_difference_of_x0(normaliser):
    x, x_t, t, _ = rows()
    at = view(x_t, t, x)
    x0 = {"real": at.real().x0, "fake": at.fake().x0}
    exact = x0["real"] - x0["fake"]
    if normaliser != "none":
        exact = exact / (x0[normaliser] - x).abs().mean(1, keepdim=True).clamp(min=0.1)
    torch.testing.assert_close(Fidelity(normaliser=normaliser).direction(at), exact, atol=1e-4, rtol=1e-4)


def test_on_x_is_the_chain_rule_to_x():
    x, x_t, t, c = rows()
    clean = x.clone().requires_grad_()
    eps = (x_t - SCHEDULE.alpha(t, x) * x) / SCHEDULE.sigma(t, x)
    value = WORLD.log_prob_t(c, SCHEDULE.noised(clean, t, eps), t)
    (exact,) = torch.autograd.grad(value.sum(), clean)
    plain = NoisyTerm(lambda_t="constant", normaliser="none", weight=2.0)
    ours = plain.on_x(WORLD.condition_gradient(c, x_t, t), view(x_t, t, x))
    torch.testing.assert_close(ours, 2 * exact, atol=1e-4, rtol=1e-4)


def test_bounded_parts_are_clipped_by_the_batch_mean():
    part = tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    free = tensor([[0.0, 0.5], [1.5, 0.0], [0.0, 1.0]])
    expected = tensor([[1.2, 1.6], [0.3, 0.4], [0.0, 0.0]])
    parts = {"a": free / 2, "b": free / 2, "c": part}
    ours = together(parts, {"c": 2.0}, lambda value: value)
    torch.testing.assert_close(ours["c"], expected)
    assert ours["a"] is parts["a"]
    assert together(parts, {"c": 0.0}, lambda value: value)["c"] is part


def test_each_bounded_part_has_its_own_bound():
    """The mean over the batch is asked once, of the unbounded parts' sum."""
    parts = {"free": tensor([[2.0, 0.0], [0.0, 4.0]]), **{name: tensor([[90.0, 0.0], [0.0, 90.0]]) for name in "abc"}}
    asked = []
    ours = together(parts, {"a": 0.5, "b": 2.0, "c": 0.0}, lambda value: asked.append(float(value)) or value + 1)
    assert asked == [3.0]
    assert {name: float(ours[name].norm(dim=1).max()) for name in "abc"} == {"a": 2.0, "b": 8.0, "c": 90.0}


def test_descending_ascend_moves_x_along_the_direction():
    x, direction = torch.randn(8, 3, 2, 2).requires_grad_(), torch.randn(8, 3, 2, 2)
    ascend(x, direction).backward()
    torch.testing.assert_close(x.grad, -direction / 8)


def test_ascend_carries_no_gradient_into_the_direction():
    x, direction = torch.randn(8, 3).requires_grad_(), torch.randn(8, 3).requires_grad_()
    ascend(x, direction).backward()
    assert direction.grad is None
