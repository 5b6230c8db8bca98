"""Noise schedules: x_t = alpha_t x + sigma_t eps on N levels, with t = 0 exactly clean."""

from __future__ import annotations

import torch
from torch import Tensor

from jdm.errors import UsageError


def precise(value: Tensor) -> Tensor:
    """In float32, or in float64 where it is that already: what sums, differences and probabilities are taken in."""
    return value if value.dtype == torch.float64 else value.float()


class NoiseSchedule:
    """alpha_t and sigma_t: here a table of levels with alpha^2 + sigma^2 = 1, in `FlowSchedule` a straight line.

    t lives in [0, 1]: t = 0 is exactly clean (alpha = 1, sigma = 0) and t = (index + 1) / N is level `index` of the
    teacher's N levels. Values of t between levels are rounded to the nearest one.

    Args:
        alphas_cumprod: [N], alpha_t^2 of each level, strictly decreasing inside (0, 1). The last may be 0 (zero
            terminal SNR): that level is pure noise, where epsilon says nothing of x0.

    Attributes:
        n: number of levels N.
    """

    def __init__(self, alphas_cumprod: Tensor):
        acp = alphas_cumprod.detach().double().cpu()
        inside = acp.ndim == 1 and len(acp) > 0 and bool((acp[:-1] > 0).all() and (acp[-1] >= 0) and (acp < 1).all())
        if not inside or not bool((acp.diff() < 0).all()):
            raise UsageError("alphas_cumprod must be a vector that strictly decreases inside (0, 1), its last value at "
                             "least 0; sort the levels from clean to noisy and drop those that are equal")
        clean = torch.ones(1, dtype=torch.float64)
        self.n = len(acp)
        self.alphas_cumprod = acp
        self._alpha = torch.cat([clean, acp.sqrt()]).float()
        self._sigma = torch.cat([clean * 0, (1 - acp).sqrt()]).float()
        self._log_snr = torch.logit(torch.cat([clean, acp]))

    @classmethod
    def scaled_linear(cls, start: float = 0.00085, end: float = 0.012, n: int = 1000) -> NoiseSchedule:
        """The betas of Stable Diffusion 1.5: the square of a linear ramp of sqrt(beta)."""
        betas = torch.linspace(start**0.5, end**0.5, n, dtype=torch.float64) ** 2
        return NoiseSchedule(torch.cumprod(1 - betas, 0))

    def _row(self, t: Tensor) -> Tensor:
        return (_checked(t).double() * self.n).round().long()

    def alpha(self, t: Tensor, like: Tensor | None = None) -> Tensor:
        """alpha_t in float32, shaped to broadcast over `like` where it is given."""
        return _expand(self._alpha.to(t.device)[self._row(t)], like)

    def sigma(self, t: Tensor, like: Tensor | None = None) -> Tensor:
        """sigma_t in float32, shaped to broadcast over `like` where it is given."""
        return _expand(self._sigma.to(t.device)[self._row(t)], like)

    def timestep(self, t: Tensor) -> Tensor:
        """The number a network is conditioned on: the level's index in 0..N-1; t = 0 has none and maps to 0."""
        return (self._row(t) - 1).clamp(min=0)

    def t(self, index: Tensor | int) -> Tensor:
        """t of a level index: (index + 1) / N."""
        return (torch.as_tensor(index).double() + 1) / self.n

    def grid(self, uniform: Tensor, low: float, high: float) -> Tensor:
        """t of levels in [low, high] from uniform numbers in [0, 1); never t = 0."""
        first, last = max(1, round(low * self.n)), round(high * self.n)
        if not 1 <= first <= last <= self.n:
            raise UsageError(f"t range must be inside [0, 1] and not empty, got [{low}, {high}]")
        return (first + (uniform.double() * (last - first + 1)).floor()) / self.n

    def noised(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = alpha_t x + sigma_t eps."""
        return self.alpha(t, x) * x + self.sigma(t, x) * eps

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha_t^2 / sigma_t^2) [B] in float64, on the CPU; infinite where sigma or alpha is 0."""
        return self._log_snr[self._row(t).cpu()]

    def nearest(self, log_snr: Tensor) -> Tensor:
        """t [B] of the level whose log(alpha^2 / sigma^2) is nearest."""
        apart = (self._log_snr[None] - log_snr[:, None]).abs()
        return apart.nan_to_num(0.0).argmin(1).double() / self.n  # the difference of equal infinities is NaN

    @property
    def reach(self) -> tuple[float, float]:
        """The lowest and the highest log(alpha^2 / sigma^2) of its levels, each with half a level's step added."""
        levels = self._log_snr[1:]
        steps = (levels[:-1] - levels[1:]) / 2 if self.n > 1 else torch.zeros(1)
        return float(levels[-1] - steps[-1]), float(levels[0] + steps[0])


class FlowSchedule(NoiseSchedule):
    """The straight line of a flow: alpha = 1 - s and sigma = s, with s = shift t / (1 + (shift - 1) t).

    t is the time BEFORE the shift and continuous in [0, 1]; nothing is rounded. Levels are the N times that training
    draws from, t = (index + 1) / N. The network is conditioned on 1000 s.
    """

    def __init__(self, shift: float = 1.0, n: int = 1000):
        if not shift > 0 or n < 1:
            raise UsageError(f"a flow's shift must be above 0 and its levels at least 1, got {shift} and {n}")
        self.shift, self.n = shift, n

    def _s(self, t: Tensor) -> Tensor:
        t = _checked(t).double()
        return self.shift * t / (1 + (self.shift - 1) * t)

    def alpha(self, t: Tensor, like: Tensor | None = None) -> Tensor:
        return _expand((1 - self._s(t)).float(), like)

    def sigma(self, t: Tensor, like: Tensor | None = None) -> Tensor:
        return _expand(self._s(t).float(), like)

    def timestep(self, t: Tensor) -> Tensor:
        """The number a network is conditioned on: 1000 s in float32; 0 is clean."""
        return (1000 * self._s(t)).float()

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * torch.logit(self._s(t).cpu())

    def nearest(self, log_snr: Tensor) -> Tensor:
        """t [B] with exactly this log(alpha^2 / sigma^2)."""
        s = torch.sigmoid(-log_snr / 2)
        return s / (self.shift - (self.shift - 1) * s)

    @property
    def reach(self) -> tuple[float, float]:
        return -float("inf"), float("inf")


def matched(theirs: NoiseSchedule, ours: NoiseSchedule, t: Tensor) -> Tensor:
    """The t of `theirs` whose signal-to-noise ratio is that of `ours` at t [B]: to half a level of a table.

    Raises:
        UsageError: `theirs` has no level within half a level of it.
    """
    wanted, (low, high) = ours.log_snr(t), theirs.reach
    outside = wanted[~((wanted >= low) & ((wanted <= high) | wanted.isposinf()))]  # every schedule has t = 0
    if len(outside):
        own = ours.reach
        raise UsageError(f"a noise level of alpha / sigma = {_ratio(float(outside[0]))} lies outside the other "
                         f"schedule's {_ratio(low)}..{_ratio(high)}; this one's are {_ratio(own[0])}.."
                         f"{_ratio(own[1])}: narrow the range of t to what both have")
    return theirs.nearest(wanted).to(t.device)


def _ratio(log_snr: float) -> str:
    return f"{torch.tensor(log_snr / 2).exp():.4g}"


def _checked(t: Tensor) -> Tensor:
    if t.numel():
        low, high = float(t.min()), float(t.max())
        if not (low >= 0 and high <= 1):  # so that NaN is refused
            got = f"{low:.3f}" if low != low else f"{low:.3f}..{high:.3f}; did you pass timestep indices?"
            raise UsageError(f"t must be in [0, 1], got {got}")
    return t


def _expand(value: Tensor, like: Tensor | None) -> Tensor:
    if like is None:
        return value
    return value.to(like.device).reshape(-1, *[1] * (like.ndim - 1))
