"""A cell of a table: what is measured on which model, kept in one JSON file that everything deciding it names."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import hashlib
import json
from collections.abc import Iterable, Sequence
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
from jdm.files import ASSETS, write
from jdm.library import load_model
from jdm.metrics.frechet import Statistics, frechet_distance
from jdm.metrics.scores import read_prompts
from jdm.models.classifier import Classifier
from jdm.reproduce.models import Model, Setting, Watch, course, finished, make, plan, settled, stages, weights
from jdm.reproduce.tables import AMONG, TEXT, TUNED_ON, VALIDATION, Row, Table

ASKED = 0  # seed of the questions: the same prompts, controls and noise in every cell


@dataclass(frozen=True)
class Cell:
    """One row on one column with one training seed.

    Attributes:
        column: the control's name, or TEXT. published: the paper's column it stands beside.
        default: measured without being asked for by name.
    """

    row: Row
    column: str
    published: str
    seed: int
    model: Model
    default: bool = True

    @property
    def name(self) -> str:
        """As `--cells` has it."""
        return f"{self.column}/{self.row.key}"

    @property
    def control(self) -> str | None:
        return None if self.column == TEXT else self.column


def columns(table: Table, setting: Setting) -> dict[str, str]:
    """The table's columns: own name -> the paper's."""
    return {setting.scale.controls[name]: name for name in table.columns} or {TEXT: TEXT}


def cells(table: Table, setting: Setting, seeds: int = 1) -> list[Cell]:
    """Every cell, the first seed's first. A model that is given has one seed."""
    found = []
    for seed in range(seeds):
        for column, published in columns(table, setting).items():
            for row in table.rows:
                spec = row.on.get(published, row.spec)
                model = settled(spec, setting, "" if column == TEXT else column, seed)
                if seed == 0 or model.seeded:
                    default = row.default is None or published in row.default
                    found.append(Cell(row, column, published, seed, model, default))
    return found


def selected(all_cells: Sequence[Cell], patterns: str | None) -> list[Cell]:
    """Those that `--cells` names: column/row, with * and ?, or a row or column alone, separated by commas.

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


def identity(cell: Cell, setting: Setting) -> dict[str, Any]:
    """What decides a cell's numbers, but for the weights that its training will give; as JSON."""
    scale = setting.scale
    guidance: Any = cell.row.guidance
    if guidance == VALIDATION:
        guidance = {"among": AMONG, "n": TUNED_ON, "split": scale.validation}
    asked = {"source": scale.source, "split": scale.split, "n": setting.n,
             "pictures": _pictures(scale.source, scale.split, scale.model),
             "seed": ASKED, "control": _control(cell.control) if cell.control else None,
             "steps": cell.row.steps, "guidance": guidance, "teacher": weights(scale.model), "quick": setting.quick,
             "extractors": _extractors(scale.source, setting.quick, scale.extractors, evaluation.judge())}
    if scale.scores:
        asked["scores"] = list(scale.scores)
    if setting.prompts and cell.control is None:
        asked["prompts"] = _digest(read_prompts(setting.prompts))
    if cell.control is None:  # who judges prompts
        judge = ASSETS / "nano-judge"
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


def _stem(cell: Cell, setting: Setting) -> str:
    how = [] if cell.row.steps == 1 else [f"{cell.row.steps}steps"]
    how += [f"guidance{cell.row.guidance:g}"] if isinstance(cell.row.guidance, float) else []
    return "-".join([cell.model.name.replace("/", "_"), *([cell.control] if cell.control else []), *how,
                     f"n{setting.n}"])


def place(cell: Cell, setting: Setting) -> Path:
    """The cell's file; its model is finished."""
    whole = {**identity(cell, setting), "weights": weights(cell.model.path)}
    return setting.out / "cells" / f"{_stem(cell, setting)}-{_digest(whole)}.json"


def _failure(cell: Cell, setting: Setting) -> Path:
    return setting.out / "cells" / f"{_stem(cell, setting)}-{_digest(identity(cell, setting))}.failed.json"


# What is there


def stored(cell: Cell, setting: Setting) -> dict[str, Any] | None:
    """The cell's record, if it was measured: here, or on a page that is known."""
    own = _read(place(cell, setting)) if finished(cell.model) else None
    return own or _known(cell, setting)


def _known(cell: Cell, setting: Setting) -> dict[str, Any] | None:
    """A page's record of this recipe, teacher, pictures and measurements: its file's name is a digest of them.

    A recipe whose result ships may have been measured on the run itself, before it shipped.
    """
    if not setting.known:
        return None
    ships, spec = setting.scale.shipped, cell.row.on.get(cell.published, cell.row.spec)
    before = [{}, *({k: v for k, v in ships.items() if k != key} for key in ships)]
    models = [settled(spec, replace(setting, scale=replace(setting.scale, shipped=s)), cell.control or "", cell.seed)
              for s in before]
    wanted = [(_stem(own, setting), identity(own, setting))
              for own in (cell, *(replace(cell, model=model) for model in models if model != cell.model))]
    for page in setting.known:
        for record in _records_of(page):
            names = [f"{stem}-{_digest({**whole, 'weights': record['weights']})}.json" for stem, whole in wanted]
            if record["file"] in names:
                return {**record, "taken_from": Path(page).name}
    return None


