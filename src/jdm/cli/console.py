"""Prints tables, and remarks on standard error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from jdm.cli.parser import NARROWEST

if TYPE_CHECKING:
    from jdm.models.text import TextEncoder


class _Console(Console):
    """A console at least NARROWEST columns wide, that leaves a closed pipe to the command line."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        if self.width < NARROWEST:
            self.width = NARROWEST

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def table(head: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Print a table on standard output."""
    drawn = Table(*head, title=title)
    for row in rows:
        drawn.add_row(*row)
    printed(drawn)


def printed(what: object) -> None:
    """Print a text or a table on standard output."""
    _Console().print(what, highlight=False)


def remark(text: str) -> None:
    """Print a line on standard error, which leaves standard output to the command's result."""
    _Console(stderr=True).print(text, highlight=False, markup=False)


def remark_cut(text: TextEncoder, prompts: Sequence[str]) -> None:
    """Says which prompts are too long for a text encoder, and what it does not read of the first of them."""
    if cut := text.overlong(prompts):
        prompt, lost = next(iter(cut.items()))
        which = "the prompt is" if len(prompts) == 1 else f"{len(cut)} of {len(prompts)} prompts are"
        longest = min(tokenizer.model_max_length for _, tokenizer in text.networks)
        remark(f"{which} too long for the text encoder, which reads {longest} tokens; of {prompt[:40]!r}... it does "
               f"not read {lost[:200]!r}")
