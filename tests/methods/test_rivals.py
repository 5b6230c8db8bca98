"""Denoising (Eq. 11), the controlled teacher (Eq. 2) and JDM's variants against closed forms; what is refused."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from jdm.directions import ascend
from jdm.errors import UsageError
from jdm.levels import Bound, Levels
from jdm.loading import Loaded
from jdm.methods.controlled_teacher import ControlledTeacher
from jdm.methods.declared import Declared
from jdm.methods.dsm_controlnet import DSMControlNet, Pair
from jdm.methods.jdm import JDM
from jdm.methods.networks import Fake
from jdm.methods.networks import Student as Settings
from jdm.posterior import FakePosterior, FrozenPosterior
from jdm.recipes import all_recipes
from jdm.schedule import NoiseSchedule
from jdm.terms import CleanCondition, Condition, Fidelity
from worlds import LinearGaussianWorld, Rows, Student, ascended, coarse_schedule, cubature, scene, tensor

SCHEDULE = coarse_schedule()
LEVELS = SCHEDULE.t(torch.arange(1, 49))
WORLD = LinearGaussianWorld.example(SCHEDULE)
RECIPES = all_recipes()
PLAIN: dict[str, Any] = {"lambda_t": "constant", "normaliser": "none"}
FREE = Bound(0.0, 0.0)


# --- DSM: || G(x_T, c) - x ||^2 ---


def test_dsm_learns_the_conditional_mean_and_is_narrow():
    """x ~ N(.3, 1), c = 2 x + N(0, .8^2), G(x_T, c) = g x_T + n c + b."""
    schedule, mean, slope, noise = NoiseSchedule.scaled_linear(), 0.3, 2.0, 0.8**2
    u = cubature(3)
    x = mean + u[:, :1]
    c = slope * x + noise**0.5 * u[:, 1:2]

    def loss(weights: torch.Tensor) -> torch.Tensor:
        g, n, b = weights
        networks = SimpleNamespace(schedule=schedule, generator=lambda x_T, y, c: g * x_T + n * c + b)
        return DSMControlNet(level=625).loss(networks, Pair(x, [], c, u[:, 2:]))

    start = tensor([1.0, 0.0, 0.0])
    gradient = torch.autograd.functional.jacobian(loss, start)
    best = start - torch.linalg.solve(torch.autograd.functional.hessian(loss, start), gradient)
    square = schedule.alphas_cumprod[625]
    information = 1 + square / (1 - square) + slope**2 / noise
    exact = torch.stack([square.sqrt() / (1 - square), tensor(slope / noise), tensor(mean)]) / information
    torch.testing.assert_close(best, exact, atol=1e-6, rtol=1e-6)

    answered = 1 - float(1 / information)  # Var E[x | x_T, c]
    g, n, _ = best
    used = float(g**2 + n**2 * (slope**2 + noise))  # the noise it is used with knows nothing of c
    found = f"variance of the data 1, of the answers {answered:.3f}, of the pictures from fresh noise {used:.3f}"
    print(found)
    answers = g * schedule.noised(x, tensor([626 / 1000]), u[:, 2:]) + n * c
    assert float(answers.var(correction=0)) == pytest.approx(answered, abs=1e-6)
    assert used < answered < 1, found


# --- s_real(x_t | c) - s_fake(x_t | c) ---


def controlled_direction(student: Student, step: Rows) -> torch.Tensor:
    """`ControlledTeacher`'s direction with the exact scores of data and student given c."""
    def seeing(of: Student):
        return lambda x_t, t, y, c: WORLD.seeing_fake(of, c)(x_t, t)

    networks = scene(SCHEDULE, SimpleNamespace(guided=seeing(WORLD.ideal())), seeing(student), real_sees_control=True,
                     fake_sees_control=True)
    return ControlledTeacher(fidelity=Fidelity(**PLAIN)).distillation().direction(networks, step)[0]


def controlled_loss(student: Student) -> torch.Tensor:
    t, c, z, eps = WORLD.drawn(LEVELS)
    still = Student(*(p.detach() for p in (student.B, student.L, student.b)))
    step = Rows(student(c, z), t, eps, c)
    return ascend(step.x, controlled_direction(still, step))


def student_of(seed: int) -> Student:
    random = torch.Generator().manual_seed(seed)
    return Student(*(torch.randn(*shape, generator=random).double() for shape in ((3, 2), (3, 3), (3,))))


