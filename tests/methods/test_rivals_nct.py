"""Noise Consistency Training: its noise, its multiplier, its two losses, and a world where its optimum is known."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tiny
from jdm.errors import UsageError
from jdm.loading import Loaded
from jdm.methods.nct import NCT, Multiplier, Noises, diffused
from jdm.models.stable_diffusion import StableDiffusion
from jdm.recipes import all_recipes
from jdm.training import checkpoint
from jdm.training.loop import train
from worlds import cubature, tensor

RECIPES = all_recipes()


# --- noise and multiplier ---


@pytest.mark.parametrize("s", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_diffused_noise_stays_normal_and_forgets_z(s):
    """Of z a part sqrt(1 - s^2) is left."""
    z, eps = cubature(6).split(3, 1)
    z_s = diffused(z, eps, torch.full((12,), s, dtype=torch.float64))
    one = torch.eye(3).double()
    torch.testing.assert_close(z_s.mean(0), 0 * one[0])
    torch.testing.assert_close(z_s.T @ z_s / 12, one)
    torch.testing.assert_close(z_s.T @ z / 12, (1 - s**2) ** 0.5 * one)


def test_the_dual_step_follows_xi_and_stays_nonnegative():
    multiplier = Multiplier(0.1)
    for bound, expected in ((0.35, 0.25), (0.05, 0.25), (0.0, 0.225), (-2.0, 0.0), (0.05, 0.0), (0.25, 0.1)):
        multiplier.ascend(0.5, torch.tensor(bound - 0.05))
        assert float(multiplier.value) == pytest.approx(expected, abs=1e-6)


def test_a_resumed_multiplier_is_bit_exact(untrained_judge, teacher, tmp_path):
    def last(out):
        place = checkpoint.last(out)
        assert place is not None
        return load_file(place / "state.safetensors")

    def stop(done, _):
        if done == 2:
            raise KeyboardInterrupt

    alone = tiny.run(RECIPES["nano-nct"](), tmp_path / "alone", teacher, steps=4)
    stopped = tiny.run(RECIPES["nano-nct"](), tmp_path / "stopped", teacher, steps=4)
    train(alone)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, stop)
    halfway = last(stopped.out)["module.multiplier.value"]
    train(stopped)
    ours, exact = last(stopped.out), last(alone.out)
    assert all(torch.equal(ours[k], exact[k]) for k in exact)
    assert ours["module.multiplier.value"] < halfway < 1  # an adapter that has hardly moved is far inside the bound


# --- the two losses ---


class Recorded:
    """x = weight tanh(z) + c, and every z it was asked for."""

    def __init__(self, steps: int = 1):
        self.weight, self.asked, self.steps = tensor([1.5]).requires_grad_(), [], steps

    def __call__(self, z: Tensor, y: list[str], control: Tensor | None = None, renoise=None) -> Tensor:
        self.asked.append(z if self.steps == 1 else torch.stack([z, *map(renoise, range(1, self.steps))]))
        return self.weight * z.tanh() + (0 if control is None else control)


def noises(uniform: float, n: int = 8) -> Noises:
    random = torch.Generator().manual_seed(0)
    z, eps, x, c = (torch.randn(n, 3, generator=random).double() for _ in range(4))
    return Noises([""] * n, z, eps, torch.full((n,), uniform), x, c)


def loss_of(method: NCT, generator, batch: Noises, multiplier: float = 2.0):
    return method.loss(SimpleNamespace(generator=generator), Multiplier(multiplier), batch)  # type: ignore[arg-type]


def test_the_first_level_is_z_the_last_noise():
    generator = Recorded()
    batch = noises(0.0)
    loss_of(NCT(levels=4), generator, batch)
    assert torch.equal(generator.asked[0], batch.z)
    loss_of(NCT(levels=4), generator, noises(0.999))
    torch.testing.assert_close(generator.asked[4], batch.eps)  # s = 1
    torch.testing.assert_close(generator.asked[3], diffused(batch.z, batch.eps, torch.full((8,), 0.75)))


def test_every_noise_of_several_steps_is_diffused_alike():
    generator, batch = Recorded(steps=3), noises(0.6)
    random = torch.Generator().manual_seed(1)
    pairs = [tuple(torch.randn(8, 3, generator=random).double() for _ in range(2)) for _ in range(2)]
    batch = replace(batch, fresh=tuple(pairs))
    loss_of(NCT(levels=4), generator, batch)
    for asked, s in zip(generator.asked, (0.5, 0.75, 0.0), strict=True):  # sg f(z_k), f(z_k+1), then the boundary
        at = torch.full((8,), s)
        exact = [diffused(z, eps, at) for z, eps in [(batch.z, batch.eps), *pairs]]
        torch.testing.assert_close(asked, torch.stack(exact))


def test_each_switch_removes_exactly_its_own_loss():
    batch = noises(0.4)
    both, logs = loss_of(NCT(), Recorded(), batch)
    consistency, bound = logs["consistency_loss"], logs["boundary_loss"]
    torch.testing.assert_close(both, consistency + 2.0 * bound)
    torch.testing.assert_close(loss_of(NCT(boundary=False), Recorded(), batch)[0], consistency)
    torch.testing.assert_close(loss_of(NCT(consistency=False), Recorded(), batch)[0], 2.0 * bound)
    assert min(consistency, bound) > 0


def test_a_run_without_either_loss_is_refused(tmp_path):
    run = tiny.run(RECIPES["nano-nct"](), tmp_path, tmp_path)
    with pytest.raises(UsageError, match="without both of its losses"):
        NCT(consistency=False, boundary=False).needs(run)


def test_maps_of_ones_own_are_refused(tmp_path, teacher):
    run = tiny.run(RECIPES["nano-nct"](), tmp_path, teacher, data=replace(tiny.DATA, controls="maps"))
    with pytest.raises(UsageError, match=r"--data\.controls maps gives .* NCT measures the control on its own samples"):
        run.method.needs(run)


def test_the_loss_uses_the_multiplier_before_its_step():
    multiplier = Multiplier(2.0)
    method = NCT(consistency=False, dual_rate=10.0)
    value, logs = method.loss(SimpleNamespace(generator=Recorded()), multiplier, noises(0.4))  # type: ignore[arg-type]
    torch.testing.assert_close(value, 2.0 * logs["boundary_loss"])
    value.backward()
    assert method.dual_step(multiplier, logs)["multiplier"] == multiplier.value
    moved = 2.0 + 10 * (logs["boundary_loss"] - 0.05)
    torch.testing.assert_close(multiplier.value, moved, check_dtype=False)


def test_only_the_noisier_level_carries_a_gradient():
    method, generator, batch = NCT(boundary=False, levels=4), Recorded(), noises(0.6)
    (ours,) = torch.autograd.grad(loss_of(method, generator, batch)[0], generator.weight)
    before, after = (generator.weight * diffused(batch.z, batch.eps, torch.full((8,), s)).tanh() + batch.shown
                     for s in (0.5, 0.75))
    (exact,) = torch.autograd.grad(method.distance(after, before.detach()), generator.weight, retain_graph=True)
    (whole,) = torch.autograd.grad(method.distance(after, before), generator.weight)
    torch.testing.assert_close(ours, exact)
    assert (ours - whole).abs() > 1e-3


def test_the_distance_is_pseudo_huber():
    a, b = torch.randn(5, 2, 3, 3).double(), torch.randn(5, 2, 3, 3).double()
    square = (a - b).square().mean((1, 2, 3))
    torch.testing.assert_close(NCT(huber=0.03).distance(a, b), ((square + 9e-4).sqrt() - 0.03).mean())
    torch.testing.assert_close(NCT().distance(a, a), 0 * square[0])


def test_the_control_measures_the_frozen_generators_sample(teacher, student, tmp_path):
    run = tiny.run(RECIPES["nano-nct"](), tmp_path, teacher)
    networks = run.method._networks(Loaded(run))
    control = networks.control
    batch = Noises.of(networks, control, step=0)
    alone = StableDiffusion.load(str(student)).with_networks(controlnet=None)
    x = alone.generator(alone.text(), alone.denoiser())(batch.z, batch.y)
    torch.testing.assert_close(batch.x, x, atol=1e-4, rtol=1e-4)
    images = ((networks.space.decode(x) + 1) / 2).clamp(0, 1)
    # Hard edges: rounding may move a pixel of a thousand across a threshold.
    assert (batch.shown - control.image(control.h(images))).abs().mean() < 1e-3


def test_without_consistency_a_zero_adapter_never_moves(untrained_judge, teacher, tmp_path):
    train(tiny.run(RECIPES["nano-nct-no-consistency"](), tmp_path, teacher))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["controlnet/gradient"] for r in rows] == [0, 0]


# --- a linear world: f(z) = A z, c = C z with C = H A, adapter f_phi(z, c) = M z + N c ---
#
# With a quadratic d, r = mean_k (1 - corr(z_k, z_k+1)) and K levels, the gradients that training follows are, up to
# one factor,
#     over M:  r M + lambda (M + N C - A),     over N:  -(1/K) M C^T + lambda (M + N C - A) C^T.
# Both vanish only where M C^T = 0, and then M = w A P and N = A C^+, with P the projection onto the part of z that c
# does not determine and w = lambda / (lambda + r): x = A C^+ c + w A P z'. It obeys c for ANY fresh z' and at any
# lambda > 0, H x = c; the boundary only decides how much of z' survives. lambda stops where
# |(1 - w) A P|^2 = xi, which is also the optimum of the constrained problem itself.

A = torch.randn(3, 3, generator=torch.Generator().manual_seed(2)).double()
H = torch.randn(1, 3, generator=torch.Generator().manual_seed(3)).double()
C = H @ A
FREE = torch.eye(3).double() - torch.linalg.pinv(C) @ C  # P
LEVELS, WIDE = 6, 100.0  # a Huber constant far above every residual: d = |a - b|^2 / (2 * 3 * WIDE)
UNIT = 6 * WIDE


def decorrelation() -> float:
    """r: the mean over levels of 1 - corr(z_k, z_k+1)."""
    s = torch.linspace(0, 1, LEVELS + 1).double()
    cosine = (1 - s**2).sqrt()
    return float((1 - cosine[1:] * cosine[:-1] - s[1:] * s[:-1]).mean())


def optimum(multiplier: float) -> tuple[Tensor, Tensor]:
    return multiplier / (multiplier + decorrelation()) * A @ FREE, A @ torch.linalg.pinv(C)


def everything() -> Noises:
    """Every level with every point of the cubature: the exact expectation over z, eps and k."""
    z, eps = cubature(6).repeat(LEVELS, 1).split(3, 1)
    uniform = ((torch.arange(LEVELS) + 0.5) / LEVELS).repeat_interleave(12)
    return Noises([], z, eps, uniform, z @ A.T, z @ C.T)


def adapter(M: Tensor, N: Tensor):
    return SimpleNamespace(generator=lambda z, y, c, renoise=None: z @ M.T + c @ N.T)


def trained(method: NCT, multiplier: Multiplier, steps: int, optimiser=torch.optim.Adam, lr=0.05):
    """(M, N) from the frozen generator, M = A and N = 0, by Adam with a cosine to zero."""
    M, N = A.clone().requires_grad_(), torch.zeros_like(H.T).requires_grad_()
    optimiser, batch = optimiser([M, N], lr=lr), everything()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        value, logs = method.loss(adapter(M, N), multiplier, batch)  # type: ignore[arg-type]
        (UNIT * value).backward()
        method.dual_step(multiplier, logs)
        optimiser.step()
        schedule.step()
    return M.detach(), N.detach()


@pytest.mark.parametrize("multiplier", [0.01, 0.3, 5.0])
def test_the_gradient_vanishes_at_the_linear_optimum(multiplier):
    """At the optimum the adapter obeys c and keeps the rest of z."""
    M, N = (v.requires_grad_() for v in optimum(multiplier))
    method = NCT(levels=LEVELS, huber=WIDE)
    value = UNIT * method.loss(adapter(M, N), Multiplier(multiplier), everything())[0]  # type: ignore[arg-type]
    # The Huber constant leaves residuals of order 1 a ten-thousandth short of quadratic.
    assert max(g.abs().max() for g in torch.autograd.grad(value, (M, N))) < 1e-3 * multiplier


def test_linear_training_obeys_c_at_the_bound():
    """Every fresh noise obeys c; of z a part is left."""
    xi = 0.04 * float((A @ FREE).square().sum())  # so that (1 - w)^2 = .04
    method, multiplier = NCT(levels=LEVELS, huber=WIDE, xi=xi / UNIT, dual_rate=0.02 * UNIT), Multiplier(1.0)
    M, N = trained(method, multiplier, 1500)
    # Float32 in the multiplier, and the Huber constant as above.
    close = dict(atol=1e-3, rtol=1e-3)
    assert float(multiplier.value) == pytest.approx(decorrelation() * 0.8 / 0.2, rel=1e-3)
    torch.testing.assert_close((M, N), (0.8 * A @ FREE, A @ torch.linalg.pinv(C)), **close)
    torch.testing.assert_close(M @ M.T, 0.64 * A @ FREE @ A.T, **close)  # w^2 Cov[x | c]: z survives, shrunk
    z, fresh = torch.randn(2, 256, 3, generator=torch.Generator().manual_seed(0)).double()
    c = z @ C.T
    ours, ignored = ((x @ H.T - c).square().mean().sqrt() for x in (fresh @ M.T + c @ N.T, fresh @ A.T))
    assert ours < 1e-4, f"rms h(x) - c: {float(ours):.2e}, where the frozen generator has {float(ignored):.2f}"
    assert ignored > 0.5


def test_consistency_alone_forgets_z_and_misscales_c():
    """Down the gradient from M = A and N = 0, the end is M = 0 and N = A C^T / (K r): A C^+ only where C C^T = K r."""
    M, N = trained(NCT(levels=LEVELS, huber=WIDE, boundary=False), Multiplier(1.0), 600, torch.optim.SGD, 1.0)
    # The Huber constant, as above.
    torch.testing.assert_close(M, 0 * A, atol=1e-3, rtol=0)
    torch.testing.assert_close(N, A @ C.T / (LEVELS * decorrelation()), atol=1e-2, rtol=1e-2)
    assert abs(float(H @ N) - 1) > 0.2, "h(x) = H N c, and not c"
