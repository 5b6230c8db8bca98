"""The tree is what docs/architecture.md says: rooms that import downward alone, nouns that import torch alone."""

import ast
import re
import subprocess
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

import conftest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "jdm"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
ROWS = re.findall(r"^\| ([a-z_ ]+) \| .* \|$", PAGE, re.M)
ROOMS = [row.split() for row in ROWS if row not in ("room", "package")][:15]
RANK = {name: place for place, row in enumerate(ROOMS) for name in row}
NOUNS = ("schedule", "score", "space", "levels", "run", "generator", "posterior", "terms", "regularisers")
FILES = [file for file in sorted(SOURCE.rglob("*.py")) if file.name not in ("__init__.py", "__main__.py")]


def room_of(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[tuple[str, str]]:
    """(top-level package, room of this package or "") of every import, those inside functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else \
            [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            parts = name.split(".")
            if name == "jdm" and isinstance(node, ast.ImportFrom):
                yield from (("jdm", alias.name) for alias in node.names)
            else:
                yield parts[0], parts[1] if parts[0] == "jdm" and len(parts) > 1 else ""


def test_every_file_is_in_a_room():
    assert len(ROOMS) == 15
    assert {room_of(file) for file in FILES} == set(RANK)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_rooms_import_downward_alone(file):
    upward = sorted({room for _, room in imports(file) if RANK.get(room, 0) > RANK[room_of(file)]})
    assert not upward


@pytest.mark.parametrize("noun", NOUNS)
def test_nouns_import_torch_alone(noun):
    own = {"jdm", "torch", "__future__", "abc", "collections", "contextlib", "dataclasses", "functools", "itertools",
           "math", "pathlib", "typing"}
    assert {package for package, _ in imports(SOURCE / f"{noun}.py")} <= own


def test_only_these_rooms_import_diffusers():
    found = {room_of(file) for file in FILES if any(package == "diffusers" for package, _ in imports(file))}
    assert found == {"models", "library", "cost", "prepare", "training", "cli"}
    peft = {file.name for file in FILES if any(package == "peft" for package, _ in imports(file))}
    assert peft == {"adapters.py"}


def test_no_file_is_longer_than_400_lines():
    others = (file for room in ("tests", "examples", "benchmarks") for file in (ROOT / room).rglob("*.py"))
    assert {file.name for file in [*FILES, *others] if len(file.read_text().splitlines()) > 400} == set()


def test_the_chain_of_a_step_is_five_files():
    command, lines = re.search(r"`(wc -l src/jdm/[^`]+)`[^0-9]*([\d,]+) lines", PAGE).groups()
    counted = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert len(counted.splitlines()) == 6  # five files and the total
    assert int(counted.split()[-2]) <= int(lines.replace(",", ""))


def test_every_test_left_to_the_slow_ones_exists():
    for pattern in conftest.SLOW:
        file, _, name = pattern.partition("::")
        tests = re.findall(r"^def (test_\w+)", (ROOT / "tests" / file).read_text(), re.M)
        assert any(fnmatch(test, re.split(r"[?*]", name)[0] + "*") for test in tests), pattern


def test_no_test_name_exceeds_eight_words():
    names = {node.name for file in (ROOT / "tests").rglob("test_*.py") for node in ast.walk(ast.parse(file.read_text()))
             if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
    assert {name for name in names if len(name.split("_")) > 9} == set()  # "test" is the ninth
