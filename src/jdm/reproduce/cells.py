"""A cell of a table: one model's measurements, in a JSON file named by a digest of everything that decides them."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from jdm.controls import checked, load_control
from jdm.data.sources import fingerprint, load_pictures
from jdm.errors import RunError, UsageError, in_short
from jdm.evaluation import evaluate as evaluation
from jdm.evaluation.questions import Questions, answers
from jdm.evaluation.sampling import Sampler
from jdm.files import ASSETS, read_json, write_json
from jdm.library import load_model
from jdm.metrics.frechet import Statistics, frechet_distance
from jdm.metrics.scores import read_prompts
from jdm.models.classifier import Classifier
from jdm.reproduce.form import AMONG, TEXT, TUNED_ON, VALIDATION, Row, Table
from jdm.reproduce.models import (
    Model,
    Spec,
    Watch,
    course,
    finished,
    growth,
    make,
    plan,
    settled,
    stages,
    weights,
)
from jdm.reproduce.results import AGAIN, Record, Tuning, load, load_page, save
from jdm.reproduce.setups import Setup

ASKED = 0  # seed of the questions: the same prompts, controls and noise in every cell


@dataclass(frozen=True)
class Cell:
    """One row on one column with one training seed.

    Attributes:
        column: the control's name, or TEXT.
        spec: name or folder of the model.
        default: measured without being asked for by name.
    """

    row: Row
    column: str
    seed: int
    spec: Spec
    model: Model
    default: bool = True

    @property
    def name(self) -> str:
        """The cell's name, as `--cells` takes it: column/row."""
        return f"{self.column}/{self.row.key}"

    @property
    def control(self) -> str:
        """The column's control; empty for text-to-image."""
        return "" if self.column == TEXT else self.column


def columns(table: Table, setup: Setup) -> dict[str, str]:
    """The table's columns: own name -> the paper's."""
    return {setup.controls[name]: name for name in table.columns} or {TEXT: TEXT}


def cells(table: Table, setup: Setup, seeds: int = 1) -> list[Cell]:
    """Every cell, the first seed's first. A model that is given has one seed."""
    found = []
    for seed in range(seeds):
        for column, published in columns(table, setup).items():
            for row in table.rows:
                spec = row.on.get(published, row.spec)
                model = settled(spec, setup, "" if column == TEXT else column, seed)
                if seed == 0 or model.seeded:
                    default = row.default is None or published in row.default
                    found.append(Cell(row, column, seed, spec, model, default))
    return found


