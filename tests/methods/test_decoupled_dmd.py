"""Decoupled DMD in the Gaussian world: its terms, backward simulation's gradient, and the optimum of four steps."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

import tiny
from jdm.directions import ascend, lambda_t
from jdm.errors import UsageError
from jdm.generator import Generator
from jdm.levels import RENOISING
from jdm.methods.decoupled_dmd import DecoupledDMD
from jdm.methods.diff_instruct import DiffInstruct
from jdm.methods.networks import Fake
from jdm.recipes import find
from jdm.schedule import NoiseSchedule
from jdm.score import Estimate
from jdm.terms import CFGAugmentation, Fidelity
from jdm.training.trainer import Trainer
from worlds import Gaussian, LinearGaussianWorld, Rows, Student, cubature, scene, tensor

SCHEDULE = NoiseSchedule.scaled_linear()
COND = LinearGaussianWorld.example(SCHEDULE)
# Without the prompt: wider, and elsewhere.
UNCOND = LinearGaussianWorld(COND.data.mean + tensor([0.3, -0.2, 0.1]), 4 * COND.data.cov, COND.A, COND.R, SCHEDULE)
FOUR, QUANTILES = (999, 749, 499, 249), 8


@dataclass(frozen=True)
class Teacher:
    """A teacher in closed form: a jdm.score.ScoreModel of two Gaussians."""

    w: float

    def conditional_and_unconditional(self, x_t, t, y, control=None):
        return COND.data.score(x_t, t), UNCOND.data.score(x_t, t)

    def guided(self, x_t, t, y, control=None) -> Estimate:
        cond, uncond = self.conditional_and_unconditional(x_t, t, y)
        return replace(cond, output=uncond.output + self.w * (cond.output - uncond.output))


def networks(fake: Gaussian) -> Any:
    found = scene(SCHEDULE, None, lambda x_t, t, y, control=None: fake.score(x_t, t))
    found.real_score = Teacher
    return found


@dataclass(frozen=True)
class Quantiles(Rows):
    """Every sample at the same quantiles of each range of levels."""

    def noised(self, stream, schedule, low, high):
        t = at_quantiles(low, high).repeat_interleave(len(self.x) // QUANTILES)
        return schedule.noised(self.x.detach(), t, self.eps), t, self.eps


def at_quantiles(low: float, high: float) -> Tensor:
    return SCHEDULE.grid((torch.arange(QUANTILES) + 0.5) / QUANTILES, low, high)


@pytest.mark.parametrize("w", [1.0, 3.0, 7.5])
def test_at_one_level_both_branches_are_guided_dmd(w):
    random = torch.Generator().manual_seed(0)
    x, eps = (torch.randn(64, 3, generator=random).double() for _ in range(2))
    t = SCHEDULE.grid(torch.rand(64, generator=random), 0.02, 0.98)
    step: Any = Rows(x, t, eps)
    shared, _ = RENOISING["coupled-shared"]
    ours = DecoupledDMD(augmentation=CFGAugmentation(weight=w - 1, normaliser="none", levels=shared)).distillation()
    guided = DiffInstruct(fidelity=Fidelity(guidance=w, normaliser="none")).distillation()
    fake = LinearGaussianWorld.example(SCHEDULE, seed=3).data
    found, exact = (d.direction(networks(fake), step)[0] for d in (ours, guided))
    assert found.abs().max() > 0.1
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-5)


# --- a student of four linear steps, x0 = mean + gain (x_t - alpha mean) + shift, its gains diagonal ---


class Linear:
    """A denoiser with a diagonal gain and a shift for each of its levels, in float64; it predicts the sample."""

    def __init__(self, parameters: Tensor):
        self.gains, self.shifts = parameters[:, :3], parameters[:, 3:]

    def __call__(self, x_t, timestep, text, control):
        k = FOUR.index(int(timestep[0]))
        return self.shifts[k] + self.gains[k] * x_t


def moments(parameters: Tensor, last: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance of x of step `last` in closed form; steps before it carry no gradient."""
    mean, cov = torch.zeros(3).double(), torch.eye(3).double()
    for k in range(last + 1):
        row = parameters[k] if k == last else parameters[k].detach()
        mean, cov = row[3:] + row[:3] * mean, row[:3, None] * cov * row[None, :3]
        if k < last:
            t = SCHEDULE.t(torch.tensor([FOUR[k + 1]]))
            alpha, sigma = SCHEDULE.alpha(t).double(), SCHEDULE.sigma(t).double()
            mean, cov = alpha * mean, alpha**2 * cov + sigma**2 * torch.eye(3)
    return mean, cov


