"""One call of `jdm reproduce`: fills the cells asked for, one after the other, and writes the page as it goes."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from jdm import __version__
from jdm.errors import RunError, TerminatedError, UsageError, plural
from jdm.files import write
from jdm.reproduce import setups
from jdm.reproduce.cells import (
    Cell,
    cells,
    columns,
    failed,
    fill,
    measuring_seconds,
    note_failure,
    one_line,
    passed_over,
    selected,
    stored,
)
from jdm.reproduce.figures import figure
from jdm.reproduce.findings import findings
from jdm.reproduce.form import YARDSTICK, Row, Table, specs
from jdm.reproduce.models import Given, Model, Watch, finished, to_train
from jdm.reproduce.page import aligned, markdown
from jdm.reproduce.plots import plots
from jdm.reproduce.results import KEYS, Line, Page, Result, Value, mean_over, save, values_of
from jdm.reproduce.setups import Setup
from jdm.reproduce.verdicts import answered, best_rows


def reproduce(table: Table, setup: Setup, seeds: int = 1, patterns: str | None = None, run: bool = True,
              folder: Path = Path("docs/results"), command: str = "", watch: Watch = lambda run: nullcontext(),
              say: Callable[[str], None] = print) -> tuple[Page, list[str]]:
    """Fill a table's cells and write FOLDER/<date>-<name>.md and .json, after each cell and at the end.

    Args:
        patterns: patterns of the cells to fill, as `--cells`; by default the table's default ones.
        run: False writes the page from what is there.
        command: the call without `--cells`, for the page.
        say: told what is being done, a line at a time.

    Returns:
        The page, and why each of the cells that failed now did.

    Raises:
        UsageError: nothing can start. RunError: the page cannot be written.
        TerminatedError: SIGTERM came while a model trained; no further cell is begun.
    """
    found = opened(table, setup, seeds)
    command = command or f"jdm reproduce {table.name}"
    chosen = selected(found, patterns) if run else []
    for line in passed_over(chosen, setup):
        say(line)
    broken: dict[str, str] = {}
    reasons = []
    for place, cell in enumerate(chosen, 1):
        say(f"[{place}/{len(chosen)}] {cell.name}, seed {cell.seed}: {cell.row.title}")
        if reason := _filled(cell, setup, broken, watch):
            say(f"    failed: {reason}")
            reasons.append(reason)
        publish(gathered(table, setup, found, seeds, command), folder)
    page = gathered(table, setup, found, seeds, command)
    if table.picture:
        page = replace(page, picture=f"{page.file}.png")
        shown = [cell for cell in found if cell.default or page.result(cell.row.key, cell.column).records]
        _draw(figure(shown, setup, page), folder / page.picture)
    if table.plots and (drawn := plots(table.plots, page)):
        page = replace(page, plots=f"{page.file}-plots.png")
        _draw(drawn, folder / page.plots)
    publish(page, folder)
    return page, reasons


def opened(table: Table, setup: Setup, seeds: int) -> list[Cell]:
    """Every cell of the table.

    Raises:
        UsageError: something is missing without which none can be filled.
    """
    setups.check(setup, guided=any(isinstance(spec, Given) and spec.guide for spec in specs(table)))
    return cells(table, setup, seeds)


def publish(page: Page, folder: Path) -> Path:
    """Write the page and its numbers; returns the page's file."""
    save(folder / f"{page.file}.json", page)
    return write(folder / f"{page.file}.md", markdown(page))


def gathered(table: Table, setup: Setup, found: Sequence[Cell], seeds: int, command: str) -> Page:
    """The table, partly filled or whole.

    Args:
        found: every cell of the table.
        command: command that fills it.
    """
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in found:
        groups.setdefault((cell.row.key, cell.column), []).append(cell)
    own = columns(table, setup)
    results = {key: _result(group, setup) for key, group in groups.items()}
    results = {(row, column): _compared(result, results.get((YARDSTICK, column), Result()))
               for (row, column), result in results.items()}
    rows = tuple(_line(row, {c: results[row.key, c] for c in own if (row.key, c) in results}) for row in table.rows)
    page = Page(table.name, table.title, str(date.today()), __version__, commit(), platform.python_version(),
                torch.__version__, platform.machine(), setup.name, setup.teacher, setup.source, setup.split, setup.n,
                seeds, _file(table, setup), own, setup.measures.get(table.name, table.measures), command, rows)
    return replace(page, headline=best_rows(page), answers=(*answered(page), *findings(page)))


def _file(table: Table, setup: Setup) -> str:
    """The page's name without suffix; a trial with other settings than the table's does not replace it."""
    steps = setup.steps if setup.steps != setup.budgets.get(table.name) else None
    trial = [setup.name if setup.name != "nano" else "", f"n{setup.n}" if setup.n != table.n else "",
             f"{steps}steps" if steps else "", "quick" if setup.quick else ""]
    return "-".join([str(date.today()), table.name, *filter(None, trial)])


