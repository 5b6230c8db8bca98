"""The numbers of a table, typed: what a cell's file and a page's .json hold, read and written here alone."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from jdm.files import fitted, read_json, write_json

T = TypeVar("T")
AGAIN = "delete it and run again"
KEYS = ("fd", "fd_floor", "fd_efflite0", "fd_floor_efflite0", "consistency", "consistency_chance",
        "consistency_same_prompt", "consistency_blank", "consistency_round_trip", "diversity", "prompt_agreement",
        "judge", "judge_accuracy", "hpsv2_anime", "hpsv2_concept_art", "hpsv2_paintings", "hpsv2_photo", "hpsv2",
        "aesthetic", "clip", "std", "std_growth", "nfe", "seconds_per_image", "seconds_per_image_batch1")


@dataclass(frozen=True)
class Value:
    """A measurement; `spread` is its error, None where none is known."""

    mean: float
    spread: float | None = None


@dataclass(frozen=True)
class Stage:
    """A training behind a model; `seconds` are the median step's times steps, None where no log says."""

    name: str
    steps: int
    batch: int
    seconds: float | None = None

    @property
    def samples(self) -> int:
        return self.steps * self.batch


@dataclass(frozen=True)
class Tuning:
    """The guidance of least distance on n validation pictures, with the distance of every candidate."""

    chosen: float
    distances: dict[str, float]
    n: int


@dataclass(frozen=True)
class Record:
    """The contents of a cell's file: one model, measured.

    Attributes:
        measured: as `evaluate` returns it.
        course: measurements on validation pictures as the run trained, probe by probe.
        file: name of the cell's file, a digest of everything that decided these numbers.
        taken_from: the page it was read from, where it was not measured here.
    """

    seed: int
    weights: str
    measured: dict[str, Any]
    tuning: Tuning | None = None
    training: tuple[Stage, ...] = ()
    course: tuple[dict[str, float], ...] = ()
    file: str = ""
    taken_from: str = ""


@dataclass(frozen=True)
class Result:
    """One row on one column, over training seeds.

    Attributes:
        state: "measured", "failed", "not measured", or "left out" unless asked for.
        reasons: why seeds failed. asked: number of seeds.
        values: measurements by their names in KEYS, and "diversity_ratio" to the multi-step ControlNet.
    """

    cell: str = ""
    state: str = ""
    reasons: tuple[str, ...] = ()
    asked: int = 0
    records: tuple[Record, ...] = ()
    values: dict[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """A row of a page: a `jdm.reproduce.tables.Row` and its results by column."""

    row: str
    title: str
    cells: dict[str, Result]
    part: str = ""
    beside: str = ""
    steps: int = 1
    published: str = ""
    average: dict[str, Value] | None = None


@dataclass(frozen=True)
class Answer:
    """A question that a table was made to answer, and the numbers its verdict rests on."""

    question: str
    verdict: str
    columns: tuple[str, ...]
    text: str
    numbers: dict[str, Any]


@dataclass(frozen=True)
class Page:
    """A page: a table's results, and how they came about.

    Attributes:
        file: the page's name without suffix.
        columns: own name of a column -> the paper's.
        measures: keys of the measurements in the paper's form of the table.
        command: command that fills it.
        picture: name of the figure's file. plots: of the file with the plots.
    """

    table: str
    title: str
    date: str
    version: str
    commit: str
    python: str
    torch: str
    processor: str
    scale: str
    teacher: str
    source: str
    split: str
    n: int
    seeds: int
    file: str
    columns: dict[str, str]
    measures: tuple[str, ...]
    command: str
    rows: tuple[Line, ...]
    headline: str = ""
    answers: tuple[Answer, ...] = ()
    picture: str = ""
    plots: str = ""

    def result(self, row: str, column: str) -> Result:
        """A row on a column; one without records where there is none."""
        return next((line.cells[column] for line in self.rows if line.row == row and column in line.cells), Result())

    def shared(self, *rows: str) -> tuple[str, ...]:
        """The columns that all of these rows were measured on."""
        return tuple(c for c in self.columns if all(self.result(row, c).values for row in rows))

    def mean_over(self, row: str, columns: Sequence[str], key: str, logs: bool = False) -> Value | None:
        """A row's mean over columns, as the function `mean_over`."""
        return mean_over([self.result(row, column) for column in columns], key, logs)

    def records(self) -> Iterator[tuple[Line, str, Record]]:
        """Every (row, column, record)."""
        for line in self.rows:
            for column, result in line.cells.items():
                yield from ((line, column, record) for record in result.records)


def values_of(records: Sequence[Record]) -> dict[str, Value]:
    """Each measurement over seeds; of one seed, with the bootstrap's error where it has one."""
    found = {}
    for key in KEYS:
        seen = [float(r.measured[key]) for r in records if r.measured.get(key) is not None]
        if len(seen) > 1:
            found[key] = Value(statistics.fmean(seen), statistics.stdev(seen))
        elif seen:
            found[key] = Value(seen[0], records[0].measured.get(f"{key}_spread"))
    return found


def mean_over(results: Sequence[Result], key: str, logs: bool = False) -> Value | None:
    """A measurement's mean over columns; None where one of them lacks it.

    Its error is of the seeds' means where every column has the same several seeds; else columns count as independent.

    Args:
        logs: spread of the logarithms, which is that of the geometric mean; None also where a value is not positive.
    """
    values = [result.values[key] for result in results if key in result.values]
    if not values or len(values) < len(results):
        return None
    columns = [{r.seed: float(r.measured[key]) for r in result.records if r.measured.get(key) is not None}
               for result in results]
    if logs:
        if min(v.mean for v in values) <= 0 or any(n <= 0 for seeds in columns for n in seeds.values()):
            return None
        values = [Value(math.log(v.mean), None if v.spread is None else v.spread / v.mean) for v in values]
        columns = [{seed: math.log(n) for seed, n in seeds.items()} for seeds in columns]
    mean = statistics.fmean(v.mean for v in values)
    if len(columns[0]) > 1 and all(seeds.keys() == columns[0].keys() for seeds in columns):
        each = [statistics.fmean(seeds[seed] for seeds in columns) for seed in columns[0]]
        return Value(mean, statistics.stdev(each))
    spreads = [v.spread for v in values if v.spread is not None]
    return Value(mean, sum(s**2 for s in spreads) ** 0.5 / len(values) if len(spreads) == len(values) else None)


# Files


def save(file: Path, value: Any, **more: Any) -> None:
    """Write a dataclass of this module as JSON, `more` beside its fields."""
    write_json(file, {**more, **dataclasses.asdict(value)})


def load(kind: type[T], file: Path) -> T | None:
    """Reads what `save` wrote, with the file's name in it; None where the file does not exist."""
    found = read_json(file, remedy=AGAIN)
    return fitted({**found, "file": file.name}, kind, str(file), AGAIN) if found else None


@cache
def load_page(file: str) -> Page:
    """A page from its .json; fields that a page has not are passed over, so that older ones can be read.

    Raises:
        UsageError: it is none.
    """
    return read_json(Path(file), Page, "give --known the .json of a page that jdm reproduce wrote", needed=True)
