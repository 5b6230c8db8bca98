"""Ranges: every number of every recipe has one, is refused outside it, and shows it in help."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from hostile import hold
from jdm.cli.run_flags import _explained, configured
from jdm.errors import UsageError
from jdm.ranges import Range, hints_of, ranges_of
from jdm.recipes import all_recipes, entries
from jdm.run import Optimiser, Run

RUNS = {name: all_recipes()[name]() for name in entries()}


def numbers(settings: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[type, tuple[str, ...], Any, Any]]:
    """(dataclass, path, value, type) of every field that holds a number, or numbers."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from numbers(value, (*path, field.name))
        elif any(isinstance(v, int | float) and not isinstance(v, bool)
                 for v in (value if isinstance(value, tuple) else (value,))):
            yield type(settings), (*path, field.name), value, hints_of(type(settings))[field.name]


def put(settings: Any, path: tuple[str, ...], value: Any) -> Any:
    first, *rest = path
    inner = put(getattr(settings, first), tuple(rest), value) if rest else value
    return dataclasses.replace(settings, **{first: inner})


def fields() -> Iterator[tuple[str, tuple[str, ...], Any, Any]]:
    """(recipe, path, value, type) of each number that a recipe has, once for recipes that share its dataclass."""
    seen = set()
    for recipe, run in RUNS.items():
        for owner, path, value, hint in numbers(run):
            if (owner, path[-1]) not in seen:
                seen.add((owner, path[-1]))
                yield recipe, path, value, hint


def outcomes() -> Iterator[tuple[str, str]]:
    """Each number outside its range, and what is wrong with how that ended."""
    for recipe, path, value, hint in fields():
        ranges = ranges_of(hint)
        assert len(ranges) == 1, path
        low, high = ranges[0].low, ranges[0].high
        for wrong in (float("nan"), float("inf"), -float("inf"), low - 1, low if ranges[0].low_open else low - 0.5,
                      high if ranges[0].high_open else high + 1):
            fault = ""
            try:
                put(RUNS[recipe], path, tuple(wrong for _ in value) if isinstance(value, tuple) else wrong)
                fault = "it is taken"
            except UsageError:
                pass
            yield f"{recipe} {path} = {wrong}", fault


@pytest.mark.hostile("flags")
def test_every_number_of_every_recipe_is_bounded(record_property):
    hold(outcomes(), record_property)


def test_the_message_names_flag_range_and_value():
    with pytest.raises(UsageError, match=r"^--method.student.optimiser.lr must be > 0, got -1"):
        put(RUNS["nano-canny"], ("method", "student", "optimiser"), Optimiser(lr=-1))
    with pytest.raises(UsageError, match=r"^--save-every must be >= 1, got 0$"):
        configured("nano-canny", ["--save-every", "0"])
    with pytest.raises(UsageError, match=r"^--data.size must be in \[1, 16384\], got -32$"):
        configured("nano-canny", ["--data.size=-32"])


def test_a_whole_number_is_no_fraction():
    with pytest.raises(UsageError, match="--steps must be a whole number"):
        dataclasses.replace(RUNS["nano-canny"], steps=1.5)


def test_help_ends_with_the_range():
    assert _explained(Optimiser, "lr", hints_of(Optimiser)["lr"]).endswith("Range: > 0.")
    assert _explained(Run, "ema", hints_of(Run)["ema"]).endswith("Range: [0, 1).")
    assert [str(r) for r in (Range(0), Range(0, 1), Range())] == [">= 0", "[0, 1]", "finite"]
