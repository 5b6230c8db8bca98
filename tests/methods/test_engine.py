"""The engine's wiring in closed form: each term, phase and draw has its own levels, prompts, noise and bounds."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from jdm.errors import UsageError
from jdm.levels import Bound, Levels
from jdm.loading import Loaded
from jdm.methods.diff_instruct import DiffInstruct
from jdm.methods.engine import Distillation, fake_phase, posterior_phase
from jdm.methods.jdm import JDM
from jdm.methods.networks import Fake, Student
from jdm.posterior import ConsistencyPosterior, Posterior
from jdm.recipes import find
from jdm.regularisers import MeanVariance
from jdm.score import Estimate
from jdm.terms import Condition, Fidelity
from worlds import Gaussian, LinearGaussianWorld, Rows, coarse_schedule, scene, tensor

SCHEDULE = coarse_schedule()
WORLD = LinearGaussianWorld.example(SCHEDULE)
OTHER = LinearGaussianWorld.example(SCHEDULE, seed=3)
PLAIN: dict[str, Any] = {"lambda_t": "constant", "normaliser": "none"}
FREE = Bound(0.0, 0.0)
LIKELIHOOD = SimpleNamespace(log_prob=lambda x, c, reference: WORLD.log_prob(c, x))
STREAMS = ("generator", "condition", "fake/0", "fake/1", "fake/2")


class Streams(Rows):
    """Rows with a level and noise of their own for each stream, and numbers by name."""

    def noised(self, stream, schedule, low, high):
        turn = 5 * STREAMS.index(stream)
        t = schedule.grid(torch.linspace(0, 0.999, len(self.x)).roll(turn), low, high)
        eps = self.eps.roll(turn, 0)
        return schedule.noised(self.x.detach(), t, eps), t, eps

    @property
    def noise(self):
        def drawn(stream, shape):
            return torch.randn(*shape, generator=torch.Generator().manual_seed(hash_of(stream))).double()

        return SimpleNamespace(normal=drawn, uniform=lambda stream, n: torch.linspace(0, 0.999, n))

    z = property(lambda self: self.x)


def hash_of(name: str) -> int:
    return sum(ord(letter) * 31**place for place, letter in enumerate(name)) % 2**31


def rows(n: int = 24) -> Streams:
    random = torch.Generator().manual_seed(0)
    x, c = (torch.randn(n, k, generator=random).double() for k in (3, 2))
    return Streams(x, torch.ones(n), torch.randn(n, 3, generator=random).double(), c, y=("a", "", "coat") * (n // 3))


def networks_of(**more: Any) -> SimpleNamespace:
    real = SimpleNamespace(guided=lambda x_t, t, y, c: WORLD.data.score(x_t, t))
    return scene(SCHEDULE, real, lambda x_t, t, y, c: OTHER.data.score(x_t, t), control=LIKELIHOOD,
                 posteriors={ConsistencyPosterior(): WORLD.data.consistency}, **more)


# --- terms ---


@pytest.mark.parametrize("weighting", ["x0", "constant"])
@pytest.mark.parametrize("stream", ["generator", "condition"])
def test_each_term_has_its_own_stream_and_lambda(stream, weighting):
    """Fidelity keeps the constant lambda and its own stream, whatever the condition term's are."""
    step = rows()
    condition = Condition(levels=Levels(0.3, 0.9, stream), lambda_t=weighting, normaliser="none", bound=FREE)
    ours, _ = JDM(fidelity=Fidelity(**PLAIN), condition=condition).distillation().direction(networks_of(), step)
    x_t, t, _ = step.noised("generator", SCHEDULE, 0.02, 0.98)
    exact = SCHEDULE.alpha(t, x_t) * (WORLD.data.score(x_t, t).score - OTHER.data.score(x_t, t).score)
    x_t, t, _ = step.noised(stream, SCHEDULE, 0.3, 0.9)
    alpha, sigma = SCHEDULE.alpha(t, x_t), SCHEDULE.sigma(t, x_t)
    factor = alpha if weighting == "constant" else sigma**2 / alpha
    exact = exact + factor * WORLD.plug_in_gradient(step.c, x_t, t, WORLD.data.consistency_gain(t))
    torch.testing.assert_close(ours, exact, atol=1e-4, rtol=1e-4)


