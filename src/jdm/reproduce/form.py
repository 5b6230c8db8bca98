"""Parts of a table: rows, columns, published numbers and plots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jdm.reproduce.models import Composed, Spec, Trained

TEXT = "text"  # the one column of a table without controls
CONTROLS = ("canny", "HED", "depth", "8x SR")  # the paper's columns
AMONG, TUNED_ON = (1.5, 2.0, 3.0, 4.0), 400  # guidance that is chosen on validation pictures, and on how many
VALIDATION = "validation"
YARDSTICK = "controlnet"  # the row whose measurements others are ratios to


@dataclass(frozen=True)
class Row:
    """A method in a table.

    Attributes:
        key: its name in `--cells`. title: its name on the page.
        spec: how its model is had. on: a spec of its own for some of the paper's columns.
        steps: 1, or of the multi-step sampler with `guidance`; VALIDATION chooses it.
        default: the paper's columns it is measured on unless a cell is asked for by name; None for all.
        part: heading it stands under. beside: key of the row that it changes one thing of.
        published: key of its published numbers. said: what the paper finds of it, in words.
    """

    key: str
    title: str
    spec: Spec
    on: Mapping[str, Spec] = field(default_factory=dict)
    steps: int = 1
    guidance: float | str | None = None
    default: tuple[str, ...] | None = None
    part: str = ""
    beside: str = ""
    published: str = ""
    said: str = ""


@dataclass(frozen=True)
class Published:
    """Printed numbers: by the paper's column, (FID, consistency), None where not printed; nfe as printed."""

    title: str
    nfe: int
    cells: Mapping[str, tuple[float, float | None]]


@dataclass(frozen=True)
class Plot:
    """A plot of one measurement of some rows.

    Attributes:
        key: name of the measurement, or of the probe where it is a course.
        kind: course for lines over training steps, bars for a bar a row, alpha for one line over the values `at`.
    """

    title: str
    key: str
    rows: tuple[str, ...]
    kind: Literal["course", "bars", "alpha"]
    at: tuple[float, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table, or a figure with the numbers of what it shows.

    Attributes:
        columns: the paper's, of CONTROLS; empty for text-to-image.
        measures: keys of the measurements in the paper's form of it.
        picture: it is a figure: a row of pictures for each row.
        n: pictures per cell unless asked otherwise.
        probes: measurements in the course of each training; 0 for the recipes' own.
        theirs: a published table of other columns, its head first, with its note.
        plots: plots that are drawn of it.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    columns: tuple[str, ...] = CONTROLS
    measures: tuple[str, ...] = ("fd", "consistency")
    published: Mapping[str, Published] = field(default_factory=dict)
    picture: bool = False
    n: int = 5000
    probes: int = 0
    theirs: tuple[tuple[Any, ...], ...] = ()
    theirs_note: str = ""
    plots: tuple[Plot, ...] = ()


CONTROLNET = Trained("controlnet")
MANY = Row("controlnet", "ControlNet, 50 steps", CONTROLNET, steps=50, guidance=VALIDATION, published="controlnet")


def specs(table: Table) -> list[Spec]:
    """Returns every model that the table's cells are measured on or made from."""
    found = [spec for row in table.rows for spec in (row.spec, *row.on.values())]
    for spec in found:  # grows as it goes
        found += [need for _, need in spec.needs] if isinstance(spec, Trained) else \
            [spec.backbone, spec.controlnet] if isinstance(spec, Composed) else []
    return found
