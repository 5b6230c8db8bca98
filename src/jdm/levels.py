"""The noise levels of a term, and the bound on its size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jdm.errors import UsageError
from jdm.ranges import NotNegative, Share


@dataclass(frozen=True)
class Levels:
    """t uniform on the teacher's grid points in [low, high], with noise from one named random stream.

    Two terms share one x_t exactly when their levels are equal, stream included.

    Attributes:
        low: smallest noise level, in [0, 1]; 0 is clean and is itself never drawn.
        high: largest noise level, in [0, 1]; 1 is the teacher's last level.
        stream: name of the random numbers; a term with another stream draws a level and noise of its own.
        within: all uses the whole range; input uses only levels no noisier than the input of the drawn step. The first
            step's input is pure noise and sets no limit. For a flow, t before the shift is compared.
    """

    low: Share = 0.02
    high: Share = 0.98
    stream: str = "generator"
    within: Literal["all", "input"] = "all"

    def __post_init__(self):
        refuse_empty(self.low, self.high)

    def highest(self, content: float) -> float:
        """The largest t that is drawn, given the noise level `content` of the drawn step's input; 1 is pure noise."""
        return min(self.high, content) if self.within == "input" else self.high


def refuse_empty(low: float, high: float) -> None:
    """UsageError where no noise level lies in [low, high]."""
    if not 0 <= low <= high <= 1 or high == 0:
        raise UsageError(f"noise levels must satisfy 0 <= low <= high <= 1 with high above 0, got low {low} and high "
                         f"{high}")


def _pair(dm: Literal["all", "input"], ca: Literal["all", "input"]) -> tuple[Levels, Levels]:
    return Levels(within=dm), Levels(stream="augmentation", within=ca)


# Decoupled DMD's four re-noising schedules: levels of (distribution matching, CFG augmentation).
RENOISING = {"coupled-shared": (Levels(), Levels()), "decoupled-full": _pair("all", "all"),
             "decoupled-constrained": _pair("input", "input"), "decoupled-hybrid": _pair("all", "input")}


@dataclass(frozen=True)
class Bound:
    """The largest norm of a term, in units of the batch's mean norm of the sum of the terms without a bound.

    Paper: none is printed; here: a bound, because likelihoods and scores differ by orders of magnitude.

    Attributes:
        early: bound in the first half of the run; 0 for none.
        late: bound in the second half, when rates have fallen and the fake score keeps up; 0 for none.
    """

    early: NotNegative = 1.0
    late: NotNegative = 1.0

    def at(self, progress: float) -> float:
        """The bound where `progress`, in [0, 1), is the share of the run that is done."""
        return self.early if progress < 0.5 else self.late
