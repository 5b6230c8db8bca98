"""Ranges of numbers: declared in a field's type, checked when a run is made, shown in help.

A field says `lr: Positive`, or `Annotated[float, Range(0, 10)]` for a range of its own. Every number must be finite.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from functools import cache
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from jdm.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, without an end that is open."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        return math.isfinite(value) and above and (value < self.high if self.high_open else value <= self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return "finite" if self.low == -math.inf else f"{'>' if self.low_open else '>='} {self.low:.15g}"
        return f"{'(' if self.low_open else '['}{self.low:.15g}, {self.high:.15g}{')' if self.high_open else ']'}"


Positive = Annotated[float, Range(0, low_open=True)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 1, high_open=True)]
Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2**40, high_open=True)]  # of every random stream; Python's sums of it stay exact
Side = Annotated[int, Range(1, 16384)]  # of a picture, in pixels


def refuse_outside(settings: Any, prefix: str = "--") -> None:
    """UsageError where a number in a dataclass, or in one nested in it, is outside its field's range or not finite."""
    hints = hints_of(type(settings))
    for field in dataclasses.fields(settings):
        value, flag = getattr(settings, field.name), f"{prefix}{field.name.replace('_', '-')}"
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            refuse_outside(value, f"{flag}.")
            continue
        for number, kind, allowed in _numbers(value, hints.get(field.name, Any)):
            if kind is int and not isinstance(number, int):
                raise UsageError(f"{flag} must be a whole number, {allowed}, got {number}")
            if number not in allowed:
                raise UsageError(f"{flag} must be {_spelled(allowed)}, got {number}")


def ranges_of(hint: Any) -> list[Range]:
    """The ranges that a field's type declares, one for each kind of number in it."""
    found = [part for part in get_args(hint)[1:] if isinstance(part, Range)] if get_origin(hint) is Annotated else []
    return list(dict.fromkeys(found or [r for part in get_args(hint) for r in ranges_of(part)]))


@cache
def hints_of(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields, with their ranges; none where a name in them is not known here."""
    try:
        return get_type_hints(kind, include_extras=True)
    except NameError:  # a user's class may name what only a type checker imports
        return {}


def _numbers(value: Any, hint: Any) -> Iterator[tuple[Any, Any, Range]]:
    """(number, declared type, range) of every number in a field's value."""
    parts = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        fitting = [p for p in parts if (get_origin(p) is tuple) == isinstance(value, list | tuple)]
        hint = next((p for p in fitting if ranges_of(p)), Any)
        parts = get_args(hint)
    if isinstance(value, list | tuple):
        inner = parts if parts and parts[-1] is not Ellipsis else parts[:1] * len(value)
        for k, item in enumerate(value):
            yield from _numbers(item, inner[k] if k < len(inner) else Any)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        kind = parts[0] if get_origin(hint) is Annotated else hint
        yield value, kind, next(iter(ranges_of(hint)), Range())


def _spelled(allowed: Range) -> str:
    return f"in {allowed}" if str(allowed)[0] in "[(" else str(allowed)
