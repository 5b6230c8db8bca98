"""Denoising (Eq. 11), the controlled teacher (Eq. 2) and JDM's variants against closed forms; what is refused."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import tiny
from jdm.errors import UsageError
from jdm.methods.controlled_teacher import ControlledTeacher
from jdm.methods.dsm_controlnet import DSMControlNet, Pair
from jdm.methods.jdm import JDM
from jdm.methods.networks import Networks
from jdm.recipes import all_recipes
from jdm.schedule import NoiseSchedule
from jdm.terms import ascend
from worlds import LinearGaussianWorld, Rows, Student, ascended, coarse_schedule, cubature, tensor

SCHEDULE = coarse_schedule()
LEVELS = SCHEDULE.t(torch.arange(1, 49))
WORLD = LinearGaussianWorld.example(SCHEDULE)
RECIPES = all_recipes()


# --- DSM: || G(x_T, c) - x ||^2 ---


def test_denoising_a_noised_picture_and_its_control_gives_their_conditional_mean_which_is_too_narrow():
    """x ~ N(.3, 1), c = 2 x + N(0, .8^2), G(x_T, c) = g x_T + n c + b."""
    schedule, mean, slope, noise = NoiseSchedule.scaled_linear(), 0.3, 2.0, 0.8**2
    u = cubature(3)
    x = mean + u[:, :1]
    c = slope * x + noise**0.5 * u[:, 1:2]

    def loss(weights: torch.Tensor) -> torch.Tensor:
        g, n, b = weights
        networks = SimpleNamespace(schedule=schedule, generator=lambda x_T, y, c: g * x_T + n * c + b)
        return DSMControlNet(t_init=625).loss(networks, Pair(x, [], c, u[:, 2:]))

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


def controlled_loss(student: Student) -> torch.Tensor:
    """`ControlledTeacher`'s generator loss, with the exact scores of data and student given c."""
    t, c, z, eps = WORLD.drawn(LEVELS)
    still = Student(*(p.detach() for p in (student.B, student.L, student.b)))
    step = Rows(student(c, z), t, eps, c)
    return ascend(step.x, ControlledTeacher(weighting="constant").direction(controlled_networks(still), step)[0])


def controlled_networks(student: Student) -> SimpleNamespace:
    def seeing(of: Student):
        return lambda x_t, t, y, c: WORLD.seeing_fake(of, c)(x_t, t)

    return SimpleNamespace(schedule=SCHEDULE, real=SimpleNamespace(guided=seeing(WORLD.ideal())), fake=seeing(student))


def student_of(seed: int) -> Student:
    random = torch.Generator().manual_seed(seed)
    return Student(*(torch.randn(*shape, generator=random).double() for shape in ((3, 2), (3, 3), (3,))))


