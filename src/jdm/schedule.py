"""Noise schedule: x_t = alpha_t x + sigma_t eps on a grid of N levels, with t = 0 exactly clean."""

from __future__ import annotations

import torch
from torch import Tensor

from jdm.errors import UsageError


def precise(value: Tensor) -> Tensor:
    """In float32, or in float64 where it is that already: what sums, differences and probabilities are taken in."""
    return value if value.dtype == torch.float64 else value.float()


class NoiseSchedule:
    """alpha_t and sigma_t of a variance-preserving diffusion (alpha^2 + sigma^2 = 1).

    t lives in [0, 1]: t = 0 is exactly clean (alpha = 1, sigma = 0) and t = (index + 1) / N is level
    `index` of the teacher's grid of N levels. Values between grid points are rounded to the nearest one.

    Args:
        alphas_cumprod: [N], alpha_t^2 of each level, strictly decreasing inside (0, 1).
    """

    def __init__(self, alphas_cumprod: Tensor):
        acp = alphas_cumprod.detach().double().cpu()
        if acp.ndim != 1 or len(acp) < 1 or not bool(((acp > 0) & (acp < 1)).all()):
            raise UsageError(
                "alphas_cumprod must be a vector inside (0, 1); a schedule that reaches zero signal "
                "(zero terminal SNR) has no x0 at its last level: drop that level"
            )
        clean = torch.ones(1, dtype=torch.float64)
        self.alphas_cumprod = acp
        self._alpha = torch.cat([clean, acp.sqrt()]).float()
        self._sigma = torch.cat([clean * 0, (1 - acp).sqrt()]).float()

    @classmethod
    def scaled_linear(cls, start: float = 0.00085, end: float = 0.012, n: int = 1000) -> NoiseSchedule:
        """The betas of Stable Diffusion 1.5: the square of a linear ramp of sqrt(beta)."""
        betas = torch.linspace(start**0.5, end**0.5, n, dtype=torch.float64) ** 2
        return cls(torch.cumprod(1 - betas, 0))

    @property
    def n(self) -> int:
        """Number of noise levels N."""
        return len(self.alphas_cumprod)

    def _row(self, t: Tensor) -> Tensor:
        if t.numel() and (float(t.max()) > 1 or float(t.min()) < 0):
            raise UsageError(
                f"t must be in [0, 1], got {float(t.min()):.3f}..{float(t.max()):.3f}; "
                "did you pass timestep indices?"
            )
        return (t.double() * self.n).round().long()

    def alpha(self, t: Tensor, like: Tensor | None = None) -> Tensor:
        """alpha_t in float32, shaped to broadcast over `like` where it is given."""
        return _expand(self._alpha.to(t.device)[self._row(t)], like)

    def sigma(self, t: Tensor, like: Tensor | None = None) -> Tensor:
        """sigma_t in float32, shaped to broadcast over `like` where it is given."""
        return _expand(self._sigma.to(t.device)[self._row(t)], like)

    def index(self, t: Tensor) -> Tensor:
        """Level index in 0..N-1 that a network is conditioned on; t = 0 has none and maps to 0."""
        return (self._row(t) - 1).clamp(min=0)

    def t(self, index: Tensor | int) -> Tensor:
        """t of a level index: (index + 1) / N."""
        return (torch.as_tensor(index).double() + 1) / self.n

    def grid(self, uniform: Tensor, low: float, high: float) -> Tensor:
        """Grid points in [low, high] from uniform numbers in [0, 1); never t = 0."""
        first, last = max(1, round(low * self.n)), round(high * self.n)
        if not 1 <= first <= last <= self.n:
            raise UsageError(f"t range must be inside [0, 1] and not empty, got [{low}, {high}]")
        return (first + (uniform.double() * (last - first + 1)).floor()) / self.n

    def noised(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = alpha_t x + sigma_t eps."""
        return self.alpha(t, x) * x + self.sigma(t, x) * eps


def _expand(value: Tensor, like: Tensor | None) -> Tensor:
    if like is None:
        return value
    return value.to(like.device).reshape(-1, *[1] * (like.ndim - 1))