def objective(parameters: Tensor, last: int, method: DecoupledDMD) -> Tensor:
    """E_DM lambda KL(q_t || cond) + (alpha - 1) E_CA lambda [ KL(q_t || cond) - KL(q_t || uncond) ] of that step."""
    mean, cov = moments(parameters, last)
    student = Student(torch.zeros(3, 2).double(), torch.linalg.cholesky(cov), mean)
    content = float(SCHEDULE.t(FOUR[last])) if last else 1.0

    def weighted(levels, of) -> Tensor:
        t = at_quantiles(levels.low, levels.highest(content))
        return (lambda_t("x0", SCHEDULE.alpha(t).double(), SCHEDULE.sigma(t).double()) * of(t)).mean()

    dm, ca = method.matching, method.augmentation
    assert dm is not None
    assert ca is not None
    matching = weighted(dm.levels, lambda t: COND.fidelity(student, t))
    sharpening = weighted(ca.levels, lambda t: UNCOND.fidelity(student, t) - COND.fidelity(student, t))
    return dm.weight * matching - ca.weight * sharpening


def loss(parameters: Tensor, last: int, method: DecoupledDMD) -> Tensor:
    """The engine's loss of the generator where step `last` was drawn, its expectation exact."""
    noise = [part.repeat(QUANTILES, 1) for part in cubature(15).split(3, dim=1)]
    generator = Generator(Linear(parameters), SCHEDULE, FOUR, lambda y: None, "sample")  # type: ignore[arg-type]
    x = generator.rollout(noise[0], [], None, last, lambda k: noise[k])
    now = x.detach()
    fake = Gaussian(now.mean(0), torch.cov(now.T, correction=0), SCHEDULE)
    step: Any = Quantiles(x, x, noise[4], content=float(SCHEDULE.t(FOUR[last])) if last else 1.0)
    return ascend(x, method.distillation().direction(networks(fake), step)[0])


def named(name: str, weight: float = 1.0) -> DecoupledDMD:
    dm, ca = RENOISING[name]
    return DecoupledDMD(matching=Fidelity(guidance=1.0, normaliser="none", levels=dm),
                        augmentation=CFGAugmentation(weight=weight, normaliser="none", levels=ca))


START = torch.cat([torch.full((4, 3), 0.7), torch.zeros(4, 3)], 1).double()


@pytest.mark.parametrize("last", range(4))
@pytest.mark.parametrize("name", sorted(RENOISING))
def test_backward_simulations_gradient_is_the_objectives(name, last):
    random = torch.Generator().manual_seed(last)
    parameters = (START + 0.2 * torch.randn(4, 6, generator=random)).requires_grad_()
    (ours,) = torch.autograd.grad(loss(parameters, last, named(name)), parameters)
    (exact,) = torch.autograd.grad(objective(parameters, last, named(name)), parameters)
    assert exact[last].abs().max() > 1e-3
    torch.testing.assert_close(ours, exact, atol=1e-4, rtol=1e-4)