def test_the_controlled_teachers_direction_is_the_difference_of_two_scores_given_c():
    student, (t, c, z, eps) = student_of(0), WORLD.drawn(LEVELS)
    step = Rows(student(c, z), t, eps, c)
    ours, _ = ControlledTeacher(weighting="constant").direction(controlled_networks(student), step)
    alpha, sigma = (v.double()[:, None] for v in (SCHEDULE.alpha(t), SCHEDULE.sigma(t)))
    x_t = alpha * step.x + sigma * eps

    def score(mean: torch.Tensor, cov: torch.Tensor) -> torch.Tensor:
        noisy = alpha[:, :, None] ** 2 * cov + sigma[:, :, None] ** 2 * torch.eye(3)
        return -torch.linalg.solve(noisy, (x_t - alpha * mean)[:, :, None]).squeeze(2)

    exact = score(*WORLD.x_given_c(c)) - score(c @ student.B.T + student.b, student.spread)
    torch.testing.assert_close(ours, alpha * exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_the_controlled_teachers_direction_is_the_gradient_of_the_joint_kl(seed):
    student = student_of(seed).trainable()
    parts = (student.B, student.L, student.b)
    for ours, exact in zip(torch.autograd.grad(controlled_loss(student), parts),
                           torch.autograd.grad(WORLD.joint_kl(student, LEVELS).mean(), parts), strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-4, rtol=1e-4)


def test_distilling_a_controlled_teacher_ends_at_p_x_given_c():
    ideal = WORLD.ideal()
    ours = ascended(WORLD.ignorant(), 300, controlled_loss)
    for name in ("B", "b", "spread"):
        torch.testing.assert_close(getattr(ours, name), getattr(ideal, name), atol=1e-4, rtol=1e-4)


# --- JDM's variants ---


def jdm_networks(student: Student, on: str = "posterior") -> SimpleNamespace:
    def fake(x_t, t, y, control=None):
        seen = WORLD.marginal(student).score if control is None else WORLD.seeing_fake(student, control)
        return seen(x_t, t)

    return SimpleNamespace(
        schedule=SCHEDULE, real=SimpleNamespace(guided=WORLD.data.score), fake=fake,
        posterior=WORLD.data.consistency if on == "posterior" else None,
        of_pictures=lambda value: lambda x: value(x, slice(None)),
        space=SimpleNamespace(decode=lambda x: 2 * x - 1))  # so that the likelihood reads x itself


LIKELIHOOD = SimpleNamespace(log_prob=lambda x, c, reference: WORLD.log_prob(c, x))


@pytest.mark.parametrize(("on", "sees_c"), [
    ("posterior", False), ("posterior", True), ("fake", False), ("sample", False), ("sample", True)])
def test_jdms_direction_reads_likelihood_and_fake_score_where_it_is_told(on, sees_c):
    student, (t, c, z, eps) = student_of(1), WORLD.drawn(LEVELS)
    step, networks = Rows(student(c, z), t, eps, c), jdm_networks(student, on)
    method = JDM(weighting="constant", condition_clip=(0.0, 0.0), condition_weight=0.7, condition_on=on,
                 fake_sees_control=sees_c)
    ours, _ = method.direction(networks, LIKELIHOOD, step)

    x_t, alpha = SCHEDULE.noised(step.x, t, eps), SCHEDULE.alpha(t).double()[:, None]
    real, other = WORLD.data.score(x_t, t), networks.fake(x_t, t, (), c if sees_c else None)
    if on == "sample":
        condition = torch.linalg.solve(WORLD.R, (c - step.x @ WORLD.A.T).T).T @ WORLD.A
    elif on == "fake":
        own = LinearGaussianWorld(*moments(student), WORLD.A, WORLD.R, SCHEDULE)
        condition = alpha * own.plug_in_gradient(c, x_t, t, own.data.posterior_gain(t))
    else:
        condition = alpha * WORLD.plug_in_gradient(c, x_t, t, WORLD.data.consistency_gain(t))
    exact = alpha * (real.score - other.score) + 0.7 * condition
    torch.testing.assert_close(ours, exact, atol=1e-4, rtol=1e-4)


class OwnSchedules(Rows):
    """Of each stream one noise level: the middle of the range it asks for."""

    def noised(self, stream, schedule, span):
        t = schedule.t(schedule.timestep(torch.full_like(self.t, sum(span) / 2)))
        return schedule.noised(self.x.detach(), t, self.eps), t, self.eps


def test_each_term_has_a_schedule_of_its_own_where_noise_is_not_shared():
    student, (t, c, z, eps) = student_of(1), WORLD.drawn(LEVELS)
    step, networks = OwnSchedules(student(c, z), t, eps, c), jdm_networks(student)
    method = JDM(weighting="constant", condition_clip=(0.0, 0.0), t_range=(0.3, 0.9), condition_range=(0.04, 0.2))

    def direction(shared: bool) -> torch.Tensor:
        return replace(method, shared_noise=shared).direction(networks, LIKELIHOOD, step)[0]

    def parts(span: tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor]:
        x_t, t, _ = step.noised("", SCHEDULE, span)
        alpha, scores = SCHEDULE.alpha(t).double()[:, None], (WORLD.data.score(x_t, t), networks.fake(x_t, t, ()))
        condition = WORLD.plug_in_gradient(c, x_t, t, WORLD.data.consistency_gain(t))
        return alpha * (scores[0].score - scores[1].score), alpha * condition

    (fidelity, together), (_, own) = parts(method.t_range), parts(method.condition_range)
    torch.testing.assert_close(direction(True), fidelity + together, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(direction(False), fidelity + own, atol=1e-4, rtol=1e-4)


def moments(student: Student) -> tuple[torch.Tensor, torch.Tensor]:
    return WORLD.marginal(student).mean, WORLD.marginal(student).cov


def test_a_condition_term_on_the_clean_sample_ignores_the_noise_level():
    (t, c, z, eps), student = WORLD.drawn(LEVELS), WORLD.ignorant()  # real and fake agree: only the condition is left
    method = JDM(weighting="x0", condition_clip=(0.0, 0.0), condition_on="sample")
    early, late = (method.direction(jdm_networks(student), LIKELIHOOD, Rows(
        student(c, z), torch.full_like(t, level), eps, c))[0] for level in (0.1, 0.9))
    torch.testing.assert_close(early, late, atol=1e-4, rtol=1e-4)
    assert early.abs().max() > 0.1


@pytest.mark.parametrize(("progress", "ratio"), [(0.0, 0.5), (0.49, 0.5), (0.5, 2.0), (0.99, 2.0)])
def test_the_condition_terms_bound_is_the_first_in_the_first_half_of_a_run_and_then_the_second(progress, ratio):
    student, (t, c, z, eps) = student_of(1), WORLD.drawn(LEVELS)
    step = Rows(student(c, z), t, eps, c, progress=progress)

    def direction(weight: float) -> torch.Tensor:
        method = JDM(weighting="constant", condition_clip=(0.5, 2.0), condition_weight=weight)
        return method.direction(jdm_networks(student), LIKELIHOOD, step)[0]

    fidelity, condition = direction(0.0), direction(1e6) - direction(0.0)
    torch.testing.assert_close(condition.norm(dim=1).max(), ratio * fidelity.norm(dim=1).mean(), atol=1e-4, rtol=1e-4)


def test_a_steps_progress_is_the_share_of_the_run_that_is_done(teacher, tmp_path):
    run = tiny.run(RECIPES["nano-clean-likelihood"](), tmp_path, teacher, steps=4)
    begin = run.method.task(run).begin
    assert [begin(step).progress for step in range(4)] == [0, 0.25, 0.5, 0.75]


def test_a_frozen_posterior_answers_with_its_own_network_and_has_no_adapter(teacher, tmp_path):
    run = tiny.run(RECIPES["nano-frozen-posterior"](), tmp_path, teacher)
    networks = Networks.of(run, 625).with_frozen_posterior(str(teacher))
    for parameter in networks.fake.net.parameters():
        parameter.data.zero_()  # the moving posterior of the paper would follow
    x_t, t = torch.randn(2, 8, 8, 8), networks.schedule.t(torch.tensor([100, 700]))
    with torch.no_grad():
        ours, exact = networks.posterior(x_t, t, ["a coat", ""]), networks.real(x_t, t, ["a coat", ""]).x0
    torch.testing.assert_close(ours, exact)
    assert not networks.adapters


def test_a_fake_scores_new_controlnet_learns_at_a_controlnets_rate_and_a_trained_one_at_the_fakes(teacher, tmp_path):
    def groups(name):
        run = tiny.run(RECIPES[name](), tmp_path, teacher)
        (phase,) = [p for p in run.method.task(run).phases if p.name == "fake"]
        return run.method, [(len(parameters), optimiser) for parameters, optimiser in phase.groups]

    method, ((unet, one),) = groups("nano-no-warm-up")
    assert one == method.fake
    method, ((same, one), (controlnet, other)) = groups("nano-controlled-fake")
    assert (same, one, other) == (unet, method.fake, method.controlnet)
    assert controlnet > 20
    method, ((both, one),) = groups("nano-controlled-teacher")
    assert (both, one) == (unet + controlnet, method.fake)


# --- what cannot be started ---


def test_a_start_that_is_no_one_step_generator_or_runs_at_another_level_is_refused(teacher, student, tmp_path):
    run = tiny.run(RECIPES["nano-canny"](), tmp_path, teacher)
    with pytest.raises(UsageError, match=r"is no one-step generator.*jdm train nano-diff-instruct"):
        Networks.of(run, 625, start=str(teacher))
    with pytest.raises(UsageError, match="runs at level 625, asked for t_init 500; use --t-init 625"):
        Networks.of(run, 500, start=str(student))


@pytest.mark.parametrize(("changes", "message"), [
    ({"train_unet": False}, "must be a one-step generator's; name it with --start"),
    ({"condition_on": "sample", "draws": 4}, "need condition_on posterior, got sample"),
    ({"condition_on": "fake", "frozen_posterior": "somewhere"}, "need condition_on posterior, got fake"),
    ({"condition_on": "fake", "fake_sees_control": True}, "no x0 blind to it")])
def test_variants_that_contradict_each_other_are_refused(changes, message, teacher, tmp_path):
    run = tiny.run(RECIPES["nano-canny"](), tmp_path, teacher)
    with pytest.raises(UsageError, match=message):
        replace(run.method, **changes).task(run)


def test_a_controlled_teacher_without_a_controlnet_or_of_one_step_is_refused(teacher, student, tmp_path):
    run = tiny.run(RECIPES["nano-controlled-teacher"](), tmp_path, teacher)
    for model in (teacher, student):
        with pytest.raises(UsageError, match="is no multi-step model with a ControlNet"):
            replace(run.method, teacher=str(model)).task(run)


def test_a_controlled_teachers_networks_all_start_from_its_controlnet(teacher, controlled, tmp_path):
    from safetensors.torch import load_file

    run = tiny.run(RECIPES["nano-controlled-teacher"](), tmp_path, teacher)
    task = run.method.task(run)
    weights = load_file(controlled / "controlnet" / "diffusion_pytorch_model.safetensors")
    for net in (task.modules["controlnet"], task.modules["fake"].controlnet):
        assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())
