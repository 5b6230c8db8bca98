"""What the tests of `jdm reproduce` share: a setup of the tiny model, a table of few steps, and who trained."""

from contextlib import contextmanager
from dataclasses import replace

import pytest

import tiny
from jdm.evaluation import evaluate as evaluation
from jdm.evaluation.reference import references
from jdm.recipes import all_recipes
from jdm.reproduce.results import Line, Page, Record, Result, Value
from jdm.reproduce.setups import NANO, Setup
from jdm.reproduce.sitting import reproduce
from jdm.reproduce.tables import TABLES

N = 8
# Table 1 with a sampler of two steps.
TABLE = replace(TABLES["table1"], rows=tuple(replace(row, steps=min(row.steps, 2)) for row in TABLES["table1"].rows))


def tiny_setup(teacher, folder, patch: pytest.MonkeyPatch) -> Setup:
    """Runs of two steps on the tiny teacher; eight pictures to ask about; references of 30 samples in two steps."""
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    patch.setattr(evaluation, "judge", tiny.judge)
    patch.setattr(evaluation, "references", lambda t, e, p, **_: references(t, e, p.part("[:30]"), 2, samples=30))

    def recipe(name: str):
        return tiny.run(all_recipes()[name](), folder / "unused", teacher)

    return replace(NANO, teacher=str(teacher), shipped={}, split=f"test[:{N}]", validation="test[64:72]", recipe=recipe,
                   out=folder / "out", n=N, quick=True)


class Watch:
    """What trained: {run's name: the steps it took}. Stops at one of them, the first time."""

    def __init__(self, stop=None, error: type[BaseException] = KeyboardInterrupt):
        self.taken: dict[str, list[int]] = {}
        self.stop, self.error = stop, error

    @contextmanager
    def __call__(self, run):
        def step(done, _):
            self.taken.setdefault(run.out.name, []).append(done)
            if (run.out.name, done) == self.stop:
                self.stop = None
                raise self.error

        yield step


def sit(table, setup, folder, patterns=None, **more):
    return reproduce(table, setup, patterns=patterns, folder=folder, **{"say": lambda line: None, **more})


def cell_of(page: Page, row: str, column: str = "canny") -> Result:
    return page.result(row, column)


def written(page, kind="md") -> str:
    (file,) = page.glob(f"*.{kind}")
    return file.read_text()


# Pages of given numbers


def record(seed=0, **more):
    return Record(seed, "of its weights", more.pop("measured", {}), **more)


def cell(*records, **values):
    """A result with values, key=(mean, spread)."""
    return Result(records=records or (record(),), values={k: Value(*v) for k, v in values.items()})


def table(name, columns, **rows):
    """A page with a row for each keyword: {column: result}."""
    lines = tuple(Line(row.replace("_", "-"), row, cells) for row, cells in rows.items())
    return Page(name, "", "", "", "", "", "", "", "nano", "nano-sd", "", "", 1, 1, "", columns, (), "", lines)


def with_row(page, place, **changes):
    """The page with one of its rows changed."""
    rows = list(page.rows)
    rows[place] = replace(rows[place], **changes)
    return replace(page, rows=tuple(rows))
