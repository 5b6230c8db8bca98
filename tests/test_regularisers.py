"""Each regulariser's direction against a closed form or finite differences in float64, and its own phase."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from jdm.errors import UsageError
from jdm.methods.references import ddim
from jdm.recipes import find
from jdm.regularisers import MMD, Adversarial, Anchor, Heads, MeanVariance, mean_discrepancy, pooled
from jdm.schedule import NoiseSchedule
from jdm.score import ScoreModel
from jdm.training.trainer import Trainer
from worlds import LinearGaussianWorld

SCHEDULE = NoiseSchedule.scaled_linear()
N = 5


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def slopes(of, x: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences of a scalar over every component of x."""
    found = torch.zeros_like(x)
    for place in range(x.numel()):
        ends = []
        for sign in (1, -1):
            moved = x.clone().flatten()
            moved[place] += sign * step
            ends.append(of(moved.view_as(x)))
        found.view(-1)[place] = (ends[0] - ends[1]) / (2 * step)
    return found


def features(x_t: Tensor) -> list[Tensor]:
    """Two layers, not linear."""
    return [x_t.tanh() * 2, torch.cat([x_t.square(), x_t.sin()], 1)]


def view(module=None, **more: Any) -> SimpleNamespace:
    """A term's view of N samples [2, 3, 3] at t = 0.3, with `features` for the teacher's."""
    x, eps, t = drawn(N, 2, 3, 3), drawn(N, 2, 3, 3, seed=1), torch.full((N,), 0.3).double()
    x_t = SCHEDULE.noised(x, t, eps)
    own: dict[str, Any] = {
        "x": x, "x_t": x_t, "t": t, "alpha": SCHEDULE.alpha(t, x), "sigma": SCHEDULE.sigma(t, x), "logs": {},
        "features": features, "module": lambda term: module, "log": lambda **values: None,
        "noised": lambda x, name: SCHEDULE.noised(x, t[: len(x)], drawn(*x.shape, seed=2))}
    return SimpleNamespace(**{**own, **more})


def test_mean_variance_has_its_closed_form():
    at, term = view(), MeanVariance(weight=2.0, mean=0.1, variance=0.7)
    m = at.x.flatten(1).mean(1).view(-1, 1, 1, 1)
    s = at.x.flatten(1).var(1, correction=0).view(-1, 1, 1, 1)
    # n dKL/dx_i = (m - m*)/s*^2 + (x_i - m) (1/s*^2 - 1/s^2)
    torch.testing.assert_close(term.direction(at), -2.0 * ((m - 0.1) / 0.7 + (at.x - m) * (1 / 0.7 - 1 / s)))


def test_mean_variance_vanishes_at_the_datas_own_moments():
    at = view()
    at.x = at.x[:1].expand(N, -1, -1, -1)
    at.data_moments = lambda: (at.x[0].mean(), at.x[0].var(correction=0))
    assert MeanVariance().direction(at).abs().max() < 1e-9
    half = MeanVariance(mean=0.5).direction(at)  # the other one is measured
    torch.testing.assert_close(half, -(at.x[0].mean() - 0.5) / at.x[0].var(correction=0) + torch.zeros_like(half))