def test_each_term_is_held_to_its_own_bound():
    bounded = {name: Condition(**PLAIN, bound=Bound(bound, bound), weight=1e6)
               for name, bound in (("a", 0.5), ("b", 2.0))}
    both = Distillation("both", Student(), Fake(), {"fidelity": Fidelity(**PLAIN), **bounded}, "canny")
    _, logs = both.direction(networks_of(), rows())
    assert float(logs["b"] / logs["a"]) == pytest.approx(4)
    assert float(logs["b_raw"] / logs["a_raw"]) == pytest.approx(1)


@pytest.mark.parametrize("reference", [True, False])
def test_the_likelihood_compares_with_its_own_picture(reference):
    step, asked = rows(), []

    class Pictured(Streams):
        images = step.c + 1  # type: ignore[operator]

    def log_prob(x, c, near):
        asked.append((c, near))
        return WORLD.log_prob(c, x)

    networks = networks_of()
    networks.control = SimpleNamespace(log_prob=log_prob)
    networks.of_pictures = lambda value: lambda x: torch.cat([value(x[:7], slice(0, 7)), value(x[7:], slice(7, None))])
    method = JDM(condition=Condition(**PLAIN, bound=FREE, reference=reference))
    method.distillation().direction(networks, Pictured(**vars(step)))
    assert torch.equal(torch.cat([c for c, _ in asked]), step.c)
    if reference:
        assert torch.equal(torch.cat([near for _, near in asked]), step.c + 1)
    else:
        assert [near for _, near in asked] == [None, None]


def test_each_draw_of_the_posterior_is_fresh(monkeypatch):
    drawn = []
    monkeypatch.setattr("jdm.methods.step.condition_alignment",
                        lambda value, f, x_t, t, y, schedule, noises: drawn.extend(noises) or x_t)
    method = JDM(condition=Condition(**PLAIN, bound=FREE, draws=3))
    method.distillation().direction(networks_of(), rows())
    assert len(drawn) == 3
    assert (torch.corrcoef(torch.stack([eps.flatten() for eps in drawn])) - torch.eye(3)).abs().max() < 0.5


@pytest.mark.parametrize("w", [0.0, 1.0, 3.0])
def test_the_teacher_is_asked_at_each_terms_guidance(w):
    """0 is a guidance: the teacher without the prompt. The mean of the teacher is that guidance here."""
    asked = []

    def real_score(guidance):
        asked.append(guidance)
        shifted = Gaussian(WORLD.data.mean + guidance, WORLD.data.cov, SCHEDULE)
        return SimpleNamespace(guided=lambda x_t, t, y, c: shifted.score(x_t, t))

    networks, step = networks_of(), rows()
    networks.real_score = real_score
    terms = {"first": Fidelity(lambda_t="constant", guidance=5.0), "second": Fidelity(**PLAIN, guidance=w)}
    ours, _ = Distillation("", Student(), Fake(), terms).direction(networks, step)
    assert sorted(asked) == [w, 5.0]
    assert DiffInstruct(fidelity=Fidelity(guidance=w)).distillation().guidance == w
    x_t, t, _ = step.noised("generator", SCHEDULE, 0.02, 0.98)
    fake, alpha = OTHER.data.score(x_t, t).score, SCHEDULE.alpha(t, x_t)
    first, second = (real_score(guidance).guided(x_t, t, (), None) for guidance in (5.0, w))
    error = (first.x0 - step.x).abs().mean(1, keepdim=True).clamp(min=0.1)  # the method's own guidance
    exact = alpha * ((first.score - fake) / error + second.score - fake)
    torch.testing.assert_close(ours, exact, atol=1e-4, rtol=1e-4)


def test_the_real_score_reads_prompts_row_by_row():
    asked, step = [], rows()
    networks = networks_of()
    networks.real_score = lambda guidance: SimpleNamespace(
        guided=lambda x_t, t, y, c: asked.append(tuple(y)) or WORLD.data.score(x_t, t))
    DiffInstruct().distillation().direction(networks, step)
    assert asked == [step.y]


def test_the_posterior_reads_prompts_row_by_row():
    asked, step = [], rows()
    networks = networks_of()
    networks.posteriors = {ConsistencyPosterior(): lambda x_t, t, y: asked.append(tuple(y)) or WORLD.data.consistency(
        x_t, t)}
    JDM(condition=Condition(**PLAIN, bound=FREE, draws=1)).distillation().direction(networks, step)
    assert asked == [step.y, step.y]  # f of x_t, and of the draw


# --- phases ---


def meant(y) -> Tensor:
    """A prompt's mean."""
    return tensor([[0.3 * len(prompt), -0.1 * len(prompt), 0.2] for prompt in y])


