"""Help: every flag of every command and recipe has a sentence of its own, in a terminal of any width."""

import argparse
import dataclasses
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from typing import get_args, get_type_hints

import docstring_parser
import pytest

from jdm.cli.parser import main, parsers
from jdm.cli.run_flags import configured
from jdm.errors import UsageError
from jdm.recipes import all_recipes, entries


def unexplained(texts: Mapping[str, str]) -> list[str]:
    """The names whose text has fewer than three words, or is the text of another name too."""
    count = Counter(texts.values())
    return [f"{name}: {text!r}" for name, text in texts.items() if len(text.split()) < 3 or count[text] > 1]


def test_a_missing_or_shared_text_is_found():
    texts = {"steps": "Training steps, at least 1.", "seed": "", "n": "how many", "a": "Same as b.", "b": "Same as b."}
    assert [line.split(":")[0] for line in unexplained(texts)] == ["seed", "n", "a", "b"]


# Commands


def argument_texts(parser: argparse.ArgumentParser) -> dict[str, str]:
    """What argparse prints about each argument, and about each command."""
    found = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {choice.dest: choice.help or "" for choice in action._choices_actions}
        else:
            found["/".join(action.option_strings) or action.dest] = action.help or ""
    return found


@pytest.mark.parametrize("command", ["jdm", *parsers()[1]])
def test_every_flag_of_a_command_is_explained(command):
    parser, commands = parsers()
    assert unexplained(argument_texts(commands.get(command, parser))) == []


# Recipes


def field_texts(kind: type) -> dict[str, str]:
    """What tyro prints about each field: its entry in the docstring of the nearest class that has one."""
    found = dict.fromkeys((field.name for field in dataclasses.fields(kind)), "")
    for owner in reversed(kind.__mro__):
        entries_of = docstring_parser.parse(owner.__dict__.get("__doc__") or "").params
        found |= {each.arg_name: each.description or "" for each in entries_of if each.arg_name in found}
    return found


def kinds(run: object) -> set[type]:
    """The class of a run and of every dataclass in its fields, at any depth."""
    nested = [getattr(run, field.name) for field in dataclasses.fields(run)]
    return {type(run)}.union(*(kinds(value) for value in nested if dataclasses.is_dataclass(value)))


@pytest.mark.parametrize("recipe", entries())
def test_every_flag_of_a_recipe_is_explained(recipe):
    found = sorted(kinds(all_recipes()[recipe]()), key=lambda kind: kind.__name__)
    assert [f"{kind.__name__}.{line}" for kind in found for line in unexplained(field_texts(kind))] == []


def test_the_page_of_a_recipe_shows_these_texts(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        configured("nano-canny", ["--help"])
    page = " ".join(capsys.readouterr().out.split())
    for kind in kinds(all_recipes()["nano-canny"]()):
        for name, text in field_texts(kind).items():
            if text and not optional_group(kind, name):
                assert " ".join(text.split()[:4]) in page


@pytest.mark.parametrize(("command", "own"), [("prepare", "--out FOLDER"), ("estimate", "--gpu GPU")])
def test_recipe_help_shows_both_kinds_of_flags(command, own, capsys):
    with pytest.raises(SystemExit):
        main([command, "nano-canny", "--help"])
    page = capsys.readouterr().out
    assert page.index(own) < page.index("--method.control")
    assert f"usage: jdm {command} nano-canny" in page


def optional_group(kind: type, name: str) -> bool:
    """Whether a field holds a dataclass or None: its page shows the dataclass's own text."""
    return any(dataclasses.is_dataclass(one) for one in get_args(get_type_hints(kind)[name]))


# Narrow terminals


@pytest.mark.hostile("terminal")
def test_help_ends_in_one_column():
    # Without the minimum width it takes all memory, so it runs in a process that may have 16 GiB.
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34)); "
            "from jdm.cli import main; sys.exit(main(['train', 'nano-canny', '--help']))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "COLUMNS": "1"})
    assert done.returncode == 0
    assert "Training steps, at least 1;" in done.stdout  # a line of 28 columns in a box


@pytest.mark.parametrize("command", parsers()[1])
@pytest.mark.hostile("terminal")
def test_command_help_is_readable_in_one_column(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1")
    page = parsers()[1][command].format_help()
    assert "show this help" in page


@pytest.mark.hostile("terminal")
def test_a_bad_value_is_named_in_one_column(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1")
    with pytest.raises(UsageError, match="--steps"):
        configured("nano-canny", ["--steps", "many"])
    assert os.environ["COLUMNS"] == "1"


# Speed


def test_help_imports_nothing_heavy():
    heavy = {"dataclasses", "difflib", "inspect", "msgspec", "pathlib", "socket", "torch", "traceback", "tyro"}
    code = f"import sys; from jdm.cli import parser; parser.parsers(); print(*{heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.stdout.split() == [], done.stderr
