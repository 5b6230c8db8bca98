"""Reports what was found in a source of pictures, what each rule left out, and how the rest was read."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from jdm.data.texts import few, printable
from jdm.errors import UsageError

KEPT = 100  # names or messages of each kind that are kept; all are counted


@dataclass
class Counted:
    """Things that one rule left out, or that training refuses for one reason.

    Attributes:
        count: number of all.
        first: names of the first things left out, or the first messages of refusals.
        remedy: how to have things read that were left out, or "".
    """

    count: int = 0
    first: list[str] = field(default_factory=list)
    remedy: str = ""

    def add(self, said: str, count: int) -> None:
        self.count += count
        if len(self.first) < KEPT:
            self.first.append(said)


@dataclass
class Report:
    """A report on one split of a source: what was found, left out and refused.

    Attributes:
        source: name of the source.
        splits: number of pictures of each split, as far as it is known.
        left_out: rule, in words -> what it left out.
        notes: sentences on how the source was read.
        refused: kind, in words -> what training refuses; it is set aside, so that all of it is found at once.
    """

    source: str
    splits: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, Counted] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    refused: dict[str, Counted] = field(default_factory=dict)

    def leave_out(self, name: str, rule: str, remedy: str = "", count: int = 1) -> None:
        """Counts one thing, or several of one name, that a rule leaves out."""
        self.left_out.setdefault(rule, Counted(remedy=remedy)).add(printable(name), count)

    def note(self, text: str) -> None:
        """Adds a sentence, once."""
        if text not in self.notes:
            self.notes.append(text)

    def refuse(self, kind: str, message: str, count: int = 1) -> None:
        """Sets aside what training refuses; `settle` raises it."""
        self.refused.setdefault(kind, Counted()).add(message, count)

    @contextmanager
    def setting_aside(self, kind: str) -> Iterator[None]:
        """Returns a context manager; a UsageError inside it is refused as that kind, and the block ends there."""
        try:
            yield
        except UsageError as error:
            self.refuse(kind, str(error))

    def settle(self) -> None:
        """Raises what was refused, if anything was.

        Raises:
            UsageError: the first message, and how many more there are.
        """
        if not self.refused:
            return
        message, *others = [message for kind in self.refused.values() for message in kind.first]
        also = f" (and {len(others):,} more: jdm doctor {shlex.quote(self.source)} lists them)" if others else ""
        raise UsageError(message + also)

    def lines(self) -> list[str]:
        """The report for a terminal, a line for each rule and each note."""
        found = [f"{each.count:,} left out, {rule}: {few(each.first)}" + (f" ({each.remedy})" if each.remedy else "")
                 for rule, each in self.left_out.items()]
        return [*found, *self.notes]

    def summary(self) -> dict[str, Any]:
        """The report as JSON, with the first names of each rule."""
        return {"splits": self.splits, "notes": self.notes,
                "left out": {rule: {"count": e.count, "first": e.first[:5]} for rule, e in self.left_out.items()}}
