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
    """A consistency and the anchors to compare it to; lower is better. A mean |h(x) - c| is in [0, 1].

    Attributes:
        value: mean over pictures of the control's distance, |h(x) - c| unless it has one of its own.
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
        """Value and anchors of measurements of generated pictures of the given size.

        Args:
            c: what the control compares of its maps, [N, ...]: the maps themselves unless it says otherwise.
            measured: the same of the generated pictures' maps, shaped like c.
            round_trip: the same of the source pictures encoded and decoded by the VAE, shaped like c.
        """
        trip = None if round_trip is None else float(consistency(c, round_trip, control).mean())
        return cls(
            float(consistency(c, measured, control).mean()),
            float(chance(c, measured, seed, control=control).mean()),
            float(blank(control, c, size).mean()),
            trip,
        )


def consistency(c: Tensor, measured: Tensor, control: Control | None = None) -> Tensor:
    """The control's distance, [N], of what it compares of maps and of measurements, both [N, ...].

    By default it is mean |h(x) - c| over channels and pixels.
    """
    if c.shape != measured.shape:
        raise UsageError(f"control {list(c.shape)} and measurement {list(measured.shape)} differ in shape")
    return (control or Control()).distance(measured, c)


def chance(c: Tensor, measured: Tensor | None = None, seed: int = 0, prompts: Sequence[str] | None = None,
           control: Control | None = None) -> Tensor:
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
    return consistency(c[[partner[row] for row in paired]], seen[paired], control)


def blank(control: Control, c: Tensor, size: int | tuple[int, int], level: float = 0.0) -> Tensor:
    """Consistency of a picture of one grey level (0 is black) with each c: [N]; `size` is a side or (height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    image = torch.full((1, 3, height, width), level, dtype=torch.float32, device=c.device)
    with torch.no_grad():
        measured = control.compared(control.h(image)).to(c.device)
    return consistency(c, measured.expand(len(c), *measured.shape[1:]), control)