@cache
def _records_of(page: str) -> list[dict[str, Any]]:
    try:
        rows = json.loads(Path(page).read_text(encoding="utf-8"))["rows"]
        return [record for row in rows for found in row["cells"].values() for record in found["records"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{page} is not the .json of a page ({in_short(error)}); give --known one that jdm reproduce "
                         "wrote") from None


def failed(cell: Cell, setting: Setting) -> str | None:
    """In one line, why the cell has no record, where something stopped it."""
    try:
        return (_read(_failure(cell, setting)) or {}).get("reason") if stored(cell, setting) is None else None
    except UsageError as error:
        return one_line(error)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return {**json.loads(file.read_text(encoding="utf-8")), "file": file.name}
    except (OSError, ValueError):
        return None


def one_line(error: Exception) -> str:
    """What went wrong, for a table's reader."""
    if isinstance(error, UsageError | RunError):
        return " ".join(str(error).split())
    return f"failed unexpectedly ({in_short(error)})"


# Filling it


def fill(cell: Cell, setting: Setting, watch: Watch = lambda run: nullcontext()) -> dict[str, Any]:
    """The cell's record: read if it is there, else its model is made and measured.

    Raises:
        UsageError, RunError: it cannot be filled; `note_failure` writes that down.
    """
    if record := stored(cell, setting):
        return record
    make(cell.model, watch)
    guidance, tuning = cell.row.guidance, None
    if guidance == VALIDATION:
        tuning = tuned(cell, setting)
        guidance = tuning["chosen"]
    row = _measured(cell, setting, guidance)  # type: ignore[arg-type]
    record = {**identity(cell, setting), "weights": weights(cell.model.path), "seed": cell.seed, "measured": row,
              "tuning": tuning, "training": stages(cell.model), "course": course(cell.model)}
    file = place(cell, setting)
    write(file, json.dumps(record, indent=1) + "\n")
    _failure(cell, setting).unlink(missing_ok=True)
    return {**json.loads(json.dumps(record)), "file": file.name}


def _measured(cell: Cell, setting: Setting, guidance: float | None) -> dict[str, Any]:
    scale, model, steps = setting.scale, cell.model.path, cell.row.steps
    if setting.prompts and cell.control is None:
        return evaluation.evaluate_prompts(model, read_prompts(setting.prompts), scale.scores, setting.n, ASKED, steps,
                                           guidance, setting.device)
    return evaluation.evaluate(model, cell.control, setting.n, ASKED, scale.source, scale.split, steps, guidance,
                               scale.model, setting.quick, scale.scores, scale.extractors, setting.device)


def note_failure(cell: Cell, setting: Setting, error: Exception) -> None:
    """Keep why a cell could not be filled, for its page; the next attempt that succeeds removes it."""
    try:
        write(_failure(cell, setting), json.dumps({"cell": cell.name, "reason": one_line(error)}, indent=1) + "\n")
    except (UsageError, RunError):  # the cell says so itself, or the disk is full: the page can still be tried
        return


def tuned(cell: Cell, setting: Setting) -> dict[str, Any]:
    """The guidance of least distance on validation pictures, with every candidate's distance; kept as the cell is."""
    scale = setting.scale
    whole = {"weights": weights(cell.model.path), **identity(cell, setting)["asked"], "n": TUNED_ON}
    file = setting.out / "cells" / f"guidance-{cell.model.name}-{_digest(whole)}.json"
    if record := _read(file):
        return record
    model = load_model(cell.model.path).to(setting.device)
    pictures = load_pictures(scale.source, scale.validation, model.size)
    control = checked(load_control(cell.control), model.size) if cell.control else None
    questions = Questions.of(pictures, control, min(TUNED_ON, len(pictures)), ASKED, setting.device)
    extractor = evaluation.extractors(scale.source, True, scale.extractors, setting.device)[0]
    target = evaluation.references(scale.model, [extractor], load_pictures(scale.source, "test", model.size),
                                   device=setting.device)

    def distance(guidance: float) -> float:
        made = answers(Sampler(model, cell.row.steps, guidance), questions, control)
        return frechet_distance(Statistics.of(extractor.features(made), extractor.name),
                                target[extractor.name].statistics)

    distances = {f"{w:g}": distance(w) for w in AMONG}
    chosen = float(min(distances, key=distances.__getitem__))
    record = {"chosen": chosen, "distances": distances, "n": len(questions), "split": pictures.source}
    write(file, json.dumps(record, indent=1) + "\n")
    return {**record, "file": file.name}


def measuring_seconds(cell: Cell, setting: Setting) -> float:
    """About how long the measurement takes on two CPU cores: of nano-sd, about 1 ms a picture and evaluation."""
    nfe = 1 if cell.row.steps == 1 else cell.row.steps * (1 if cell.row.guidance == 1 else 2)
    made = setting.n + (128 if setting.quick else 512) + 4 * 64
    tuning = TUNED_ON * len(AMONG) * nfe if cell.row.guidance == VALIDATION else 0
    return 0.001 * (made * nfe + tuning) + (0 if setting.quick else 0.011 * setting.n) + 10


def by_cell(found: Iterable[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """(row, column) -> its cells, one a seed."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in found:
        groups.setdefault((cell.row.key, cell.column), []).append(cell)
    return groups