def optimum(method: DecoupledDMD) -> Tensor:
    """Each step's minimiser in turn, its input coming from those before it, by BFGS."""
    found = START.clone()
    for last in range(4):

        def value_and_gradient(flat, last=last):
            row = torch.from_numpy(flat).requires_grad_()
            value = objective(torch.cat([found[:last], row[None], found[last + 1 :]]), last, method)
            return value.item(), torch.autograd.grad(value, row)[0].numpy()

        found[last] = torch.from_numpy(minimize(value_and_gradient, found[last].numpy(), jac=True, method="BFGS",
                                                options={"gtol": 1e-8}).x)
    return found


@pytest.mark.parametrize("name", ["decoupled-hybrid", "decoupled-constrained"])
def test_four_steps_reach_the_computed_optimum(name):
    method = named(name)
    best, ours = optimum(method), START.clone().requires_grad_()
    adam = torch.optim.Adam([ours], lr=0.05, betas=(0.9, 0.99))
    rounds = 300
    for k in range(rounds):
        adam.param_groups[0]["lr"] = 0.05 * (1 - k / rounds)
        adam.zero_grad()
        sum(loss(ours, last, method) for last in range(4)).backward()  # type: ignore[union-attr]
        adam.step()
    for last in range(4):  # moments: a gain of the other sign draws the same
        assert objective(best, last, method) < objective(START, last, method) - 0.02
        for found, exact in zip(moments(ours.detach(), last), moments(best, last), strict=True):
            # Earlier steps still move while later ones settle: Adam's last steps are of this size.
            torch.testing.assert_close(found, exact, atol=2e-3, rtol=2e-3)


# --- what is the paper's, and what is not ---


def test_the_declaration_is_algorithm_1():
    method = DecoupledDMD()
    declared = method.distillation()
    dm, ca = declared.terms["matching"], declared.terms["augmentation"]
    assert (dm.levels, ca.levels) == RENOISING["decoupled-hybrid"]
    for term in (dm, ca):
        assert (term.normaliser, term.lambda_t) == ("none", "x0")  # type: ignore[attr-defined]
    assert declared.guidance == 1.0
    assert method.fake.loss == "x0"
    assert method.student.levels == FOUR
    assert list(DecoupledDMD(augmentation=None).distillation().terms) == ["matching"]


def small(tmp_path, teacher, steps: int = 3, **fake):
    recipe = find("nano-diff-instruct")()
    method = DecoupledDMD(fake=replace(recipe.method.fake, **fake))
    return tiny.run(replace(recipe, method=method), tmp_path, teacher, steps=steps)


def test_only_the_fake_moves_during_its_warm_up(teacher, tmp_path, untrained_judge):
    trainer = Trainer(small(tmp_path, teacher, warm_up=2))
    student, fake = trainer.task.modules["unet"], trainer.task.modules["fake"]

    def moved(module, step) -> bool:
        before = [p.clone() for p in module.parameters()]
        trainer.step(step)
        return any(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))

    assert [moved(student, 0), moved(fake, 1), moved(student, 2)] == [False, True, True]


def test_a_warm_up_without_end_is_refused(teacher, tmp_path):
    with pytest.raises(UsageError, match="shorter than the run's 3 steps, got"):
        Trainer(small(tmp_path, teacher, warm_up=3))


def test_x0_loss_weighs_eps_by_the_noise(teacher, tmp_path):
    """(x0 - x)^2 = (sigma / alpha)^2 (eps - its estimate)^2 at one level."""
    at = float(SCHEDULE.t(625))
    losses = []
    for kind in ("eps", "x0"):
        run = small(tmp_path, teacher, low=at, high=at, loss=kind)
        torch.manual_seed(0)
        task = run.method.task(tiny.Loaded(run))
        losses.append(task.phases[0].loss(task.begin(0), 0)[0].item())
    ratio = (1 - float(SCHEDULE.alphas_cumprod[625])) / float(SCHEDULE.alphas_cumprod[625])
    assert losses[1] / losses[0] == pytest.approx(ratio, rel=1e-4)
    assert Fake().loss == "eps"
