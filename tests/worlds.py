"""Worlds where every quantity of the papers has a closed form: the oracles of the tests.

All in float64. `LinearGaussianWorld`: x and c are jointly Gaussian and a student is linear, so the bound of
Lemma 3.1, its gap and its optimum are known. A world of discrete c is in mixtures.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from jdm.schedule import NoiseSchedule
from jdm.score import Estimate, Prompts


def tensor(*values) -> Tensor:
    """A float64 tensor: `tensor([1, 2])`."""
    return torch.tensor(*values, dtype=torch.float64)


def coarse_schedule(every: int = 20) -> NoiseSchedule:
    """Stable Diffusion 1.5's schedule thinned to 1000 / every levels: the same range, fewer rows."""
    return NoiseSchedule(NoiseSchedule.scaled_linear().alphas_cumprod[every - 1 :: every])


def cubature(n: int) -> Tensor:
    """[2n, n] points +-sqrt(n) e_i: mean 0 and covariance I exactly.

    Every gradient of a linear-Gaussian world is at most quadratic in its noises, so a plain average over
    these rows IS the expectation: training on them has no sampling error.
    """
    return math.sqrt(n) * torch.cat([torch.eye(n), -torch.eye(n)]).double()


@dataclass(frozen=True)
class Gaussian:
    """x ~ N(mean, cov) and so x_t ~ N(alpha mean, alpha^2 cov + sigma^2 I); t is [B] throughout."""

    mean: Tensor
    cov: Tensor
    schedule: NoiseSchedule

    def score(self, x_t: Tensor, t: Tensor, y: Prompts | None = None) -> Estimate:
        """-(alpha^2 cov + sigma^2 I)^-1 (x_t - alpha mean), as an Estimate; a jdm.score.Score."""
        alpha, sigma = levels(self.schedule, t)
        gain = self._spectral(t, lambda s, a, b: b / (a**2 * s + b**2))
        return Estimate(x_t, times(gain, x_t - alpha * self.mean), alpha, sigma)

    def posterior_gain(self, t: Tensor) -> Tensor:
        """K = alpha cov (alpha^2 cov + sigma^2 I)^-1, [B, d, d]: E[x | x_t] = mean + K (x_t - alpha mean)."""
        return self._spectral(t, lambda s, a, b: a * s / (a**2 * s + b**2))

    def posterior_cov(self, t: Tensor) -> Tensor:
        """Cov[x | x_t] = sigma^2 cov (alpha^2 cov + sigma^2 I)^-1, [B, d, d]."""
        return self._spectral(t, lambda s, a, b: b**2 * s / (a**2 * s + b**2))

    def consistency_gain(self, t: Tensor) -> Tensor:
        """cov^1/2 (alpha^2 cov + sigma^2 I)^-1/2, [B, d, d]: the slope of the ODE's endpoint."""
        return self._spectral(t, lambda s, a, b: (s / (a**2 * s + b**2)).sqrt())

    def through(self, gain: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """mean + gain (x_t - alpha mean): any of the linear maps above."""
        return self.mean + times(gain, x_t - levels(self.schedule, t)[0] * self.mean)

    def posterior_mean(self, x_t: Tensor, t: Tensor, y: Prompts | None = None) -> Tensor:
        """E[x | x_t]."""
        return self.through(self.posterior_gain(t), x_t, t)

    def consistency(self, x_t: Tensor, t: Tensor, y: Prompts | None = None) -> Tensor:
        """Endpoint at t = 0 of the probability-flow ODE from x_t: the exact consistency function."""
        return self.through(self.consistency_gain(t), x_t, t)

    def _spectral(self, t: Tensor, of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """U diag(of(s, alpha, sigma)) U^T for cov = U diag(s) U^T; [B, d, d]."""
        s, U = torch.linalg.eigh(self.cov)
        alpha, sigma = levels(self.schedule, t)
        return (U * of(s, alpha, sigma).unsqueeze(1)) @ U.T


@dataclass(frozen=True)
class Student:
    """x = B c + L z + b, with c ~ N(c_mean, c_cov) and z ~ N(0, I)."""

    B: Tensor
    L: Tensor
    b: Tensor

    def __call__(self, c: Tensor, z: Tensor) -> Tensor:
        return c @ self.B.T + z @ self.L.T + self.b

    @property
    def spread(self) -> Tensor:
        """Cov[x | c] = L L^T: what is left of z."""
        return self.L @ self.L.T

    def trainable(self) -> Student:
        return Student(*(p.clone().requires_grad_() for p in (self.B, self.L, self.b)))

    def flat(self) -> np.ndarray:
        return torch.cat([p.detach().flatten() for p in (self.B, self.L, self.b)]).numpy()

    def like(self, flat: Tensor) -> Student:
        """The student whose parameters are the entries of `flat`."""
        B, L, b = flat.split([self.B.numel(), self.L.numel(), self.b.numel()])
        return Student(B.view_as(self.B), L.view_as(self.L), b)


def ascended(start: Student, steps: int, of: Callable[[Student], Tensor]) -> Student:
    """Adam with a cosine to zero, down `of(student)`."""
    student = start.trainable()
    optimiser = torch.optim.Adam([student.B, student.L, student.b], lr=0.05, betas=(0.9, 0.99))
    for k in range(steps):
        optimiser.param_groups[0]["lr"] = 0.025 * (1 + math.cos(math.pi * k / steps))
        optimiser.zero_grad()
        of(student).backward()
        optimiser.step()
    return Student(*(p.detach() for p in (student.B, student.L, student.b)))


@dataclass(frozen=True)
class Rows:
    """An engine's `Step` in a world: x of these rows, and one x_t for every stream."""

    x: Tensor
    t: Tensor
    eps: Tensor
    c: Tensor | None = None
    y: tuple[str, ...] = ()
    progress: float = 0.0
    content: float = 1.0
    last: int = 0

    shown = property(lambda self: self.c)
    images = None

    def noised(self, stream: str, schedule: NoiseSchedule, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
        return schedule.noised(self.x.detach(), self.t, self.eps), self.t, self.eps

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        return compute()


def scene(schedule: NoiseSchedule, real: Any, fake: Any, **more: Any) -> SimpleNamespace:
    """What an engine's terms read of `Networks`, for scores in closed form; likelihoods and rewards read x itself.

    Args:
        real: has guided(x_t, t, y, control) and conditional_and_unconditional, and can be called.
        fake: (x_t, t, y, control) -> Estimate.
    """
    own = {"control": None, "reward": None, "posteriors": {}, "guides": {}, "real_sees_control": False,
           "fake_sees_control": False, "of_pictures": lambda value: lambda x: value(x, slice(None))}
    return SimpleNamespace(schedule=schedule, real_score=lambda guidance: real, fake=fake,
                           space=SimpleNamespace(decode=lambda x: 2 * x - 1), **{**own, **more})


class LinearGaussianWorld:
    """x ~ N(mu, S) in R^d, c = A x + N(0, R) in R^k; R = 0 is allowed where no log p(c | x) is asked for."""

    def __init__(self, mu: Tensor, S: Tensor, A: Tensor, R: Tensor, schedule: NoiseSchedule):
        self.A, self.R, self.schedule = A, R, schedule
        self.data = Gaussian(mu, S, schedule)
        self.c_mean, self.c_cov = A @ mu, A @ S @ A.T + R

    @classmethod
    def example(cls, schedule: NoiseSchedule, d: int = 3, k: int = 2, noise: float = 0.3, seed: int = 0):
        """A generic world: correlated x of mean not zero, k < d noisy views of it."""
        random = torch.Generator().manual_seed(seed)
        root, A, mu = (torch.randn(*shape, generator=random).double() for shape in ((d, d), (k, d), (d,)))
        S, R = root @ root.T / d + 0.2 * torch.eye(d), noise**2 * torch.eye(k).double()
        return cls(0.5 * mu, S, A, R, schedule)

    # --- p(c | x), p(x | c), p(c | x_t) ---

    def log_prob(self, c: Tensor, x: Tensor) -> Tensor:
        """log p(c | x), [B] nats."""
        return _log_normal(c - x @ self.A.T, self.R)

    def x_given_c(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, d] and covariance [d, d] of p(x | c)."""
        gain = self.data.cov @ self.A.T @ torch.linalg.inv(self.c_cov)
        return self.data.mean + (c - self.c_mean) @ gain.T, self.data.cov - gain @ self.A @ self.data.cov

    def c_given(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, k] and covariance A Cov[x | x_t] A^T + R [B, k, k] of p(c | x_t)."""
        return self.data.posterior_mean(x_t, t) @ self.A.T, self._c_cov(t)

    def log_prob_t(self, c: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """log p(c | x_t), [B] nats."""
        mean, cov = self.c_given(x_t, t)
        return _log_normal(c - mean, cov)

    def condition_gradient(self, c: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """(A K)^T (A Cov[x | x_t] A^T + R)^-1 (c - A E[x | x_t]): gradient over x_t of log p(c | x_t)."""
        return self._pulled(self.data.posterior_gain(t), self._c_cov(t), c - self.c_given(x_t, t)[0])

    def plug_in_gradient(self, c: Tensor, x_t: Tensor, t: Tensor, gain: Tensor) -> Tensor:
        """(A gain)^T R^-1 (c - A f(x_t)): gradient of log p(c | f(x_t)) for f = data.through(gain, ...)."""
        return self._pulled(gain, self.R, c - self.data.through(gain, x_t, t) @ self.A.T)

    def _pulled(self, gain: Tensor, cov: Tensor, residual: Tensor) -> Tensor:
        inner = torch.linalg.solve(cov.expand(len(residual), -1, -1), residual.unsqueeze(2))
        return ((self.A @ gain).mT @ inner).squeeze(2)

    def _c_cov(self, t: Tensor) -> Tensor:
        return self.A @ self.data.posterior_cov(t) @ self.A.T + self.R

    def drawn(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """t, c, z, eps: every level of t with every point of the cubature, c from its own law."""
        k, d = self.A.shape
        c, z, eps = cubature(k + 2 * d).repeat(len(t), 1).split([k, d, d], 1)
        c = self.c_mean + c @ torch.linalg.cholesky(self.c_cov).T
        return t.repeat_interleave(2 * (k + 2 * d)), c, z, eps

    # --- students ---

    def ideal(self) -> Student:
        """The student that samples p(x | c): the minimiser of the joint KL at every t."""
        B = self.data.cov @ self.A.T @ torch.linalg.inv(self.c_cov)
        mean, cov = self.x_given_c(self.c_mean[None])
        return Student(B, _root(cov), mean[0] - B @ self.c_mean)

    def ignorant(self) -> Student:
        """The student that samples p(x) and does not look at c."""
        return Student(torch.zeros_like(self.A.T), _root(self.data.cov), self.data.mean)

    def marginal(self, student: Student) -> Gaussian:
        """The student's own x, detached: its `.score` is the exact fake score."""
        mean, cov = self._moments(student)
        return Gaussian(mean.detach(), cov.detach(), self.schedule)

    def seeing_fake(self, student: Student, c: Tensor) -> Callable[..., Estimate]:
        """Score of the student's x_t given c, [B, k]: the fake score of the exact joint KL."""
        def score(x_t: Tensor, t: Tensor, y: Prompts | None = None) -> Estimate:
            alpha, _ = levels(self.schedule, t)
            rest = Gaussian(torch.zeros_like(student.b), student.spread, self.schedule)
            blind = rest.score(x_t - alpha * (c @ student.B.T + student.b), t)
            return Estimate(x_t, blind.eps, blind.alpha, blind.sigma)
        return score

    def fidelity(self, student: Student, t: Tensor) -> Tensor:
        """KL( p_theta(x_t) || p(x_t) ) per t, [T] nats: all of Diff-Instruct."""
        mean, cov = self._moments(student)
        return _kl(mean, cov, self.data.mean, self.data.cov, *levels(self.schedule, t))

    def bound(self, student: Student, t: Tensor) -> Tensor:
        """Lemma 3.1 per t: E_theta[ -log p(c | x_t) p(x_t) + log p_theta(x_t) ], [T] nats; differentiable."""
        alpha, sigma = (v.unsqueeze(2) for v in levels(self.schedule, t))
        AK, Q = self.A @ self.data.posterior_gain(t), self._c_cov(t)
        offset = -alpha * AK @ (self._moments(student)[0] - self.data.mean).unsqueeze(1)
        of_c = torch.eye(len(Q[0])).double() - alpha * AK @ student.B
        residual = (of_c @ self.c_cov @ of_c.mT + alpha**2 * AK @ student.spread @ AK.mT
                    + sigma**2 * AK @ AK.mT + offset @ offset.mT)
        quadratic = torch.linalg.solve(Q, residual).diagonal(dim1=1, dim2=2).sum(1)
        cross_entropy = 0.5 * (quadratic + torch.logdet(2 * math.pi * Q))
        return cross_entropy + self.fidelity(student, t)

    def joint_kl(self, student: Student, t: Tensor) -> Tensor:
        """KL( p_theta(x_t, c) || p(x_t, c) ) per t, [T] nats: JDM Eq. 3; through covariances of (x_t, c)."""
        mean, cov = self._moments(student)
        shift = torch.cat([mean - self.data.mean, torch.zeros_like(self.c_mean)])
        ours = _blocks(cov, student.B @ self.c_cov, self.c_cov)
        theirs = _blocks(self.data.cov, self.data.cov @ self.A.T, self.c_cov)
        alpha, sigma = levels(self.schedule, t)
        d, k = len(mean), len(self.c_mean)
        scale = torch.cat([alpha.expand(-1, d), torch.ones(len(t), k).double()], 1)
        noise = torch.cat([sigma.expand(-1, d), torch.zeros(len(t), k).double()], 1)
        return _kl(shift, ours, torch.zeros_like(shift), theirs, scale, noise)

    def control_entropy(self, student: Student, t: Tensor) -> Tensor:
        """H_theta(c | x_t) per t, [T] nats: the gap of Lemma 3.1; can be below 0, c being continuous."""
        alpha, sigma = (v.unsqueeze(2) for v in levels(self.schedule, t))
        x_t_cov = alpha**2 * self._moments(student)[1] + sigma**2 * torch.eye(len(student.b)).double()
        cross = alpha * (student.B @ self.c_cov)
        left = self.c_cov - cross.mT @ torch.linalg.solve(x_t_cov, cross)
        return 0.5 * torch.logdet(2 * math.pi * math.e * left)

    def optimum(self, objective: Callable[[Student], Tensor], start: Student | None = None) -> Student:
        """Minimiser over (B, L, b) of a scalar `objective`, by BFGS: independent of jdm.terms."""
        shape = start or self.ignorant()

        def value_and_gradient(flat: np.ndarray):
            parameters = torch.from_numpy(flat).requires_grad_()
            value = objective(shape.like(parameters))
            return value.item(), torch.autograd.grad(value, parameters)[0].numpy()

        found = minimize(value_and_gradient, shape.flat(), jac=True, method="BFGS", options={"gtol": 1e-8})
        return shape.like(torch.from_numpy(found.x))

    def _moments(self, student: Student) -> tuple[Tensor, Tensor]:
        mean = student.B @ self.c_mean + student.b
        return mean, student.B @ self.c_cov @ student.B.T + student.spread


def levels(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma, [B, 1] float64."""
    return schedule.alpha(t).double().unsqueeze(1), schedule.sigma(t).double().unsqueeze(1)


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    return torch.einsum("bij,bj->bi", matrix, vector)


def _root(cov: Tensor) -> Tensor:
    """Symmetric square root; a zero eigenvalue is allowed."""
    s, U = torch.linalg.eigh(cov)
    return (U * s.clamp(min=0).sqrt()) @ U.T


def _blocks(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.cat([torch.cat([a, b], 1), torch.cat([b.T, c], 1)])


def _log_normal(residual: Tensor, cov: Tensor) -> Tensor:
    """log N(residual; 0, cov), [B]; cov is [k, k] or [B, k, k]."""
    cov = cov.expand(len(residual), -1, -1)
    quadratic = (residual * torch.linalg.solve(cov, residual.unsqueeze(2)).squeeze(2)).sum(1)
    return -0.5 * (quadratic + torch.logdet(2 * math.pi * cov))


def _kl(mean: Tensor, cov: Tensor, mean2: Tensor, cov2: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
    """KL of two Gaussians after u -> scale u + noise eps; scale and noise are [T, 1] or [T, d]."""

    def diffused(m: Tensor) -> Tensor:
        square = noise.expand(-1, len(m)).square()
        return scale.unsqueeze(2) * m * scale.unsqueeze(1) + torch.diag_embed(square)

    ours, theirs = diffused(cov), diffused(cov2)
    shift = (scale * (mean - mean2)).unsqueeze(2)
    quadratic = torch.linalg.solve(theirs, ours + shift @ shift.mT).diagonal(dim1=1, dim2=2).sum(1)
    return 0.5 * (quadratic - len(mean) + torch.logdet(theirs) - torch.logdet(ours))
