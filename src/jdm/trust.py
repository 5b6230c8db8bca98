"""Decides which code may be imported: what a person typed or wrote, never what a file of data names."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from jdm.errors import UsageError

FLAG = "--trust-code"
_named: dict[str, str] = {}  # a source of code -> the data file that names it
_trusted: set[str] = set()
_data_trusted = False


def note_data(value: Any, file: str | os.PathLike[str]) -> None:
    """Note every FILE.py:NAME and module:NAME in the JSON of a data file; `refuse_data` then knows them."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict | list):
            waiting += one.values() if isinstance(one, dict) else one
        elif isinstance(one, str) and (source := one.rpartition(":")[0]):
            _named.setdefault(source, str(file))


def start(arguments: Iterable[str]) -> None:
    """Begin a command: code is trusted that its arguments name, and with FLAG whatever code data files name."""
    global _data_trusted
    arguments = list(arguments)
    _named.clear()
    _trusted.clear()
    _data_trusted = FLAG in arguments
    trust(arguments)


def trust(arguments: Iterable[str]) -> None:
    """Trust the code that these name: FILE.py, FILE.py:NAME, --flag=FILE.py:NAME, or several between commas.

    A word alone names a model or a folder, which may hold a Python package of that name.
    """
    for argument in arguments:
        for word in (part for half in (argument, argument.partition("=")[2]) for part in half.split(",")):
            _trusted.add(word if word.endswith(".py") else word.rpartition(":")[0])


def trust_source(source: str) -> None:
    """Trust FILE.py, or a module by its name, which a person asked for."""
    _trusted.add(source)


def refuse_data(source: str) -> None:
    """Raises UsageError if a data file names this code and no person has."""
    if source not in _named or source in _trusted:
        return
    from jdm.files import expanded  # here, so that help need not wait for it

    what = expanded(source).absolute() if source.endswith(".py") else f"the module {source}"
    if not _data_trusted:
        raise UsageError(f"{_named[source]} names code, {what}, which is not run because a file of data named it; read "
                         f"that code, then name it yourself (--control, --method.control, ...) or add {FLAG}")
    if os.environ.get("RANK", "0") == "0":
        print(f"jdm: running {what}, which {_named[source]} names", file=sys.stderr, flush=True)
