"""Writes docs/robustness.md: hostile and broken input by kind, how many were tried and hold; mistakes tests notice.

    python benchmarks/robustness.py [--out FILE.md] [--seeds 3] [TESTS ...]

Runs the tests that are marked `hostile`, and counts what each of them tried; nothing is typed by hand. Fuzzers draw
from more seeds than in the suite.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

import mistakes  # noqa: E402

from hostile import KINDS  # noqa: E402

INTRO = """# Hostile and broken input

Made by `{command}` at commit {commit}, in {minutes:.0f} minutes.
Each fuzzer drew from {seeds}, in the suite from one. Numbers are counted while the tests run.

An input holds if what comes of it is what its test asks for: nothing is run, written or lost that should not be; the
command ends by itself, with the exit code that fits and one line that names the thing, its bound and the remedy; or the
input does no harm and the result is right. A traceback, "failed unexpectedly" or another exit code does not hold.

| kind | inputs tried | hold | tested in |
|---|---|---|---|
"""
STOPPED = "The run was stopped before its end: tests that it had not reached are not counted.\n"
MISTAKES = """
## Mistakes that a test notices

Each was made in a copy of the source, one at a time, by `python benchmarks/mistakes.py`; its test fails there, and
passes without the mistake.

"""


@dataclass
class Row:
    """What was tried of a kind.

    Attributes:
        files: where it is tested.
        faults: tests with an input that does not hold.
    """

    tried: int = 0
    held: int = 0
    files: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)


class Counting:
    """A plugin of pytest that counts the inputs of each kind."""

    def __init__(self):
        self.rows = {kind: Row() for kind in KINDS}
        self._kinds: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self._kinds |= {item.nodeid: mark.args[0] for item in items if (mark := item.get_closest_marker("hostile"))}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid not in self._kinds or report.skipped or (report.when != "call" and report.passed):
            return
        row = self.rows[self._kinds[report.nodeid]]
        tried, held = dict(report.user_properties).get("inputs", (1, 1))
        row.tried += tried if report.when != "teardown" else 0
        row.held += (held if report.when != "teardown" else 0) - (report.failed and (held == tried))
        row.files.add(report.nodeid.partition("::")[0])
        row.faults += [report.nodeid] if report.failed else []


def page(rows: dict[str, Row], command: str, seeds: int, seconds: float) -> str:
    """The page, in Markdown."""
    drawn = f"{seeds} seed{'s' * (seeds > 1)}"
    text = INTRO.format(command=command, commit=_commit(), seeds=drawn, minutes=seconds / 60)
    for kind, row in rows.items():
        files = ", ".join(f"`{file.removeprefix('tests/')}`" for file in sorted(row.files))
        text += f"| {KINDS[kind]} | {row.tried:,} | {row.held:,} | {files} |\n"
    tried, held = (sum(getattr(row, of) for row in rows.values()) for of in ("tried", "held"))
    text += f"| all | {tried:,} | {held:,} | files of `tests` |\n"
    if faults := [name for row in rows.values() for name in row.faults]:
        text += "\nWhat does not hold:\n\n" + "".join(f"- `{name}`\n" for name in faults)
    return text + MISTAKES + mistakes.table()


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "src", "tests")
    return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", default=["tests"], help="files of tests (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "robustness.md", help="page to write")
    parser.add_argument("--seeds", type=int, default=3, help="seeds for each fuzzer (default: %(default)s)")
    asked = parser.parse_args()
    counting, start = Counting(), time.monotonic()
    code = pytest.main(["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", "-m",
                        "hostile and not slow and not gpu", "--fuzz-seeds", str(asked.seeds),
                        *(str(ROOT / name) for name in asked.tests)], plugins=[counting])
    command = " ".join(["python benchmarks/robustness.py", f"--seeds {asked.seeds}",
                        *(asked.tests if asked.tests != ["tests"] else [])])
    text = page(counting.rows, command, asked.seeds, time.monotonic() - start)
    if code == pytest.ExitCode.INTERRUPTED:
        text = text.replace("while the tests run.\n", f"while the tests run.\n{STOPPED}", 1)
    asked.out.write_text(text)
    print(asked.out)
    raise SystemExit(int(code))


if __name__ == "__main__":
    main()
