"""A recipe's run with command-line flags applied to it; tyro turns the fields of the dataclasses into flags."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import docstring_parser
import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from jdm.cli.parser import NARROWEST, HelpShown, Parser, refuse_unknown
from jdm.errors import UsageError
from jdm.ranges import hints_of, ranges_of
from jdm.recipes import find
from jdm.run import Run


def configured(recipe: str, arguments: Sequence[str], own: Parser | None = None) -> Run:
    """The run of a recipe, with the fields that the flags name changed.

    Args:
        own: the parser of the command's own flags, which help shows first; None for those of `jdm train`.

    Raises:
        UsageError: an unknown recipe or flag, with the nearest; a value that does not fit.
    """
    return changed(run_of(recipe), arguments, f"{own.prog if own else 'jdm train'} {recipe}", own)


def run_of(recipe: str) -> Run:
    """The run of a recipe as it is.

    Raises:
        UsageError: there is no such recipe, or it fails.
    """
    try:
        run = find(recipe)()
    except UsageError:
        raise
    except Exception as error:  # a user's recipe may raise anything
        raise UsageError(f"{recipe} failed ({type(error).__name__}: {error})") from error
    if not isinstance(run, Run):
        raise UsageError(f"{recipe} must return a jdm.run.Run, got {type(run).__name__}")
    return run


def changed(run: Run, arguments: Sequence[str], prog: str, own: Parser | None = None) -> Run:
    """A run with the fields that the flags name changed.

    Args:
        prog: the command, for messages and help.
        own: the parser of the command's own flags, which help shows first.

    Raises:
        UsageError: an unknown flag, with the nearest; a value that does not fit.
    """
    known = [*flags_of(run), "--help"]
    arguments = [in_full(argument, known) for argument in arguments]
    refuse_unknown(arguments, known, prog)
    if own and not {"-h", "--help"}.isdisjoint(arguments):
        print(own.format_help())
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), _wide_enough():
            return tyro.cli(Run, default=run, args=arguments, prog=prog, config=(tyro.conf.AvoidSubcommands,),
                            registry=_registry())
    except SystemExit as end:
        if end.code in (0, None):
            raise HelpShown(0) from None
        raise UsageError(f"{_unboxed(complaint.getvalue())}; see: {prog} --help") from None


def _registry() -> ConstructorRegistry:
    """tyro's rules, and one that ends the help of a number with its range."""
    registry = ConstructorRegistry()

    @registry.struct_rule
    def settings(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not is_dataclass(info.type) or not isinstance(info.default, info.type):
            return None
        hints = hints_of(info.type)  # type: ignore[arg-type]
        if not hints:
            return None
        return StructConstructorSpec(info.type, tuple(  # type: ignore[arg-type]
            StructFieldSpec(field.name, hints[field.name], getattr(info.default, field.name),
                            functools.partial(_explained, info.type, field.name, hints[field.name]))
            for field in fields(info.type)))

    return registry


def _explained(kind: type, name: str, hint: Any) -> str:
    """A field's entry in the docstring of the nearest class that has one, and its range."""
    entries = (entry for owner in kind.__mro__
               for entry in docstring_parser.parse(owner.__dict__.get("__doc__") or "").params)
    text = next((entry.description or "" for entry in entries if entry.arg_name == name), "")
    allowed = " or ".join(map(str, ranges_of(hint)))
    return " ".join([*text.split(), *([f"Range: {allowed}."] if allowed else [])])


def flags_of(value: Any, prefix: str = "") -> list[str]:
    """Every flag of a dataclass instance, such as --steps; nested fields have dots, such as --data.size."""
    found: list[str] = []
    for field in fields(value):
        name, own = field.name.replace("_", "-"), getattr(value, field.name)
        if is_dataclass(own):
            found += flags_of(own, f"{prefix}{name}.")
        else:
            found += [f"--{prefix}{name}"] + ([f"--{prefix}no-{name}"] if isinstance(own, bool) else [])
    return found


def in_full(argument: str, known: Iterable[str]) -> str:
    """A flag in full: `--condition.weight 2` means `--method.condition.weight 2` if no other flag ends like that."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    flag = flag.replace("_", "-")
    ends = [k for k in known if f".{k.removeprefix('--')}".endswith(f".{flag.removeprefix('--')}")]
    return (ends[0] if flag not in known and len(ends) == 1 else flag) + equals + value


@contextlib.contextmanager
def _wide_enough() -> Iterator[None]:
    """Report a terminal of at least NARROWEST columns: tyro never finishes a page narrower than its borders."""
    if shutil.get_terminal_size().columns >= NARROWEST:
        yield
        return
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(NARROWEST)
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _unboxed(text: str) -> str:
    """The message of tyro's error box, on one line: the text between the title and the first rule."""
    lines = [line.strip(" │") for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]
    body = [line for line in lines if line][1:]
    if body and not body[0].strip("-"):  # the title is underlined where boxes cannot be drawn
        body = body[1:]
    message = itertools.takewhile(lambda line: line.strip("─-") and not line.startswith("╰"), body)
    return " ".join(message) or "the flags could not be read"
