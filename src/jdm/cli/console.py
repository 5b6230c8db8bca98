"""Prints tables, and remarks on standard error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table


def table(head: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Print a table on standard output."""
    drawn = Table(*head, title=title)
    for row in rows:
        drawn.add_row(*row)
    Console().print(drawn)


def remark(text: str) -> None:
    """Print a line on standard error, which leaves standard output to the command's result."""
    Console(stderr=True).print(text, highlight=False, markup=False)
