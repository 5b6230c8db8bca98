"""Tables beside pictures (.csv, .tsv, .jsonl, .parquet): rows by the file they name, without a guess at any cell."""

from __future__ import annotations

import csv
import difflib
import io
import posixpath
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jdm.data.report import Report
from jdm.data.texts import captions_of, few, file_text, printable
from jdm.errors import UsageError, in_short
from jdm.files import parsed

ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")
PICTURES = ("file_name", "image_file_name", "image", "img", "picture", "path", "file_path", "filepath", "filename")
CAPTIONS = ("text", "caption", "captions", "prompt")
ROWS = "rows that cannot be read as they were meant"
SEPARATORS = (",", ";", "\t")  # a table that Excel writes in many countries has semicolons


@dataclass
class Row:
    """A picture's entry in a table: its captions, None if they are refused, and its control map's file or ""."""

    captions: tuple[str, ...] | None = ()
    control: str = ""
    where: str = ""


@dataclass
class Table:
    """A table: file named in it, relative to the table's folder -> what it says of that picture."""

    file: Path
    rows: dict[str, Row] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path, columns: Sequence[str], encoding: str, report: Report) -> Table:
        """Reads a table; the captions of several rows for one picture are all kept.

        Args:
            columns: names of the columns of pictures, captions and control maps; empty for the usual names, and
                for no maps.

        Raises:
            UsageError: a column is missing or ambiguous, or a row cannot be read as it was meant.
        """
        names, rows = _records(file, encoding, report)
        picture = column(names, columns[0], PICTURES, "--data.pictures", printable(file), first=2)
        caption = column(names, columns[1], CAPTIONS, "--data.captions", printable(file))
        control = columns[2] if columns[2] in names else ""
        for name in names:
            if name not in (picture, caption, control):
                report.leave_out(name, f"columns of {file.name} that are not read",
                                 "--data.controls NAME reads one as control maps")
        table = cls(file)
        for where, row in rows:
            with report.setting_aside(ROWS):
                found = table.rows.setdefault(inside(row.get(picture), where), Row(where=where))
                before, found.captions = found.captions, None
                more = captions_of(row.get(caption), where)
                found.captions = None if before is None else tuple(dict.fromkeys((*before, *more)))
                drawn = inside(row[control], where) if control and row.get(control) else found.control
                if found.control not in ("", drawn):
                    raise UsageError(f"{where}: this picture has two control maps, {found.control} and {drawn}; keep "
                                     "one")
                found.control = drawn
        if not table.rows:
            report.settle()
            raise UsageError(f"{printable(file)} has no rows; fill it, or remove it")
        return table


def column(names: Sequence[str], asked: str, known: Sequence[str], flag: str, where: str, first: int = 0) -> str:
    """The column of that name, or the only one with a usual name.

    Args:
        first: so many of the usual names are taken even where further ones are there.

    Raises:
        UsageError: there is none, or there are several.
    """
    if asked:
        if asked not in names:
            near = difflib.get_close_matches(asked, names, n=1)
            raise UsageError(f"{where} has no column {asked!r} for {flag}; "
                             f"{f'did you mean {near[0]!r}' if near else f'it has {few(names, 8)}'}")
        return asked
    found = [name for name in known if name in names]
    if found and found[0] in known[:first]:
        return found[0]
    if not found:
        raise UsageError(f"{where}: needs the columns file_name and text, has {few(names, 8)}; rename one, or name it "
                         f"with {flag}")
    if len(found) > 1:
        raise UsageError(f"{where}: the columns {' and '.join(found)} could both be meant; name one: {flag} {found[0]}")
    return found[0]


def inside(name: Any, where: str) -> str:
    """A file's name in a table as a path below the table's folder, with /.

    Raises:
        UsageError: it is no text, or leads out of the folder.
    """
    if not isinstance(name, str) or not name.strip():
        raise UsageError(f"{where}: names no file ({str(name)[:40]!r}); give its path from the table's folder")
    path = posixpath.normpath(name.strip().replace("\\", "/"))
    if path.startswith(("/", "../")) or path == ".." or path[1:3] == ":/":
        raise UsageError(f"{where}: {name} is outside the table's folder; give its path from there, and link or move "
                         "the pictures into it")
    return path


def composed(name: str) -> str:
    """A name whose accents are one character each, as most systems write them; macOS writes two."""
    return unicodedata.normalize("NFC", name)


# Records: (place for messages, column -> value)

Records = tuple[list[str], list[tuple[str, dict[str, Any]]]]


def _records(file: Path, encoding: str, report: Report) -> Records:
    kind = file.suffix.lower()
    if kind == ".parquet":
        return _parquet(file)
    text, where = file_text(file, encoding), printable(file)
    return _json_lines(text, where, report) if kind == ".jsonl" else _cells(text, where, report)


def _json_lines(text: str, where: str, report: Report) -> Records:
    """One object a line; only a line feed ends a line, so that U+2028 in a caption does not."""
    rows: list[tuple[str, dict[str, Any]]] = []
    for n, line in enumerate(text.split("\n"), 1):
        if line.strip():
            with report.setting_aside(ROWS):
                rows.append((f"{where}, line {n}",
                             parsed(line, f"{where}, line {n}", dict, "give one object a line", nan=True)))
    if not rows:
        report.settle()
    return list(dict.fromkeys(name for _, row in rows for name in row)), rows


def _cells(text: str, where: str, report: Report) -> Records:
    """Separated cells; a quoted cell may hold separators and line breaks."""
    separator = _separator(text, where)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows: list[tuple[str, dict[str, Any]]] = []
    try:
        names = [name.strip() for name in next(reader, [])]
        if double := {name for name in names if names.count(name) > 1}:
            raise UsageError(f"{where} has two columns named {double.pop()!r}; rename one")
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(names):
                report.refuse(ROWS, f"{where}, line {reader.line_num}: {len(cells)} cells, the header has "
                                    f'{len(names)}; put a cell that holds {separator!r} into "quotes"')
            else:
                rows.append((f"{where}, line {reader.line_num}", dict(zip(names, cells, strict=True))))
    except csv.Error as error:
        raise UsageError(f"{where}, line {reader.line_num}: {error}; close each quote, and write a quote inside a "
                         'quoted cell twice ("")') from None
    return names, rows


def _separator(text: str, where: str) -> str:
    """The separator in the header by which a picture column is among its names."""
    header = text.split("\n", 1)[0].rstrip("\r")
    split = {mark: [name.strip().strip('"') for name in header.split(mark)] for mark in SEPARATORS}
    several = [mark for mark, names in split.items() if len(names) > 1]
    if len(several) > 1:
        several = [mark for mark in several if set(split[mark]) & set(PICTURES)]
    if len(several) > 1:
        raise UsageError(f"{where}: the header could be separated by {' or '.join(map(repr, several))}; rename its "
                         "columns")
    return several[0] if several else ","


def _parquet(file: Path) -> Records:
    from datasets import Dataset

    try:
        found = Dataset.from_parquet(str(file), keep_in_memory=True)
        names = list(found.column_names)
        rows: Iterable[dict[str, Any]] = found.to_list()
    except Exception as error:  # arrow and datasets raise many kinds
        raise UsageError(f"{printable(file)} is not a readable parquet file ({in_short(error)}); write it again, or "
                         "give a CSV") from None
    return names, [(f"{printable(file)}, row {n}", row) for n, row in enumerate(rows, 1)]
