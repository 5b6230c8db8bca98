"""Warnings in words where a run's numbers drift in a way that is known to end badly, with the likely cause.

The numbers are in metrics.jsonl at every logged step. Each is compared, as the median of a few logged values, with what
it was early in the run; a resumed run is compared with its own beginning.

Collapse is seen in the spread over a batch, whose samples differ in prompt and control too: a student that keeps those
apart and ignores z passes. Diversity over z at fixed prompt and control is measured by `jdm evaluate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

from jdm.training.record import measurements

WINDOW = 5  # logged values whose median counts
LAG, GROWTH, COLLAPSE, SATURATED, WEAK_DM = 2.0, 1.5, 0.5, 0.05, 0.5


class Monitors:
    """The numbers of a run that are watched.

    Args:
        path: metrics.jsonl, whose rows before this start are read.

    Attributes:
        said: every warning so far.
    """

    def __init__(self, path: Path | None = None):
        self._values: dict[str, list[float]] = {}
        self._lowest: dict[str, float] = {}
        self._told: set[str] = set()
        self.said: list[str] = []
        for row in measurements(path) if path else ():
            self.note(row, int(row["step"]))

    def note(self, logs: Mapping[str, Any], step: int | None = None) -> list[str]:
        """Takes the numbers of a logged step; returns the warnings that are new, which begin with the step if given."""
        for key in KEYS:
            if key in logs:
                values = self._values.setdefault(key, [])
                values.append(float(logs[key]))
                if len(values) >= WINDOW:
                    self._lowest[key] = min(self._lowest.get(key, inf), median(values[-WINDOW:]))
        found = [(name, text) for name, check in CHECKS.items() if (text := check(self))]
        place = "" if step is None else f"step {step:.0f}: "
        new = [place + text for name, text in found if name not in self._told]
        self._told |= {name for name, _ in found}
        self.said += new
        return new

    def now(self, key: str) -> float | None:
        """The median of the last values; None before there are two windows of them."""
        values = self._values.get(key, [])
        return median(values[-WINDOW:]) if len(values) >= 2 * WINDOW else None

    def early(self, key: str) -> float:
        """The median of the first values."""
        return median(self._values[key][:WINDOW])

    def lowest(self, key: str) -> float:
        """The lowest median of any window of values: the floor that was reached."""
        return self._lowest[key]


def _lagging(m: Monitors) -> str:
    now = m.now("fake/loss")
    if now is None or now <= LAG * m.lowest("fake/loss"):
        return ""
    times = now / m.lowest("fake/loss")
    return (f"the fake score's loss is {times:.1f} times the lowest it reached: it no longer follows the student; "
            "raise --method.fake.updates or its rate, or lower the student's")


def _overbaked(m: Monitors) -> str:
    std, saturation, ratio = m.now("std_x"), m.now("saturation"), m.now("dm_over_ca")
    if std is None or saturation is None:
        return ""
    grown = std > GROWTH * m.early("std_x")
    if not grown and saturation <= max(SATURATED, 2 * m.early("saturation")):
        return ""
    what = f"std(x) is {std:.3g}, early in the run {m.early('std_x'):.3g}, and {saturation:.0%} of x is beyond 4"
    if ratio is not None and ratio < WEAK_DM:
        what += f", with |DM| / |CA| at {ratio:.2g}"
    return (f"{what}: guidance over-bakes; lower the weight of CFG augmentation or the guidance, or give distribution "
            "matching or a regulariser more weight")


def _collapsed(m: Monitors) -> str:
    now = m.now("spread_x")
    if now is None or now >= COLLAPSE * m.early("spread_x"):
        return ""
    return (f"the samples of a batch, of all its prompts, differ by {now:.3g}, early in the run by "
            f"{m.early('spread_x'):.3g}: the student collapses and ignores z; lower its rate or the weight of terms "
            "that have one answer, or add an anchor")


KEYS = ("fake/loss", "std_x", "saturation", "dm_over_ca", "spread_x")
CHECKS = {"lag": _lagging, "growth": _overbaked, "collapse": _collapsed}  # each says what is wrong, or ""
