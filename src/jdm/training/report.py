"""A run on one page, report.html in its folder, and several runs on one: curves, previews, settings. Each needs no
other file and no network."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from jdm import __version__
from jdm.errors import UsageError
from jdm.evaluation import html
from jdm.evaluation.chart import number
from jdm.files import read_json, write
from jdm.run import Record
from jdm.training import previews
from jdm.training.curves import Rows, charts, curve_of, keys
from jdm.training.monitors import Monitors
from jdm.training.record import measurements

PAGE, LOG, RECORD = "report.html", "metrics.jsonl", "run.json"
RELOAD = 60  # seconds between a browser's readings of the page of a run in progress


@dataclass(frozen=True)
class Seen:
    """The contents of a run's folder, for its report.

    Attributes:
        folder: the run's.
        name: by which a reader knows it.
    """

    folder: Path
    name: str

    @cached_property
    def rows(self) -> Rows:
        """The rows of metrics.jsonl."""
        return measurements(self.folder / LOG)

    @cached_property
    def record(self) -> dict[str, Any]:
        """run.json."""
        return read_json(self.folder / RECORD, Record)

    @property
    def settings(self) -> dict[str, str]:
        """Every setting by its dotted name, as text."""
        return dict(_flat(self.record["run"]))

    @property
    def steps(self) -> tuple[int, int]:
        """Steps in the log, and steps asked for."""
        return int(self.rows[-1]["step"]) if self.rows else 0, self.record["run"].get("steps", 0)

    @property
    def last(self) -> dict[str, float]:
        """The last value of each number in the log."""
        return {key: value for row in self.rows for key, value in row.items() if key != "step"}

    def film(self) -> list[str]:
        """The run's film, or else its last preview; empty where there are no previews."""
        files = previews.kept(self.folder)
        if not files:
            return []
        step, latest = list(files.items())[-1]
        said = previews.about(latest)
        if said is None:
            return []
        strip, what = previews.film(self.folder), f"{said.trained} over the run"
        if strip is None:
            strip, what = Image.open(latest), f"after step {step}"
        columns = f" From the left: {'; '.join(said.prompts)}." if said.prompts else ""
        return [html.picture(strip, f"{self.name}, {what}. From the top: {'; '.join(said.rows)}.{columns}")]


def found(folders: Sequence[Path]) -> list[Seen]:
    """The runs in these folders, each named by as much of its path as tells it from the others.

    Raises:
        UsageError: a folder holds no run, or is given twice.
    """
    for folder in folders:
        if not (folder / RECORD).is_file():
            raise UsageError(f"{folder} holds no run (there is no {RECORD} in it); name a folder that jdm train wrote")
    whole = [folder.resolve() for folder in folders]
    for place in whole:
        if whole.count(place) > 1:
            raise UsageError(f"{place} is given twice; name each run once")
    depth = next(n for n in range(1, 1000) if len({place.parts[-n:] for place in whole}) == len(whole))
    return [Seen(folder, "/".join(place.parts[-depth:])) for folder, place in zip(folders, whole, strict=True)]


def report(folder: Path, ended: bool = False, warnings: Sequence[str] | None = None) -> Path:
    """Writes report.html into a run's folder and returns its path.

    Args:
        ended: no further step comes; a browser reads the page of another run again every minute.
        warnings: messages of the run's monitors; by default read from its log.

    Raises:
        RunError: the disk cannot be written.
    """
    (seen,) = found([folder])
    done, asked = seen.steps
    said = Monitors(folder / LOG).said if warnings is None else warnings
    parts = [html.paragraph(f"{done:,} of {asked:,} steps logged; {_written()}."
                            + ("" if ended else " It is written again at every checkpoint and preview."))]
    if said:
        parts += [html.heading("Warnings"), html.listing(said)]
    if shown := seen.film():
        parts += [html.heading("Previews"), *shown]
    parts += _curves({seen.name: seen.rows}) or [html.paragraph("No step is logged yet.")]
    data = seen.record.get("data", {})
    other = {**{f"data: {k}": str(v) for k, v in data.items()}, **seen.record.get("versions", {}),
             "threads": str(seen.record.get("threads", ""))}
    parts += [html.heading("Settings"), html.table(["setting", "value"], list(seen.settings.items())),
              html.folded("Data and versions", html.table(["", ""], [[k, str(v)] for k, v in other.items()])),
              html.paragraph(f"The same run again: jdm train {folder / RECORD} --out NEW_FOLDER")]
    return write(folder / PAGE, html.page(f"Run {seen.name}", *parts, reload=0 if ended else RELOAD))


def compared(folders: Sequence[Path]) -> str:
    """A page of several runs: what differs in their settings, their last numbers, curves over each other, previews.

    Raises:
        UsageError: a folder holds no run, or a file of it is damaged.
    """
    runs = found(folders)
    names = [seen.name for seen in runs]
    settings = [seen.settings for seen in runs]
    every = dict.fromkeys(key for own in settings for key in own)
    differing = [[key, *(own.get(key, "-") for own in settings)] for key in every
                 if key != "out" and len({own.get(key) for own in settings}) > 1]
    counted = f"{len(runs)} runs" if len(runs) > 1 else "One run"
    parts = [html.paragraph(f"{counted}; {_written()}."),
             html.heading("Settings that differ"),
             html.table(["setting", *names], differing) if differing else html.paragraph("None."),
             html.heading("Last values"), _last(runs)]
    for seen in runs:
        if said := Monitors(seen.folder / LOG).said:
            parts += [html.heading(f"Warnings of {seen.name}"), html.listing(said)]
    if films := [film for seen in runs for film in seen.film()]:
        parts += [html.heading("Previews"), html.columns(*films)]
    return html.page("Runs compared", *parts, *_curves({seen.name: seen.rows for seen in runs}))


def _written() -> str:
    return f"written {time.strftime('%Y-%m-%d %H:%M:%S')} by jdm {__version__}"


def _last(runs: Sequence[Seen]) -> str:
    """A table of the steps taken and of the last value of each number."""
    rows = [["steps logged", *(f"{seen.steps[0]:,} of {seen.steps[1]:,}" for seen in runs)]]
    last = [seen.last for seen in runs]
    for key in keys(row for seen in runs for row in seen.rows):
        known = curve_of(key)
        rows.append([f"{known.name} ({known.unit})", *(number(own[key]) if key in own else "-" for own in last)])
    return html.table(["last value of", *(seen.name for seen in runs)], rows)


def _curves(runs: Mapping[str, Rows]) -> list[str]:
    return [part for group, drawn in charts(runs).items() for part in (html.heading(group), html.columns(*drawn))]


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """(dotted name, text) of each setting of a run's description; a type stands under its setting's own name."""
    if isinstance(value, dict) and "type" in value:
        own = [(name, str(value["type"]))] if name else []
        inside = ((f"{name}.{k}".strip("."), v) for k, v in value.items() if k != "type")
        return own + [pair for key, inner in inside for pair in _flat(inner, key)]
    return [(name, value if isinstance(value, str) else json.dumps(value))]