def test_the_students_adversarial_direction_is_its_finite_difference():
    torch.manual_seed(0)
    heads, term = Heads([2, 4], hidden=3).double(), Adversarial(weight=0.5)
    at = view(heads)
    exact = slopes(lambda x_t: torch.nn.functional.logsigmoid(heads(features(x_t))).sum().item(), at.x_t)
    torch.testing.assert_close(term.direction(at), 0.5 * at.alpha * exact, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("r1", [0.0, 0.7])
def test_the_heads_gradient_is_its_finite_difference(r1):
    torch.manual_seed(0)
    heads, pictures = Heads([2, 4], hidden=3).double(), drawn(N, 2, 3, 3, seed=5)
    at, term = view(heads, pictures=lambda: pictures), Adversarial(r1=r1)
    weight: Any = heads.heads[1]
    weight = weight[1].weight
    (ours,) = torch.autograd.grad(term.loss(at), weight)

    def value(moved: Tensor) -> float:
        with torch.no_grad():
            weight.copy_(moved)
        return term.loss(at).item()

    torch.testing.assert_close(ours, slopes(value, weight.detach().clone()), atol=1e-6, rtol=1e-5)


def test_r1_is_half_the_squared_real_slope():
    torch.manual_seed(0)
    heads, pictures = Heads([2, 4], hidden=3).double(), drawn(N, 2, 3, 3, seed=5)
    at = view(heads, pictures=lambda: pictures)
    real = [f.requires_grad_() for f in features(at.noised(pictures, ""))]
    squares = [g.square().sum() / N for g in torch.autograd.grad(heads(real).sum(), real)]
    apart = Adversarial(r1=0.8).loss(at) - Adversarial(r1=0.0).loss(at)
    torch.testing.assert_close(apart, 0.4 * sum(squares))


def test_mmds_direction_is_its_finite_difference():
    theirs = drawn(4, 2, 3, 3, seed=7)
    at = view(teacher_samples=lambda steps, guidance: theirs)
    target, square = pooled(features(at.noised(theirs, ""))), None
    square = torch.cdist(pooled(features(at.x_t)), target).square().mean()

    def value(x_t: Tensor) -> float:
        ours = pooled(features(x_t))
        total = 0.0
        for width in (0.25, 1.0, 4.0):

            def k(u, v, width=width):
                return (-(u[:, None] - v[None]).square().sum(2) / square / (2 * width)).exp()

            total += float(k(ours, ours).fill_diagonal_(0).sum() / (N * (N - 1)) - 2 * k(ours, target).mean())
        return total

    ours = MMD(weight=3.0).direction(at)
    torch.testing.assert_close(ours, -3.0 * N * at.alpha * slopes(value, at.x_t), atol=1e-6, rtol=1e-4)


def test_mmd_is_without_bias_and_tells_distributions_apart():
    same = torch.stack([mean_discrepancy(drawn(20, 3, seed=k), drawn(20, 3, seed=1000 + k)) for k in range(200)])
    assert abs(float(same.mean())) < 4 * float(same.std()) / 200**0.5
    assert mean_discrepancy(drawn(20, 3), drawn(20, 3, seed=1) + 2) > same.mean() + 4 * same.std()
    with pytest.raises(UsageError, match="at least 2 in each part of a batch, got 1"):
        mean_discrepancy(drawn(1, 3), drawn(20, 3))


def test_the_anchor_pulls_part_of_the_first_step():
    target = drawn(2, 2, 3, 3, seed=9)
    asked = []

    def samples(*settings):
        asked.append(settings)
        return target

    at, term = view(teacher_samples=samples, first=True), Anchor(weight=0.5, share=0.4, steps=30, taken=10)
    ours = term.direction(at)
    # -1/2 |x - target|^2 of the anchored rows
    exact = slopes(lambda x: (-0.5 * (x[:2] - target).square().sum()).item(), at.x)
    torch.testing.assert_close(ours, 0.5 * exact, atol=1e-6, rtol=1e-6)
    assert asked == [(30, 2.0, 2, 10)]
    assert not term.direction(view(first=False)).any()


def test_ddim_reaches_the_odes_endpoint():
    """x = mean + cov^1/2 z for a Gaussian whose terminal level has next to no signal."""
    world = LinearGaussianWorld.example(SCHEDULE)
    score: Any = ScoreModel(lambda x_t, timestep, text: world.data.score(x_t, SCHEDULE.t(timestep)).eps, SCHEDULE)
    z = drawn(6, 3)
    exact = world.data.consistency(z, torch.ones(6))
    many, few = (ddim(score, z, [""] * 6, steps) for steps in (200, 8))
    # First order: the error falls with the number of steps.
    assert (many - exact).abs().max() < 0.03
    assert (many - exact).abs().max() < (few - exact).abs().max() / 5
    x0 = world.data.score(z, torch.ones(6).double()).x0
    torch.testing.assert_close(ddim(score, z, [""] * 6, 30, taken=1), x0)


# --- in a run ---


TERMS = {"mean-variance": MeanVariance(), "adversarial": Adversarial(), "mmd": MMD(steps=2)}


@pytest.mark.parametrize("name", sorted(TERMS))
@pytest.mark.parametrize("alone", [True, False])
def test_a_run_with_each_regulariser(name, alone, teacher, tmp_path, untrained_judge):
    method = replace(find("nano-ddmd-4")().method, regulariser=TERMS[name], anchor=Anchor(steps=2, taken=1))
    if alone:
        method = replace(method, matching=None)
    trainer = Trainer(tiny.run(replace(find("nano-ddmd-4")(), method=method), tmp_path, teacher))
    modules = trainer.task.modules
    assert ("fake" in modules) == (not alone)
    assert ("regulariser" in modules) == (name == "adversarial")
    before = {n: [p.clone() for p in m.parameters()] for n, m in modules.items()}
    logs = trainer.step(0)
    moved = {n for n, m in modules.items() if any(not torch.equal(a, b) for a, b in zip(before[n], m.parameters(),
                                                                                   strict=True))}
    assert moved == set(modules)
    assert {"regulariser", "augmentation", "anchor", "std_x"} <= logs.keys()
    assert all(bool(torch.as_tensor(v).isfinite()) for v in logs.values())


def test_each_phase_moves_its_own_parameters_alone(teacher, tmp_path):
    method = replace(find("nano-ddmd-4")().method, regulariser=Adversarial())
    task = method.task(tiny.Loaded(tiny.run(replace(find("nano-ddmd-4")(), method=method), tmp_path, teacher)))
    assert [p.name for p in task.phases] == ["fake", "regulariser", "generator"]
    state = task.begin(0)
    for phase in task.phases:
        loss, _ = phase.loss(state, 0)
        every = [p for q in task.phases for p in q.parameters if p.requires_grad]
        reached = {id(p) for p, g in zip(every, torch.autograd.grad(loss, every, allow_unused=True), strict=True)
                   if g is not None}
        assert reached <= {id(p) for p in phase.parameters}
