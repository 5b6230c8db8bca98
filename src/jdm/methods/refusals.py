"""Declarations that cannot be computed, found before anything is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from jdm.errors import UsageError
from jdm.generator import checked_levels
from jdm.levels import Levels
from jdm.loading import Loaded
from jdm.schedule import NoiseSchedule
from jdm.terms import Bounded, CFGAugmentation, Guided, OfTeachers, Term

if TYPE_CHECKING:
    from jdm.methods.engine import Distillation


def refuse_impossible(declared: Distillation, schedule: NoiseSchedule, steps_of_run: int) -> None:
    """UsageError where a distillation asks for what cannot be computed."""
    fake, terms = declared.fake, declared.terms
    steps = checked_levels(declared.student.levels, schedule.n)
    if fake and not 0 <= fake.warm_up < steps_of_run:
        raise UsageError(f"the fake score's warm-up must be at least 0 and shorter than the run's {steps_of_run} "
                         f"steps, got {fake.warm_up}; lower --fake.warm-up or raise --steps")
    if all(isinstance(term, Bounded) for term in terms.values()):
        raise UsageError("a method needs at least one term without a bound, such as fidelity: bounds are in units "
                         "of its length")
    for name, term in terms.items():
        if isinstance(term, OfTeachers):
            _refuse_shares(name, [share for _, share in term.also])
        if term.levels is not None:
            _refuse_levels(name, term.levels, steps, schedule)


def refuse_several(rewards: Sequence[str]) -> None:
    """UsageError where terms climb different rewards."""
    if len(rewards) > 1:
        raise UsageError(f"a run can climb one reward only, got {' and '.join(rewards)}; combine them in a function of "
                         "your own")


def _refuse_shares(name: str, shares: Sequence[float]) -> None:
    """Shares of further teachers that leave the first a negative one."""
    if not all(share > 0 for share in shares) or sum(shares) > 1:
        raise UsageError(f"the shares of further teachers must be above 0 and at most 1 together, got "
                         f"{', '.join(f'{share:g}' for share in shares)}; lower --{name}.also")


def _refuse_levels(name: str, levels: Levels, steps: Sequence[int], schedule: NoiseSchedule) -> None:
    """Levels without signal, and levels that all lie above the student's cleanest input."""
    if float(schedule.alpha(torch.tensor([levels.high], dtype=torch.float64))) == 0:
        raise UsageError(f"the levels of term {name} reach {levels.high:g}, where no signal is left; "
                         f"lower --{name}.levels.high")
    cleanest = 1.0 if len(steps) == 1 else float(schedule.t(min(steps)))
    if levels.low > levels.highest(cleanest):
        raise UsageError(f"the levels of term {name} begin at {levels.low:g}, above the student's "
                         f"cleanest input, {cleanest:g} (level {min(steps)}); lower --{name}.levels.low, or "
                         f"set --{name}.levels.within all")


def refuse_distilled(loaded: Loaded, terms: Mapping[str, Term]) -> None:
    """UsageError where a term asks for the guidance of a teacher that was distilled with it inside."""
    for name, term in terms.items():
        if isinstance(term, CFGAugmentation):
            role = f"guide {term.teacher}" if term.teacher else "teacher"
        elif isinstance(term, Guided) and term.guidance != 1:
            role = "teacher"
        else:
            continue
        if why := loaded.model(role).distilled:
            raise UsageError(f"term {name} asks {loaded.needs.models[role]} for guidance, which it no longer has: "
                             f"{why}, and its outputs with and without the prompt give no direction; take its "
                             f"base model as the teacher, or set --{name}.guidance 1 or --{name}.weight 0")