def selected(all_cells: Sequence[Cell], patterns: str | None) -> list[Cell]:
    """The cells that `--cells` names: column/row, with * and ?, or a row or column alone, separated by commas.

    Raises:
        UsageError: a pattern names none; the nearest is suggested.
    """
    if patterns is None:
        return [cell for cell in all_cells if cell.default]
    wanted: list[Cell] = []
    for pattern in filter(None, (p.strip() for p in patterns.split(","))):
        found = [cell for cell in all_cells if _fits(cell, pattern)]
        if not found:
            names = sorted({n for c in all_cells for n in (c.name, c.column, c.row.key)})
            near = difflib.get_close_matches(pattern, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
            raise UsageError(f"--cells {pattern} names no cell of this table; {hint}")
        wanted += [cell for cell in found if cell not in wanted]
    return wanted


def _fits(cell: Cell, pattern: str) -> bool:
    names = [cell.name] if "/" in pattern else [cell.column, cell.row.key]
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


# What decides a cell


def identity(cell: Cell, setup: Setup) -> dict[str, Any]:
    """Everything that decides a cell's numbers, except the weights its training will give; as JSON."""
    guidance: Any = cell.row.guidance
    if guidance == VALIDATION:
        guidance = {"among": AMONG, "n": TUNED_ON, "split": setup.validation}
    asked = {"source": setup.source, "split": setup.split, "n": setup.n,
             "pictures": _pictures(setup.source, setup.split, setup.teacher), "seed": ASKED,
             "control": _control(cell.control) if cell.control else None, "steps": cell.row.steps,
             "guidance": guidance, "teacher": weights(setup.teacher), "quick": setup.quick,
             "extractors": _extractors(setup.source, setup.quick, setup.extractors, evaluation.judge())}
    if setup.scores:
        asked["scores"] = setup.scores
    if not cell.control:
        asked |= {"prompts": _digest(read_prompts(setup.prompts))} if setup.prompts else {}
        judge = ASSETS / "nano-judge"  # who judges prompts
        asked["judge"] = weights(str(judge)) if judge.is_dir() else None
    return json.loads(json.dumps({"model": plan(cell.model), "asked": asked}))


def _control(name: str) -> dict[str, Any]:
    control = load_control(name)
    settings = dataclasses.asdict(control) if dataclasses.is_dataclass(control) else {}
    return {"name": name, "class": type(control).__name__, **settings}


@cache
def _pictures(source: str, split: str, model: str) -> str:
    return fingerprint(load_pictures(source, split, load_model(model).size))


@cache
def _extractors(source: str, quick: bool, also: tuple[str, ...], judge: Classifier) -> list[str]:
    return [extractor.name for extractor in evaluation.extractors(source, quick, also)]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _named(cell: Cell, setup: Setup, whole: dict[str, Any]) -> str:
    """The name, without suffix, of a file that `whole` decides."""
    row = cell.row
    words = (cell.model.name.replace("/", "_"), cell.control, f"{row.steps}steps" if row.steps > 1 else "",
             f"guidance{row.guidance:g}" if isinstance(row.guidance, float) else "", f"n{setup.n}", _digest(whole))
    return "-".join(filter(None, words))


def place(cell: Cell, setup: Setup) -> Path:
    """The cell's file; its model is finished."""
    whole = {**identity(cell, setup), "weights": weights(cell.model.path)}
    return setup.out / "cells" / f"{_named(cell, setup, whole)}.json"


def _failure(cell: Cell, setup: Setup) -> Path:
    return setup.out / "cells" / f"{_named(cell, setup, identity(cell, setup))}.failed.json"


# What is there


def stored(cell: Cell, setup: Setup) -> Record | None:
    """The cell's record, if it was measured: here, or on a page that is known."""
    own = load(Record, place(cell, setup)) if finished(cell.model) else None
    return own or _known(cell, setup)


def _known(cell: Cell, setup: Setup) -> Record | None:
    """A page's record of this recipe, teacher, pictures and measurements: its file's name is a digest of them.

    A recipe whose result ships may have been measured on the run itself, before it shipped.
    """
    if not setup.known:
        return None
    ships = setup.shipped
    before = [replace(setup, shipped=s) for s in ({}, *({k: ships[k] for k in ships if k != one} for one in ships))]
    models = [cell.model, *(settled(cell.spec, each, cell.control, cell.seed) for each in before)]
    same = [replace(cell, model=model) for k, model in enumerate(models) if not k or model != cell.model]
    wanted = [(own, identity(own, setup)) for own in same]
    for page in setup.known:
        for _, _, record in load_page(page).records():
            if any(record.file == f"{_named(own, setup, {**whole, 'weights': record.weights})}.json"
                   for own, whole in wanted):
                return replace(record, taken_from=Path(page).name)
    return None


def passed_over(found: Sequence[Cell], setup: Setup) -> list[str]:
    """A line for each known page that has some of these cells, made by other settings, so that they are not taken."""
    lines = []
    for file in setup.known:
        page = load_page(file)
        if other := [c.name for c in found if page.result(c.row.key, c.column).records and not stored(c, setup)]:
            lines.append(f"{Path(file).name} (jdm {page.version}) has {', '.join(dict.fromkeys(other))} by other "
                         "settings, pictures or weights than they would have now: not taken")
    return lines


def failed(cell: Cell, setup: Setup) -> str | None:
    """The reason, in one line, why a cell could not be filled; None where nothing stopped it."""
    try:
        if stored(cell, setup) is None:
            return read_json(_failure(cell, setup), dict[str, str], AGAIN).get("reason")
        return None
    except UsageError as error:
        return one_line(error)


def one_line(error: Exception) -> str:
    """An error in one line, for a reader of the table."""
    if isinstance(error, UsageError | RunError):
        return " ".join(str(error).split())
    return f"failed unexpectedly ({in_short(error)})"


# Filling it


def fill(cell: Cell, setup: Setup, watch: Watch = lambda run: nullcontext()) -> Record:
    """The cell's record: read if it is there, else its model is made and measured.

    Raises:
        UsageError, RunError: it cannot be filled; `note_failure` writes that down.
    """
    if record := stored(cell, setup):
        return record
    make(cell.model, watch)
    tuning = tuned(cell, setup) if cell.row.guidance == VALIDATION else None
    row = _measured(cell, setup, tuning.chosen if tuning else cell.row.guidance)  # type: ignore[arg-type]
    file, taken = place(cell, setup), course(cell.model)
    record = Record(cell.seed, weights(cell.model.path), row | growth(taken), tuning, tuple(stages(cell.model)), taken,
                    file.name)
    save(file, record, **identity(cell, setup))
    _failure(cell, setup).unlink(missing_ok=True)
    return record


def _measured(cell: Cell, setup: Setup, guidance: float | None) -> dict[str, Any]:
    model, steps = cell.model.path, cell.row.steps
    if setup.prompts and not cell.control:
        return evaluation.evaluate_prompts(model, read_prompts(setup.prompts), setup.scores, setup.n, ASKED, steps,
                                           guidance, setup.device)
    return evaluation.evaluate(model, cell.control or None, setup.n, ASKED, setup.source, setup.split, steps, guidance,
                               setup.teacher, setup.quick, setup.scores, setup.extractors, setup.device)


def note_failure(cell: Cell, setup: Setup, error: Exception) -> None:
    """Keep why a cell could not be filled, for its page; the next attempt that succeeds removes it."""
    try:
        write_json(_failure(cell, setup), {"cell": cell.name, "reason": one_line(error)})
    except (UsageError, RunError):  # the cell says so itself, or the disk is full: the page can still be tried
        return


def tuned(cell: Cell, setup: Setup) -> Tuning:
    """The guidance of least distance on validation pictures, with every candidate's distance; kept as the cell is."""
    whole = {"weights": weights(cell.model.path), **identity(cell, setup)["asked"], "n": TUNED_ON}
    file = setup.out / "cells" / f"guidance-{cell.model.name}-{_digest(whole)}.json"
    if tuning := load(Tuning, file):
        return tuning
    model = load_model(cell.model.path).to(setup.device)
    pictures = load_pictures(setup.source, setup.validation, model.size)
    control = checked(load_control(cell.control), model.size) if cell.control else None
    questions = Questions.of(pictures, control, min(TUNED_ON, len(pictures)), ASKED, setup.device)
    extractor = evaluation.extractors(setup.source, True, setup.extractors, setup.device)[0]
    target = evaluation.references(setup.teacher, [extractor], load_pictures(setup.source, "test", model.size),
                                   device=setup.device)

    def distance(guidance: float) -> float:
        made = answers(Sampler(model, cell.row.steps, guidance), questions, control)
        return frechet_distance(Statistics.of(extractor.features(made), extractor.name),
                                target[extractor.name].statistics)

    distances = {f"{w:g}": distance(w) for w in AMONG}
    chosen = float(min(distances, key=distances.__getitem__))
    tuning = Tuning(chosen, distances, len(questions))
    save(file, tuning)
    return tuning


def measuring_seconds(cell: Cell, setup: Setup) -> float:
    """About how long the measurement takes on two CPU cores: of nano-sd, about 1 ms a picture and evaluation."""
    nfe = cell.row.steps * (1 if cell.row.guidance in (None, 1) else 2)
    made = setup.n + (128 if setup.quick else 512) + 4 * 64
    tuning = TUNED_ON * len(AMONG) * nfe if cell.row.guidance == VALIDATION else 0
    return 0.001 * (made * nfe + tuning) + (0 if setup.quick else 0.011 * setup.n) + 10
