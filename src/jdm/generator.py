"""The few-step generator: denoise at one level, add fresh noise for the next, denoise again; one level is one step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from jdm.errors import UsageError, plural
from jdm.schedule import NoiseSchedule
from jdm.score import Estimate, Prediction, Prompts, Text

Renoise = Callable[[int], Tensor]  # k -> eps_k like z, the fresh noise before step k (k = 1, 2, ...)
# (the function that estimates x_t, x_t, t, y) -> the estimate to go on with: control at sampling
Steer = Callable[[Callable[[Tensor], Estimate], Tensor, Tensor, Prompts], Estimate]


class Generator:
    """A denoiser run at each of a list of noise levels, from z ~ N(0, I): x = x0(z) at the first, and for each further
    level k x_t = alpha_k x + sigma_k eps_k and x = x0(x_t).

    z has unit variance and is NOT scaled by sigma, so that a stock diffusers pipeline computes the same picture.

    Args:
        net: (x_t, timestep, text, control) -> output like x_t; `control` is None for a generator without control.
        levels: level indices of the schedule, strictly decreasing: (625,), or (999, 749, 499, 249).
    """

    def __init__(
        self,
        net: Callable[..., Tensor],
        schedule: NoiseSchedule,
        levels: Sequence[int],
        text: Callable[[Prompts], Text],
        prediction: Prediction = "epsilon",
    ):
        self.net, self.schedule, self.levels = net, schedule, checked_levels(levels, schedule.n)
        self.text = text
        self.prediction: Prediction = prediction

    def __call__(self, z: Tensor, y: Prompts, control: Tensor | None = None, renoise: Renoise | None = None,
                 steer: Steer | None = None) -> Tensor:
        """x [B, ...] like z of the last step, from noise z, prompts y and a control image [B, 3, H, W] in [0, 1].

        Raises:
            UsageError: there are several levels and no `renoise`.
        """
        text = self.text(y)
        at = None if steer is None else lambda estimate, x_t, t: steer(estimate, x_t, t, y)
        x = self._denoised(z, text, control, 0, at)
        for k in range(1, len(self.levels)):
            x = self._denoised(self._noised(x, k, renoise), text, control, k, at)
        return x

    def rollout(self, z: Tensor, y: Prompts, control: Tensor | None, last: int,
                renoise: Renoise | None = None) -> Tensor:
        """x of step `last` (0 is the first): backward simulation. The gradient goes through that step alone."""
        if not 0 <= last < len(self.levels):
            raise UsageError(f"a generator of {plural(len(self.levels), 'step')} has no step {last}; count from 0")
        text, x_t = self.text(y), z
        with torch.no_grad():
            for k in range(last):
                x_t = self._noised(self._denoised(x_t, text, control, k), k + 1, renoise)
        return self._denoised(x_t, text, control, last)

    def _denoised(self, x_t: Tensor, text: Text, control: Tensor | None, k: int,
                  steer: Callable[..., Estimate] | None = None) -> Tensor:
        t = self._t(k, x_t)

        def estimate(x_t: Tensor) -> Estimate:
            output = self.net(x_t, self.schedule.timestep(t), text, control)
            return Estimate.of(output, self.prediction, x_t, t, self.schedule)

        return (steer(estimate, x_t, t) if steer else estimate(x_t)).x0

    def _noised(self, x: Tensor, k: int, renoise: Renoise | None) -> Tensor:
        if renoise is None:
            raise UsageError(f"a generator of {plural(len(self.levels), 'step')} needs fresh noise between them; "
                             "pass renoise=")
        return self.schedule.noised(x, self._t(k, x), renoise(k))

    def _t(self, k: int, like: Tensor) -> Tensor:
        return self.schedule.t(self.levels[k]).to(like.device).expand(len(like))

    def parameters(self) -> list[nn.Parameter]:
        return list(self.net.parameters()) if isinstance(self.net, nn.Module) else []


def checked_levels(levels: Sequence[int], n: int) -> tuple[int, ...]:
    """The level indices as a tuple.

    Raises:
        UsageError: there are none, one is not in 0..n-1, or they do not strictly decrease.
    """
    found = tuple(levels)
    if not found or not all(0 <= level < n for level in found) or any(a <= b for a, b in pairwise(found)):
        raise UsageError(f"a generator's levels must be one or more indices in 0..{n - 1} that strictly decrease, got "
                         f"{', '.join(map(str, found)) or 'none'}")
    return found


def starting_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """z for picture number i of a seed: row i, the same whatever the batch size."""
    return fresh_noise(shape, seed, 0)


def blended_noise(shape: tuple[int, ...], seed: int, to_seed: int, blend: float) -> Tensor:
    """z on the way from one seed's noise to another's: cos(a) z(seed) + sin(a) z(to_seed), a = blend pi / 2.

    It stays N(0, I) all the way, as a straight line would not. At blend 0 it is z(seed), at 1 z(to_seed), to the bit.

    Raises:
        UsageError: blend is not in [0, 1].
    """
    if not 0 <= blend <= 1:
        raise UsageError(f"blend must be in [0, 1], got {blend:g}; 0 is the first seed, 1 the other")
    if blend in (0, 1):
        return starting_noise(shape, to_seed if blend else seed)
    angle = blend * math.pi / 2
    return math.cos(angle) * starting_noise(shape, seed) + math.sin(angle) * starting_noise(shape, to_seed)


def fresh_noise(shape: tuple[int, ...], seed: int, k: int) -> Tensor:
    """eps_k of step k for picture number i of a seed: row i, the same whatever the batch size; eps_0 is z."""
    rows = []
    for i in range(shape[0]):
        stream = torch.Generator().manual_seed(seed * 1_000_003 + i)
        rows.append([torch.randn(shape[1:], generator=stream) for _ in range(k + 1)][k])
    return torch.stack(rows)
