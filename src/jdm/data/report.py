"""What was found in a source of pictures, what each rule left out, and what was read in a way that should be said."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from jdm.data.texts import few, printable
from jdm.errors import UsageError

KEPT = 100  # names of each rule that are kept; all are counted


@dataclass
class LeftOut:
    """What one rule left out.

    Attributes:
        count: number of all.
        names: the first of them.
        remedy: how to have them read, or "".
    """

    count: int = 0
    names: list[str] = field(default_factory=list)
    remedy: str = ""


@dataclass
class Refused:
    """What of one kind training refuses.

    Attributes:
        count: of all.
        messages: the first of them, each with its remedy.
    """

    count: int = 0
    messages: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What was found and what was not taken, of one split of a source.

    Attributes:
        source: name of the source.
        splits: number of pictures of each split, as far as it is known.
        left_out: rule, in words -> what it left out.
        notes: sentences on how the source was read.
        refused: kind, in words -> what training refuses; it is set aside, so that all of it is found at once.
    """

    source: str
    splits: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, LeftOut] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    refused: dict[str, Refused] = field(default_factory=dict)

    def leave_out(self, name: str, rule: str, remedy: str = "", count: int = 1) -> None:
        """Counts one thing, or several of one name, that a rule leaves out."""
        entry = self.left_out.setdefault(rule, LeftOut(remedy=remedy))
        entry.count += count
        if len(entry.names) < KEPT:
            entry.names.append(printable(name))

    def note(self, text: str) -> None:
        """Adds a sentence, once."""
        if text not in self.notes:
            self.notes.append(text)

    def refuse(self, kind: str, message: str, count: int = 1) -> None:
        """Sets aside what training refuses; `settle` raises it."""
        entry = self.refused.setdefault(kind, Refused())
        entry.count += count
        if len(entry.messages) < KEPT:
            entry.messages.append(message)

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
        first = next(iter(self.refused.values()))
        more = sum(len(kind.messages) for kind in self.refused.values()) - 1
        also = f" (and {more:,} more: jdm doctor {shlex.quote(self.source)} lists them)" if more else ""
        raise UsageError(first.messages[0] + also)

    def lines(self) -> list[str]:
        """All of it for a terminal, a line for each rule and each note."""
        found = [f"{each.count:,} left out, {rule}: {few(each.names)}" + (f" ({each.remedy})" if each.remedy else "")
                 for rule, each in self.left_out.items()]
        return [*found, *self.notes]

    def summary(self) -> dict[str, Any]:
        """All of it as JSON, with the first names of each rule."""
        return {"splits": self.splits, "notes": self.notes,
                "left out": {rule: {"count": e.count, "first": e.names[:5]} for rule, e in self.left_out.items()}}
