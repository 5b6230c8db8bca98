"""One call of `jdm reproduce`: fills the cells asked for, one after the other, and writes the page as it goes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from jdm.errors import RunError, TerminatedError, UsageError
from jdm.files import write
from jdm.reproduce import scales
from jdm.reproduce.cells import (
    Cell,
    cells,
    failed,
    fill,
    measuring_seconds,
    note_failure,
    one_line,
    selected,
    stored,
)
from jdm.reproduce.figures import figure
from jdm.reproduce.models import Model, Setting, Watch, finished, to_train
from jdm.reproduce.page import aligned, markdown
from jdm.reproduce.results import gathered
from jdm.reproduce.tables import Table, recipes


def reproduce(table: Table, setting: Setting, seeds: int = 1, patterns: str | None = None, run: bool = True,
              page: Path = Path("docs/results"), command: str = "", watch: Watch = lambda run: nullcontext(),
              say: Callable[[str], None] = print) -> tuple[dict[str, Any], list[str]]:
    """Fill a table's cells and write PAGE/<date>-<name>.md and .json, after each cell and at the end.

    Args:
        patterns: of the cells to fill, as `--cells`; the default ones where not given.
        run: False writes the page from what is there.
        command: the call without `--cells`, for the page.
        say: told what is being done, a line at a time.

    Returns:
        What the .json holds, and why each of the cells that failed now did.

    Raises:
        UsageError: nothing can start. RunError: the page cannot be written.
        TerminatedError: SIGTERM came while a model trained; no further cell is begun.
    """
    found = opened(table, setting, seeds)
    command = command or f"jdm reproduce {table.name}"
    chosen = selected(found, patterns) if run else []
    broken: dict[str, str] = {}
    reasons = []
    for place, cell in enumerate(chosen, 1):
        say(f"[{place}/{len(chosen)}] {cell.name}, seed {cell.seed}: {cell.row.title}")
        if reason := _filled(cell, setting, broken, watch):
            say(f"    failed: {reason}")
            reasons.append(reason)
        publish(gathered(table, setting, found, seeds, command), page)
    data = gathered(table, setting, found, seeds, command)
    if table.picture:
        data["picture"] = f"{data['file']}.png"
        _save(figure(found, setting, data), page / data["picture"])
    publish(data, page)
    return data, reasons


def opened(table: Table, setting: Setting, seeds: int) -> list[Cell]:
    """Every cell of the table.

    Raises:
        UsageError: the scale lacks something without which none can be filled.
    """
    scales.check(setting.scale, recipes(table))
    return cells(table, setting, seeds)


def publish(data: dict[str, Any], page: Path) -> Path:
    """The page and its numbers; returns the page's file."""
    data = json.loads(json.dumps(data))  # the page shows what the file holds
    write(page / f"{data['file']}.json", json.dumps(data, indent=1) + "\n")
    return write(page / f"{data['file']}.md", markdown(data))


def listed(table: Table, setting: Setting, seeds: int = 1, patterns: str | None = None) -> str:
    """What `--dry-run` prints: each cell, whether it is there, and what is left of it at about which cost."""
    rows: list[Sequence[str]] = [("cell", "seed", "state", "left to do", "about")]
    seen: set[str] = set()
    total, unknown = 0.0, False
    for cell in selected(opened(table, setting, seeds), patterns):
        reason = failed(cell, setting)
        try:
            if not reason and stored(cell, setting):
                rows.append((cell.name, str(cell.seed), "measured", "", ""))
                continue
            trainings = to_train(cell.model, setting)
        except UsageError:  # its folder holds something else
            rows.append((cell.name, str(cell.seed), f"fails: {reason}", "", ""))
            continue
        new = {k: v for k, v in trainings.items() if k not in seen}
        seen |= new.keys()
        seconds = measuring_seconds(cell, setting) + sum(s or 0.0 for *_, s in new.values())
        unknown |= any(s is None for *_, s in new.values())
        total += seconds
        left = [f"train {k}, {steps} x {run.batch}" for k, (run, steps, _) in new.items()]
        before = f"failed before ({reason}); " if reason else ""
        rows.append((cell.name, str(cell.seed), before + ("to train" if new else "to measure"),
                     "; ".join([*left, f"measure {setting.n} pictures"]), lasting(seconds)))
    tail = ", and trainings whose pace is not known" if unknown else ""
    return f"{aligned(rows)}\n\nIn all about {lasting(total)} on two CPU cores{tail}."


def lasting(seconds: float) -> str:
    """A duration to plan with."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _filled(cell: Cell, setting: Setting, broken: dict[str, str], watch: Watch) -> str:
    """Fill a cell; in one line, why it could not be. A model that failed once in a sitting is not tried again."""
    debug = os.environ.get("JDM_DEBUG", "0") not in ("", "0")
    reason = next((broken[name] for name in _names(cell.model) if name in broken), "")
    error: Exception = RunError(reason)
    if not reason:
        try:
            fill(cell, setting, watch)
            return ""
        except TerminatedError:  # the sitting's end, not this cell's
            raise
        except Exception as raised:  # one cell's failure is its own
            if debug:
                raise
            error, reason = raised, one_line(raised)
            broken |= {name: reason for name in (_culprit(cell.model),) if name}
    note_failure(cell, setting, error)
    return reason


def _names(model: Model) -> list[str]:
    return [*(name for need in model.needs.values() for name in _names(need)), model.name]


def _culprit(model: Model) -> str:
    """The first model that could not be made, of this one and what it needs."""
    for need in model.needs.values():
        if name := _culprit(need):
            return name
    try:
        return "" if finished(model) else model.name
    except UsageError:
        return model.name


def _save(image: Any, file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
    except OSError as error:
        raise RunError(f"{file} could not be written ({error.strerror or error}); choose another --page") from None