def test_controlled_direction_is_a_difference_of_scores():
    student, (t, c, z, eps) = student_of(0), WORLD.drawn(LEVELS)
    step = Rows(student(c, z), t, eps, c)
    alpha, sigma = (v.double()[:, None] for v in (SCHEDULE.alpha(t), SCHEDULE.sigma(t)))
    x_t = alpha * step.x + sigma * eps

    def score(mean: torch.Tensor, cov: torch.Tensor) -> torch.Tensor:
        noisy = alpha[:, :, None] ** 2 * cov + sigma[:, :, None] ** 2 * torch.eye(3)
        return -torch.linalg.solve(noisy, (x_t - alpha * mean)[:, :, None]).squeeze(2)

    exact = score(*WORLD.x_given_c(c)) - score(c @ student.B.T + student.b, student.spread)
    torch.testing.assert_close(controlled_direction(student, step), alpha * exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_controlled_direction_is_the_joint_kls_gradient(seed):
    student = student_of(seed).trainable()
    parts = (student.B, student.L, student.b)
    for ours, exact in zip(torch.autograd.grad(controlled_loss(student), parts),
                           torch.autograd.grad(WORLD.joint_kl(student, LEVELS).mean(), parts), strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-4, rtol=1e-4)


def test_a_controlled_teacher_gives_the_ideal_student():
    ideal = WORLD.ideal()
    ours = ascended(WORLD.ignorant(), 300, controlled_loss)
    for name in ("B", "b", "spread"):
        torch.testing.assert_close(getattr(ours, name), getattr(ideal, name), atol=1e-4, rtol=1e-4)


# --- JDM's variants ---


LIKELIHOOD = SimpleNamespace(log_prob=lambda x, c, reference: WORLD.log_prob(c, x))


def fake_of(student: Student):
    def fake(x_t, t, y, control=None):
        seen = WORLD.marginal(student).score if control is None else WORLD.seeing_fake(student, control)
        return seen(x_t, t)

    return fake


def direction(method: JDM, student: Student, step: Rows, sees_c: bool = False) -> torch.Tensor:
    real = SimpleNamespace(guided=lambda x_t, t, y, c: WORLD.data.score(x_t, t))
    posterior = getattr(method.condition, "posterior", None)
    answers = {} if posterior is None else {
        posterior: None if isinstance(posterior, FakePosterior) else WORLD.data.consistency}
    networks = scene(SCHEDULE, real, fake_of(student), control=LIKELIHOOD, posteriors=answers, fake_sees_control=sees_c)
    return method.distillation().direction(networks, step)[0]


def jdm(condition) -> JDM:
    return JDM(fidelity=Fidelity(**PLAIN), condition=condition)


TERMS = {"posterior": Condition(**PLAIN, bound=FREE, weight=0.7),
         "fake": Condition(**PLAIN, bound=FREE, weight=0.7, posterior=FakePosterior()),
         "sample": CleanCondition(bound=FREE, weight=0.7)}


@pytest.mark.parametrize(("on", "sees_c"), [
    ("posterior", False), ("posterior", True), ("fake", False), ("sample", False), ("sample", True)])
def test_jdms_direction_reads_what_it_is_told(on, sees_c):
    student, (t, c, z, eps) = student_of(1), WORLD.drawn(LEVELS)
    step = Rows(student(c, z), t, eps, c)
    ours = direction(jdm(TERMS[on]), student, step, sees_c)

    x_t, alpha = SCHEDULE.noised(step.x, t, eps), SCHEDULE.alpha(t).double()[:, None]
    real, other = WORLD.data.score(x_t, t), fake_of(student)(x_t, t, (), c if sees_c else None)
    if on == "sample":
        condition = torch.linalg.solve(WORLD.R, (c - step.x @ WORLD.A.T).T).T @ WORLD.A
    elif on == "fake":
        own = LinearGaussianWorld(*moments(student), WORLD.A, WORLD.R, SCHEDULE)
        condition = alpha * own.plug_in_gradient(c, x_t, t, own.data.posterior_gain(t))
    else:
        condition = alpha * WORLD.plug_in_gradient(c, x_t, t, WORLD.data.consistency_gain(t))
    exact = alpha * (real.score - other.score) + 0.7 * condition
    torch.testing.assert_close(ours, exact, atol=1e-4, rtol=1e-4)


def test_recipes_levels_of_their_own_are_independent():
    """Levels that differ draw noise that differs: in every recipe, and where nothing but the stream does."""
    for name, recipe in RECIPES.items():
        if isinstance(method := recipe().method, Declared):
            levels = {term.levels for term in method.distillation().terms.values() if term.levels}
            assert len({own.stream for own in levels}) == len(levels), name
    method = RECIPES["nano-canny-own-t"]().method
    assert method.condition.levels == replace(method.fidelity.levels, stream="condition")


class OwnLevels(Rows):
    """Gives each set of levels one noise level: the middle of its range."""

    def noised(self, stream, schedule, low, high):
        t = schedule.grid(torch.zeros_like(self.t), (low + high) / 2, (low + high) / 2)
        return schedule.noised(self.x.detach(), t, self.eps), t, self.eps


def test_terms_at_equal_levels_share_one_x_t():
    student, (t, c, z, eps) = student_of(1), WORLD.drawn(LEVELS)
    step, wide, own = OwnLevels(student(c, z), t, eps, c), Levels(0.3, 0.9), Levels(0.04, 0.2, "condition")

    def parts(levels: Levels) -> tuple[torch.Tensor, torch.Tensor]:
        x_t, t, _ = step.noised("", SCHEDULE, levels.low, levels.high)
        alpha, scores = SCHEDULE.alpha(t).double()[:, None], (WORLD.data.score(x_t, t), fake_of(student)(x_t, t, ()))
        condition = WORLD.plug_in_gradient(c, x_t, t, WORLD.data.consistency_gain(t))
        return alpha * (scores[0].score - scores[1].score), alpha * condition

    for levels in (wide, own):
        method = JDM(fidelity=Fidelity(**PLAIN, levels=wide), condition=Condition(**PLAIN, bound=FREE, levels=levels))
        exact = parts(wide)[0] + parts(levels)[1]
        torch.testing.assert_close(direction(method, student, step), exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("by", ["real", "fake", "none"])
@pytest.mark.parametrize("sees_c", [False, True])
def test_normaliser_divides_by_the_x0_it_names(by, sees_c):
    student, (t, c, z, eps) = student_of(1), WORLD.drawn(LEVELS)
    step = Rows(student(c, z), t, eps, c)
    plain = direction(jdm(replace(TERMS["posterior"], weight=1.0)), student, step, sees_c)
    fidelity = direction(jdm(replace(TERMS["posterior"], weight=0.0)), student, step, sees_c)
    ours = direction(jdm(replace(TERMS["posterior"], weight=1.0, normaliser=by)), student, step, sees_c) - fidelity
    x_t = SCHEDULE.noised(step.x, t, eps)
    x0 = {"real": WORLD.data.score(x_t, t).x0, "fake": fake_of(student)(x_t, t, (), c if sees_c else None).x0}
    mean = 1.0 if by == "none" else (x0[by] - step.x).abs().mean(1, keepdim=True).clamp(min=0.1)
    torch.testing.assert_close(ours, (plain - fidelity) / mean, atol=1e-4, rtol=1e-4)


def moments(student: Student) -> tuple[torch.Tensor, torch.Tensor]:
    return WORLD.marginal(student).mean, WORLD.marginal(student).cov


def test_the_clean_condition_ignores_noise_levels():
    (t, c, z, eps), student = WORLD.drawn(LEVELS), WORLD.ignorant()  # real and fake agree: only the condition is left
    early, late = (direction(jdm(TERMS["sample"]), student, Rows(student(c, z), torch.full_like(t, level), eps, c))
                   for level in (0.1, 0.9))
    torch.testing.assert_close(early, late, atol=1e-4, rtol=1e-4)
    assert early.abs().max() > 0.1


@pytest.mark.parametrize(("progress", "ratio"), [(0.0, 0.5), (0.49, 0.5), (0.5, 2.0), (0.99, 2.0)])
def test_a_bound_has_early_and_late_values(progress, ratio):
    student, (t, c, z, eps) = student_of(1), WORLD.drawn(LEVELS)
    step = Rows(student(c, z), t, eps, c, progress=progress)
    fidelity, both = (direction(jdm(Condition(**PLAIN, bound=Bound(0.5, 2.0), weight=weight)), student, step)
                      for weight in (0.0, 1e6))
    torch.testing.assert_close((both - fidelity).norm(dim=1).max(), ratio * fidelity.norm(dim=1).mean(), atol=1e-4,
                               rtol=1e-4)


def test_a_steps_progress_is_the_share_done(teacher, tmp_path):
    run = tiny.run(RECIPES["nano-clean-likelihood"](), tmp_path, teacher, steps=4)
    begin = run.method.task(Loaded(run)).begin
    assert [begin(step).progress for step in range(4)] == [0, 0.25, 0.5, 0.75]


def test_a_frozen_posterior_answers_with_its_own_network(teacher, tmp_path):
    run = tiny.run(RECIPES["nano-frozen-posterior"](), tmp_path, teacher)
    networks = tiny.networks(run)
    for parameter in networks.fake.net.parameters():
        parameter.data.zero_()  # the moving posterior of the paper would follow
    x_t, t = torch.randn(2, 8, 8, 8), networks.schedule.t(torch.tensor([100, 700]))
    (posterior,) = networks.posteriors.values()
    with torch.no_grad():
        ours, exact = posterior(x_t, t, ["a coat", ""]), networks.real_score(1.0)(x_t, t, ["a coat", ""]).x0
    torch.testing.assert_close(ours, exact)
    assert not networks.adapters


def test_the_fakes_controlnet_has_its_own_rate(teacher, tmp_path):
    def groups(name):
        run = tiny.run(RECIPES[name](), tmp_path, teacher)
        (phase,) = [p for p in run.method.task(Loaded(run)).phases if p.name == "fake"]
        return run.method, [(len(parameters), optimiser) for parameters, optimiser in phase.groups]

    method, ((unet, one),) = groups("nano-no-warm-up")
    assert one == method.fake.optimiser
    method, ((same, one), (controlnet, other)) = groups("nano-controlled-fake")
    assert (same, one, other) == (unet, method.fake.optimiser, method.controlnet.optimiser)
    assert controlnet > 20
    method, ((whole, one), (branch, other)) = groups("nano-controlled-teacher")
    assert (whole, branch, one, other) == (unet, controlnet, method.fake.optimiser, method.fake.optimiser)


# --- what cannot be started ---


@pytest.mark.parametrize(("start", "levels", "message"), [
    ("teacher", (625,), r"is not a one-step generator.*jdm train nano-diff-instruct"),
    ("student", (500,), r"runs at levels \[625\], asked for \[500\]; use --levels 625")])
def test_a_start_that_does_not_fit_is_refused(start, levels, message, teacher, tmp_path):
    run = tiny.run(RECIPES["nano-canny"](), tmp_path, teacher)
    run = replace(run, method=replace(run.method, student=Settings(levels, str(teacher.with_name(start)))))
    with pytest.raises(UsageError, match=message):
        tiny.networks(run)


@pytest.mark.parametrize(("changes", "message"), [
    ({"student": Settings(optimiser=None)}, "must be a one-step generator's; name it with --student.start"),
    ({"student": Settings(optimiser=None, rank=2)}, "a frozen backbone has no LoRA to train"),
    ({"condition": Condition(posterior=FakePosterior()), "fake": Fake(controlnet=Settings().optimiser)},
     "because its x0 depends on the control")])

def test_settings_that_contradict_each_other_are_refused(changes, message, teacher, tmp_path):
    run = tiny.run(RECIPES["nano-canny"](), tmp_path, teacher)
    with pytest.raises(UsageError, match=message):
        tiny.networks(replace(run, method=replace(run.method, **changes)))


def test_levels_outside_their_range_are_refused():
    for low, high in ((-0.1, 0.5), (0.5, 0.2), (0.5, 1.5), (0.0, 0.0)):
        with pytest.raises(UsageError, match="0 <= low <= high <= 1"):
            Levels(low, high)


def test_a_frozen_posterior_of_other_latents_is_refused(teacher, tmp_path):
    run = tiny.run(RECIPES["nano-frozen-posterior"](), tmp_path, teacher)
    assert isinstance(run.method.condition.posterior, FrozenPosterior)
    loaded = Loaded(run)
    loaded.model("posterior").backbone.register_to_config(in_channels=3)
    with pytest.raises(UsageError, match="works on other latents than the teacher"):
        run.method.task(loaded)


@pytest.mark.parametrize("model", ["teacher", "student"])
def test_an_unfit_controlled_teacher_is_refused(model, teacher, tmp_path):
    run = tiny.run(RECIPES["nano-controlled-teacher"](), tmp_path, teacher)
    method = replace(run.method, teacher=str(teacher.with_name(model)))
    with pytest.raises(UsageError, match="is not a multi-step model with a ControlNet"):
        method.task(Loaded(replace(run, method=method)))


def test_a_controlled_teachers_networks_start_from_its_controlnet(teacher, controlled, tmp_path):
    from safetensors.torch import load_file

    run = tiny.run(RECIPES["nano-controlled-teacher"](), tmp_path, teacher)
    task = run.method.task(Loaded(run))
    weights = load_file(controlled / "controlnet" / "diffusion_pytorch_model.safetensors")
    for net in (task.modules["controlnet"], task.modules["fake"].controlnet):
        assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())