def _result(group: list[Cell], setup: Setup) -> Result:
    """One row on one column, over seeds."""
    records, reasons = [], []
    for cell in group:
        if reason := failed(cell, setup):
            reasons.append(reason)
        elif record := stored(cell, setup):
            records.append(record)
    state = "measured" if records else "failed" if reasons else "not measured" if group[0].default else "left out"
    return Result(group[0].name, state, tuple(reasons), len(group), tuple(records), values_of(records))


def _compared(result: Result, base: Result) -> Result:
    """A result with its diversity also as a ratio to the multi-step ControlNet's on the same column."""
    own, other = (r.values.get("diversity") for r in (result, base))
    if not own or not other or other.mean <= 0:
        return result
    return replace(result, values={**result.values, "diversity_ratio": Value(own.mean / other.mean)})


def _line(row: Row, results: dict[str, Result]) -> Line:
    """A row of the page, with its averages where it has several columns."""
    average = {key: value for key in (*KEYS, "diversity_ratio") if (value := mean_over(list(results.values()), key))}
    return Line(row.key, row.title, results, row.part, row.beside, row.steps, row.published,
                average if average and len(results) > 1 else None)


def commit() -> str:
    """The commit of the source this package runs from, with -dirty where the package has changed since.

    Empty where it is installed without one. Pages and notes beside the package may have changed.
    """
    def git(*words: str) -> tuple[int, str]:
        done = subprocess.run(["git", "-C", str(Path(__file__).parents[1]), *words], capture_output=True, text=True,
                              timeout=10)
        return done.returncode, done.stdout.strip()

    try:
        (code, name), (_, changes) = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "--", ".")
    except (OSError, subprocess.SubprocessError):
        return ""
    return "" if code else f"{name}-dirty" if changes else name


def listed(table: Table, setup: Setup, seeds: int = 1, patterns: str | None = None) -> str:
    """Lists for `--dry-run` each cell, whether it is there, and what is left of it at about which cost."""
    rows: list[Sequence[str]] = [("cell", "seed", "state", "left to do", "about")]
    seen: set[str] = set()
    total, unknown = 0.0, False
    for cell in selected(opened(table, setup, seeds), patterns):
        reason = failed(cell, setup)
        try:
            if not reason and stored(cell, setup):
                rows.append((cell.name, str(cell.seed), "measured", "", ""))
                continue
            new = {k: v for k, v in to_train(cell.model, setup).items() if k not in seen}
        except UsageError:  # its folder holds something else
            rows.append((cell.name, str(cell.seed), f"fails: {reason}", "", ""))
            continue
        seen |= new.keys()
        seconds = measuring_seconds(cell, setup) + sum(s or 0.0 for *_, s in new.values())
        unknown |= any(s is None for *_, s in new.values())
        total += seconds
        left = [f"train {k}, {steps} x {run.batch}" for k, (run, steps, _) in new.items()]
        before = f"failed before ({reason}); " if reason else ""
        rows.append((cell.name, str(cell.seed), before + ("to train" if new else "to measure"),
                     "; ".join([*left, f"measure {plural(setup.n, 'picture')}"]), lasting(seconds)))
    tail = ", and trainings whose pace is not known" if unknown else ""
    return f"{aligned(rows)}\n\nIn all about {lasting(total)} on two CPU cores{tail}."


def lasting(seconds: float) -> str:
    """A duration to plan with."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _filled(cell: Cell, setup: Setup, broken: dict[str, str], watch: Watch) -> str:
    """Fill a cell; in one line, why it could not be. A model that failed once in a sitting is not tried again."""
    models = _models(cell.model)
    if reason := next((broken[model.name] for model in models if model.name in broken), ""):
        note_failure(cell, setup, RunError(reason))
        return reason
    try:
        fill(cell, setup, watch)
        return ""
    except TerminatedError:  # the sitting's end, not this cell's
        raise
    except Exception as error:  # one cell's failure is its own
        if os.environ.get("JDM_DEBUG", "0") not in ("", "0"):
            raise
        broken |= {model.name: one_line(error) for model in [m for m in models if not _made(m)][:1]}
        note_failure(cell, setup, error)
        return one_line(error)


def _models(model: Model) -> list[Model]:
    """The cells that this one needs, in the order in which they are made, then itself."""
    return [*(own for need in model.needs.values() for own in _models(need)), model]


def _made(model: Model) -> bool:
    try:
        return finished(model)
    except UsageError:  # its folder holds something else
        return False


def _draw(image: Any, file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
    except OSError as error:
        raise RunError(f"{file} could not be written ({error.strerror or error}); choose another --page") from None
