"""Writes docs/choosing.md from the .json of the results pages, so that no number is typed by hand.

    python benchmarks/choosing.py [OUT.md]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from jdm.reproduce.cells import columns
from jdm.reproduce.form import TEXT, Row, Table
from jdm.reproduce.page import aligned, number
from jdm.reproduce.results import Page, load_page
from jdm.reproduce.setups import NANO
from jdm.reproduce.tables import TABLES

DOCS = Path(__file__).parents[1] / "docs"
KEYS = ("fd", "consistency", "diversity", "prompt_agreement", "nfe", "seconds_per_image")
HEAD = ("steps", "method", "control", "distance", "consistency", "diversity", "prompt agreement", "NFE",
        "ms / picture", "samples trained on", "page")
INTRO = """# Which method for which budget and aim

Made by `python benchmarks/choosing.py` from [results](results); a number that is not there was not measured, and its
line has the command. nano-sd on Fashion-MNIST: nothing here says how the methods stand at the size of SD1.5.

Choose the number of steps by the time you have, then the aim: the lowest distance draws best, the lowest consistency
obeys the control best, the highest diversity keeps most of z. Compare lines of one page alone: pages differ in
training, and "samples trained on" says in what. One training seed unless the page says otherwise; ± is the bootstrap
over pictures. ms / picture was taken on two CPU cores that other work shared; compare it within a page."""


def choosing(folder: Path) -> str:
    """The page, from every results page in a folder."""
    files = sorted(folder.glob("*.json"))
    pages = [(file, load_page(str(file))) for file in files]
    parts = [INTRO]
    for title, names in (("With a control", ("table1", "control")), ("From text alone", ("table3", "ddmd"))):
        rows, missing = [], []
        for name in names:
            for row, column in _cells(TABLES[name]):
                own = [(page.n, file, page) for file, page in pages if page.table == name
                       and page.result(row.key, column).records]
                if own:
                    _, file, page = max(own, key=lambda one: one[:2])
                    rows.append(_line(row, column, file, page))
                else:
                    missing.append((name, row, column))
        rows.sort(key=lambda line: (line[0], line[2]))
        parts += [f"## {title}", aligned([HEAD, *rows]) if rows else "Nothing is measured yet.", *_missing(missing)]
    said = [f"- [{file.stem}](results/{file.stem}.md): {page.headline}." for file, page in pages
            if any(True for _ in page.records())]
    return "\n\n".join([*parts, "## What each page says", "\n".join(said)]) + "\n"


def _cells(table: Table) -> Iterator[tuple[Row, str]]:
    """Every row of a table on the columns it is measured on."""
    for own, theirs in columns(table, NANO).items():
        for row in table.rows:
            if row.default is None or theirs in row.default:
                yield row, own


def _line(row: Row, column: str, file: Path, page: Page) -> Sequence[object]:
    result = page.result(row.key, column)
    trained = sum(stage.samples for stage in result.records[0].training)
    return (row.steps, row.title, "" if column == TEXT else column, *(number(result.values, key) for key in KEYS),
            f"{trained:,}" if trained else "–", f"[{file.stem}](results/{file.stem}.md)")


def _missing(cells: Sequence[tuple[str, Row, str]]) -> list[str]:
    """A line for each table, of what is not measured and the command that measures it."""
    lines = []
    for name in dict.fromkeys(name for name, *_ in cells):
        if all((name, row, column) in cells for row, column in _cells(TABLES[name])):
            lines.append(f"- {TABLES[name].title}: not measured; `jdm reproduce {name}`")
            continue
        titles: dict[str, None] = {}
        for own, row, _ in cells:
            if own == name:
                titles[f"{row.title} ({row.part})" if row.part else row.title] = None
        keys = ",".join(f"{column}/{row.key}" for own, row, column in cells if own == name)
        lines.append(f"- {', '.join(titles)}: not measured, or not on every control;\n"
                     f"  `jdm reproduce {name} --cells {keys}`")
    return ["\n".join(lines)] if lines else []


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "choosing.md"
    out.write_text(choosing(DOCS / "results"))
    print(out)