def told(x_t: Tensor, t: Tensor, y, control=None) -> Estimate:
    """The score of data whose mean the prompt says."""
    alpha = SCHEDULE.alpha(t).double()[:, None]
    blind = WORLD.data.score(x_t - alpha * meant(y), t)
    return Estimate(x_t, blind.eps, blind.alpha, blind.sigma)


def test_the_posterior_trains_on_prompts_and_samples():
    settings, step = ConsistencyPosterior(levels=6, low=0.1, high=0.9, clip=0.7), rows()
    posterior = Posterior(told, SCHEDULE, 6, 0.1, 0.9)
    adapters = {"posterior": nn.Linear(2, 2)}
    phase = posterior_phase(SimpleNamespace(posteriors={settings: posterior}, adapters=adapters), settings)  # type: ignore[arg-type]
    ours, _ = phase.loss(step, 0)
    uniform, eps = step.noise.uniform("k", 24), step.noise.normal("eps/posterior", step.x.shape)
    k = 1 + (uniform.double() * 6).floor().long()
    after, before = posterior.levels[k], posterior.levels[k - 1]

    def f(t, y):
        x_t = SCHEDULE.noised(step.x, t, eps)
        return torch.where(t[:, None] > 0, told(x_t, t, y).x0, x_t)

    exact, blind = ((f(after, y) - f(before, y)).square().mean() for y in (step.y, [""] * 24))
    torch.testing.assert_close(ours, exact)
    assert abs(float(exact / blind) - 1) > 1e-2
    assert [id(p) for p in phase.parameters] == [id(p) for p in adapters["posterior"].parameters()]
    assert (phase.clip, phase.repeats) == (0.7, 1)


def test_each_fake_repeat_has_noise_of_its_own():
    step = rows()
    networks: Any = SimpleNamespace(schedule=SCHEDULE, fake=told, fake_sees_control=False, fake_groups=lambda fake: [])
    phase = fake_phase(networks, Fake(updates=3, clip=0.3, low=0.2, high=0.6))
    assert (phase.repeats, phase.clip) == (3, 0.3)
    for repeat in range(3):
        x_t, t, eps = step.noised(f"fake/{repeat}", SCHEDULE, 0.2, 0.6)
        torch.testing.assert_close(phase.loss(step, repeat)[0], (told(x_t, t, step.y).eps - eps).square().mean())
    assert len({float(phase.loss(step, repeat)[0]) for repeat in range(3)}) == 3


def test_each_phase_has_its_own_bound_and_rate(teacher, tmp_path):
    run = tiny.run(find("nano-canny")(), tmp_path, teacher)
    method = run.method
    posterior = replace(method.condition.posterior, clip=0.3, optimiser=replace(method.fake.optimiser, lr=3e-4))
    method = replace(method, student=replace(method.student, clip=0.1), condition=replace(
        method.condition, posterior=posterior), fake=replace(method.fake, clip=0.2, low=0.3, high=0.4))
    run = replace(run, method=method)
    phases = method.task(Loaded(run)).phases
    assert {phase.name: phase.clip for phase in phases} == {"fake": 0.2, "posterior": 0.3, "generator": 0.1}
    rates = {phase.name: [optimiser for _, optimiser in phase.groups] for phase in phases}
    assert rates == {"fake": [method.fake.optimiser], "posterior": [posterior.optimiser],
                     "generator": [method.student.optimiser, method.controlnet.optimiser]}


def test_the_posterior_has_its_declared_levels(teacher, tmp_path):
    run = tiny.run(find("nano-canny")(), tmp_path, teacher)
    posterior = replace(run.method.condition.posterior, levels=7, low=0.2, high=0.7)
    method = replace(run.method, condition=replace(run.method.condition, posterior=posterior))
    levels = tiny.networks(replace(run, method=method)).posteriors[posterior].levels
    torch.testing.assert_close(levels[[0, 1, -1]], tensor([0.0, 0.2, 0.7]))
    assert len(levels) == 8


def test_a_further_term_adds_to_the_sum():
    made = JDM().plus(steady=MeanVariance(weight=0.5))
    assert list(made.distillation().terms) == ["fidelity", "condition", "steady"]
    assert replace(made, steady=MeanVariance()).distillation().terms["steady"].weight == 1.0
    with pytest.raises(UsageError, match="JDM has a field `fidelity` already; give the term another name"):
        JDM().plus(fidelity=MeanVariance())
