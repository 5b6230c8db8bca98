"""Consistency: how far a picture's measurement is from its control, with values to compare it to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jdm.controls.base import Control
from jdm.errors import UsageError


@dataclass(frozen=True)
class Consistency:
    """A consistency and the anchors to compare it to; all are in [0, 1], lower is better.

    Attributes:
        value: mean |h(x) - c|.
        chance: the same pictures against the controls of other pictures.
        blank: a picture of one shade. With sparse controls it beats chance, so a value near it is not a success.
        round_trip: the source picture encoded and decoded by the VAE: the best this model space allows.
    """

    value: float
    chance: float
    blank: float
    round_trip: float | None = None

    @classmethod
    def of(
        cls,
        control: Control,
        c: Tensor,
        measured: Tensor,
        size: int | tuple[int, int],
        round_trip: Tensor | None = None,
        seed: int = 0,
    ) -> Consistency:
        """Value and anchors of measurements [N, channels, h, w] of generated pictures of the given size.

        Args:
            round_trip: measurement of the source pictures encoded and decoded by the VAE, shaped like c.
        """
        trip = None if round_trip is None else float(consistency(c, round_trip).mean())
        return cls(
            float(consistency(c, measured).mean()),
            float(chance(c, measured, seed).mean()),
            float(blank(control, c, size).mean()),
            trip,
        )


def consistency(c: Tensor, measured: Tensor) -> Tensor:
    """Mean |h(x) - c| over channels and pixels: [N], for controls and measurements [N, ...] in [0, 1]."""
    if c.shape != measured.shape:
        raise UsageError(f"control {list(c.shape)} and measurement {list(measured.shape)} differ in shape")
    return (measured.float() - c.float()).abs().flatten(1).mean(1)


def chance(c: Tensor, measured: Tensor | None = None, seed: int = 0, prompts: Sequence[str] | None = None) -> Tensor:
    """Consistency with another sample's control: [N].

    The partner is the next sample on one cycle through all of them, in an order fixed by the seed: no sample is
    its own partner, and neighbours in the data (one class after another) are paired no more often than others.

    Args:
        measured: h of the pictures; by default c itself, as from a generator that obeys perfectly.
        prompts: if given, partners share a prompt, and a sample without a partner is left out: [M]. This is the
            score of a generator that reads y and ignores c; it is below chance, because a prompt tells much about
            the controls of its pictures.
    """
    if len(c) < 2:
        raise UsageError(f"chance needs at least 2 samples to shuffle, got {len(c)}")
    cycles: dict[str, list[int]] = {}
    for row in torch.randperm(len(c), generator=torch.Generator().manual_seed(seed)).tolist():
        cycles.setdefault(prompts[int(row)] if prompts else "", []).append(row)
    partner = {row: other for rows in cycles.values() if len(rows) > 1
               for row, other in zip(rows, rows[1:] + rows[:1], strict=True)}
    paired = sorted(partner)
    seen = c if measured is None else measured
    return consistency(c[[partner[row] for row in paired]], seen[paired])


def blank(control: Control, c: Tensor, size: int | tuple[int, int], level: float = 0.0) -> Tensor:
    """Consistency of a picture of one grey level (0 is black) with each c: [N]; `size` is a side or (height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    image = torch.full((1, 3, height, width), level, dtype=torch.float32, device=c.device)
    with torch.no_grad():
        measured = control.h(image)
    return consistency(c, measured.to(c.device).expand(len(c), -1, -1, -1))
