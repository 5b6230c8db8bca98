"""Several teachers in the Gaussian world: the student's optimum is their geometric mixture."""

from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from jdm.directions import ascend
from jdm.errors import UsageError
from jdm.levels import Levels
from jdm.methods.diff_instruct import DiffInstruct
from jdm.methods.networks import Fake, Student
from jdm.methods.refusals import refuse_impossible
from jdm.recipes import find
from jdm.schedule import NoiseSchedule
from jdm.score import ScoreModel
from jdm.terms import CFGAugmentation, Fidelity
from jdm.training.loop import train
from worlds import Gaussian, LinearGaussianWorld, Rows, cubature, scene
from worlds import Student as Linear

SCHEDULE = NoiseSchedule.scaled_linear()
OWN, B, C = (LinearGaussianWorld.example(SCHEDULE, seed=k) for k in (0, 3, 5))
EMPTY = LinearGaussianWorld.example(SCHEDULE, seed=7)
ALSO = (("b", 0.3), ("c", 0.2))
SHARES = ((OWN, 0.5), (B, 0.3), (C, 0.2))


class Guide(ScoreModel):
    """A further teacher; without the prompt all teachers are one."""

    def __init__(self, world: LinearGaussianWorld):
        super().__init__(world.data.score, SCHEDULE)

    def conditional_and_unconditional(self, x_t, t, y, control=None):
        return self.net(x_t, t), EMPTY.data.score(x_t, t)

    def guided(self, x_t, t, y, control=None):
        return self.net(x_t, t)


def direction(term: Any, x: Tensor, eps: Tensor, t: Tensor, name: str = "fidelity") -> Tensor:
    now = x.detach()
    fake = Gaussian(now.mean(0), torch.cov(now.T, correction=0), SCHEDULE)
    networks: Any = scene(SCHEDULE, Guide(OWN), lambda x_t, t, y, control=None: fake.score(x_t, t),
                          guides={"guide b": Guide(B), "guide c": Guide(C)})
    step: Any = Rows(x, t, eps)
    declared = DiffInstruct().distillation()
    return type(declared)("test", Student(), Fake(), {name: term}).direction(networks, step)[0]


def everything(t: float) -> tuple[Tensor, Tensor, Tensor]:
    z, eps = cubature(6).split(3, 1)
    return z, eps, torch.full((12,), t).double()


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_fidelity_descends_the_teachers_weighted_divergences(t):
    """d/dtheta sum_i share_i KL(q_t || p_i,t), lambda = sigma^2 / alpha^2."""
    z, eps, at = everything(t)
    L = (torch.eye(3) + 0.3 * torch.randn(3, 3, generator=torch.Generator().manual_seed(0))).double().requires_grad_()
    b = torch.tensor([0.4, -0.1, 0.2]).double().requires_grad_()
    x = z @ L.T + b
    found = direction(Fidelity(guidance=1.0, normaliser="none", also=ALSO), x, eps, at)
    ours = torch.autograd.grad(ascend(x, found), (L, b))
    student = Linear(torch.zeros(3, 2).double(), L, b)
    one = at[:1]
    weight = ((SCHEDULE.sigma(one) / SCHEDULE.alpha(one)) ** 2).double()
    parts = [weight * share * world.fidelity(student, one) for world, share in SHARES]
    exact = torch.autograd.grad(torch.stack(parts).sum(), (L, b))
    for a, e in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, e, atol=1e-4, rtol=1e-4)


def test_at_the_geometric_mixture_nothing_pulls():
    """At one t: precision sum share_i P_i, mean its precision-weighted one."""
    t = 0.3
    z, eps, at = everything(t)
    alpha, sigma = float(SCHEDULE.alpha(at[:1])), float(SCHEDULE.sigma(at[:1]))
    eye = torch.eye(3).double()
    P = [(share * torch.linalg.inv(alpha**2 * w.data.cov + sigma**2 * eye), alpha * w.data.mean) for w, share in SHARES]
    cov = torch.linalg.inv(sum(p for p, _ in P))  # type: ignore[arg-type]
    mean = cov @ sum(p @ m for p, m in P)  # type: ignore[operator]
    root = torch.linalg.cholesky((cov - sigma**2 * eye) / alpha**2)
    x = z @ root.T + mean / alpha
    mixed, alone = (direction(Fidelity(guidance=1.0, normaliser="none", also=also), x, eps, at) for also in (ALSO, ()))
    assert mixed.abs().max() < 1e-4
    assert alone.abs().max() > 0.1


def test_augmentation_is_the_mean_of_the_teachers():
    z, eps, at = everything(0.4)
    x_t = SCHEDULE.noised(z, at, eps)
    term = CFGAugmentation(normaliser="none", lambda_t="constant", also=ALSO)
    exact = sum(share * (w.data.score(x_t, at).score - EMPTY.data.score(x_t, at).score) for w, share in SHARES)
    alpha = SCHEDULE.alpha(at, z)
    torch.testing.assert_close(direction(term, z, eps, at), alpha * exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("also", [(("b", 0.0),), (("b", -0.2),), (("b", 0.7), ("c", 0.4))])
def test_shares_that_do_not_add_up_are_refused(also):
    declared = DiffInstruct(fidelity=Fidelity(levels=Levels(), also=also)).distillation()
    with pytest.raises(UsageError, match=r"above 0 and at most 1 together, got .*; lower --fidelity.also"):
        refuse_impossible(declared, SCHEDULE, 10)


def test_a_run_loads_every_teacher(teacher, controlled, tmp_path, untrained_judge):
    run = tiny.run(find("nano-diff-instruct")(), tmp_path, teacher, steps=1)
    method = DiffInstruct(fake=run.method.fake, fidelity=Fidelity(also=((str(controlled), 0.4),)))
    needs = method.needs(run)
    assert needs.models[f"guide {controlled}"] == str(controlled)
    train(type(run)(**{**vars(run), "method": method}))
