"""A folder of pictures whose captions are in texts beside them or in tables, with control maps of one's own."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from jdm.data.pictures import load_picture, read_all, refuse_other_aspect, sides_of
from jdm.data.report import Report
from jdm.data.split import Pictures, Unread, share_of
from jdm.data.tables import ENDINGS, Row, Table, composed
from jdm.data.texts import few, file_text, printable
from jdm.data.tree import PICTURE_ENDINGS, Choice, ending_of, files_below, split_tops, stem_of
from jdm.errors import UsageError
from jdm.run import Data
from jdm.size import Frame, Size

TEXTS = frozenset((".txt", ".caption"))
OTHER_FORMATS = (".heic", ".heif", ".svg", ".psd", ".exr", ".hdr", ".jxl", ".cr2", ".nef", ".dng", ".ico", ".eps",
                 ".pdf")
NO_CAPTION = "pictures without a caption"
CONTROL_REMEDY = "--data.controls NAME reads control maps"


@dataclass(frozen=True)
class Entry:
    """A picture's path from the source's folder, its captions, and the path of its control map or ""."""

    name: str
    captions: tuple[str, ...]
    control: str = ""


def folder_pictures(folder: Path, split: str, size: Size, how: Data) -> Pictures:
    """A split of a folder: its own sub-folder where there is one, else pictures that are held out of training's.

    Raises:
        UsageError: what is a picture, a caption or a split is ambiguous or missing; or something cannot be read.
    """
    found = Found(folder, how)
    entries, stamps, root = found.entries(split), found.files, str(folder)

    def paths(rows: torch.Tensor) -> list[str]:
        return [os.path.join(root, entries[i].name) for i in rows.tolist()]

    def images(rows: torch.Tensor, frames: Sequence[Frame] | None = None) -> torch.Tensor:
        return read_all(load_picture, paths(rows), frames or [size] * len(rows))

    def maps(rows: torch.Tensor, frames: Sequence[Frame] | None = None) -> torch.Tensor:
        drawn = [os.path.join(root, entries[i].control) for i in rows.tolist()]
        return read_all(_map, drawn, paths(rows), frames or [size] * len(rows))

    def used(rows: torch.Tensor) -> list[str]:
        return [name for i in rows.tolist() for name in (entries[i].name, entries[i].control) if name]

    return Pictures(
        images=images,
        captions=tuple(entry.captions for entry in entries),
        labels=None,
        indices=torch.arange(len(entries)),
        size=size,
        source=f"{printable(folder.name)}/{split}",
        files=lambda rows: [folder / name for name in used(rows)],
        slow=True,
        controls=maps if how.controls else None,
        report=found.report,
        unread=Unread(how.unreadable),
        stamps=lambda rows: [(printable(name), *stamps[name]) for name in used(rows)],
        name_of=lambda i: printable(os.path.join(root, entries[i].name)),
        sides=lambda rows: sides_of([Path(path) for path in paths(rows)]),
    )


def _map(file: str, picture: str, size: Size | Frame) -> torch.Tensor:
    refuse_other_aspect(Path(file), Path(picture), printable(file))
    return load_picture(file, size)


class Found:
    """The files of a folder, sorted into pictures, captions, tables and control maps; the rest goes to the report."""

    def __init__(self, folder: Path, how: Data):
        self.folder, self.how, self.report = folder, how, Report(printable(folder))
        self.files = files_below(folder, self.report)
        self._spelled = {composed(name): name for name in self.files}
        self.tables: dict[str, Table] = {}  # by folder, with a / at its end
        self.rows: dict[str, Row] = {}  # by picture; of the nearest table above it
        self._read_tables()
        self.choice = Choice("" if self.tables else how.pictures, "--data.pictures", PICTURE_ENDINGS)
        self.controls = self._control_files()
        self.used = {str(table.file.relative_to(folder)) for table in self.tables.values()}

    def entries(self, split: str) -> list[Entry]:
        """The pictures of a split, in order."""
        free = [name for name in self.files if name not in self.controls.values()]
        names = [name for name in free
                 if name in self.rows or (self._table(name) is None and self.choice.key(name) is not None)]
        tops = split_tops(names, self.how.splits, self.folder)
        top, absent = self._folder_of(split, tops)
        entries = self._captioned([name for name in names if name.startswith(top)])
        self._rest(name for name in free if name.startswith(top))
        if not entries:
            self.report.settle()
            said = "; ".join(self.report.lines())
            raise UsageError(f"{self.report.source}/{top}: no pictures ({', '.join(sorted(PICTURE_ENDINGS))})"
                             f"{f'; {said}' if said else ''}; is this the right folder?")
        if split != "train" and split not in absent:
            self.report.splits[split] = len(entries)
            return entries
        of = share_of(len(entries), absent, self.report)
        self.report.splits |= {part: of.count(part) for part in ("train", *absent)}
        return [entry for entry, part in zip(entries, of, strict=True) if part == split]

    def _folder_of(self, split: str, tops: Mapping[str, str]) -> tuple[str, list[str]]:
        """(the folder that a split is read from, the splits that are held out of training's)."""
        own = {its: f"{top}/" for top, its in tops.items()}
        absent = [name for name in ("validation", "test") if name not in own]
        if split in own:
            return own[split], absent
        if tops and "train" not in own:
            raise UsageError(f"{self.report.source} has the folders {few(map(printable, tops))} and none for training; "
                             "add train, or give --data.splits held-out to read all as one set")
        return own.get("train", ""), absent

    # Captions and maps of the pictures

    def _captioned(self, names: list[str]) -> list[Entry]:
        """The pictures with their captions and control maps; without a map they are left out."""
        keys = {name: key for key, name in self.choice.chosen(n for n in names if n not in self.rows).items()}
        column = bool(self.tables) and not any(mark in self.how.captions for mark in "*.")
        beside = Choice("" if column else self.how.captions, "--data.captions", TEXTS)
        texts = replace(beside, value=beside.value or ".txt").chosen(self.files) if keys else {}
        entries, mute = [], []
        for name in names:
            row, key = self.rows.get(name), keys.get(name, stem_of(name))
            captions = row.captions if row else self._beside(texts.get(stem_of(name)) or texts.get(key))
            control = (row and row.control) or self.controls.get(key, "")
            self.used |= {name, control}
            if captions is None:
                continue
            if self.how.controls and control not in self.files:
                self.report.leave_out(name, "pictures without a control map")
            elif captions:
                entries.append(Entry(name, captions, control))
            else:
                mute.append(name)
        if mute:
            self.report.refuse(NO_CAPTION, self._no_caption(mute[0], len(mute), len(names)), len(mute))
        return entries

    def _beside(self, file: str | None) -> tuple[str, ...] | None:
        """The caption in a text file, which is one however many lines it has; None if its text is refused."""
        if file is None:
            return ()
        self.used.add(file)
        with self.report.setting_aside("captions that cannot be read"):
            text = file_text(self.folder / file, self.how.encoding).strip()
            return (text,) if text else ()
        return None

    def _no_caption(self, name: str, count: int, n: int) -> str:
        path, stem = printable(self.folder / name), stem_of(name)
        many = f" (nor have {count - 1:,} more of {n:,} pictures)" if count > 1 else ""
        if name in self.rows:
            return f"{path} has no caption in {self.rows[name].where}{many}; write one, or remove the row"
        beside = printable(stem.rpartition("/")[2])
        there = f" ({beside}.caption is there: --data.captions .caption)" if f"{stem}.caption" in self.files else ""
        return (f"{path} has no caption{many}; put it into {beside}.txt beside it{there}, or into a CSV or JSONL file "
                "with the columns file_name and text; where it is no picture to train on, say which files are, such as "
                f"--data.pictures '*.jpg'; {CONTROL_REMEDY}")

    def _control_files(self) -> dict[str, str]:
        """Common part -> control map, where --data.controls means files and no column of a table."""
        if not self.how.controls or any(row.control for row in self.rows.values()):
            return {}
        maps = Choice(self.how.controls, "--data.controls", PICTURE_ENDINGS)
        found = maps.chosen(name for name in self.files if name not in self.rows)
        if not found:
            raise UsageError(f"{self.report.source}: --data.controls {self.how.controls} matches neither a file nor a "
                             "column; give a column of the table, a folder of maps, or a pattern such as '*_canny.png'")
        return found

    def _rest(self, names: Iterable[str]) -> None:
        """Reports every file that is not used."""
        for name in names:
            ending, table = ending_of(name), self._table(name)
            if name in self.used:
                continue
            if ending in PICTURE_ENDINGS and table is not None:
                self.report.leave_out(name, f"pictures that {table.file.name} does not list", CONTROL_REMEDY)
            elif ending in PICTURE_ENDINGS:
                self.report.leave_out(name, f"pictures that --data.pictures {self.how.pictures} does not mean",
                                      CONTROL_REMEDY)
            elif ending in OTHER_FORMATS:
                self.report.leave_out(name, "files of a picture format that is not read", "save them as PNG or JPEG")
            elif ending in TEXTS:
                self.report.leave_out(name, "texts that are no picture's caption")
            else:
                self.report.leave_out(name, "files that are neither picture, caption nor table")

    # Tables: of two that list a picture, the nearer one counts

    def _read_tables(self) -> None:
        columns = (self.how.pictures, self.how.captions, self.how.controls)
        for at, name in sorted(self._table_files().items()):
            table = self.tables[at] = Table.read(self.folder / name, columns, self.how.encoding, self.report)
            there = {row: found for row in table.rows if (found := self._file(f"{at}{row}"))}
            if not there:
                self.report.settle()
                raise self._no_files(table)
            for row, found in table.rows.items():
                if row not in there:
                    self.report.leave_out(f"{found.where}: {row}", "rows whose file is not there")
                else:
                    control = found.control and (self._file(f"{at}{found.control}") or found.control)
                    self.rows[there[row]] = replace(found, control=control)

    def _table_files(self) -> dict[str, str]:
        """Folder -> table in it: any table at the top, and metadata.* below it."""
        if self.how.table == "none":
            return {}
        if self.how.table:
            if self.how.table not in self.files:
                raise UsageError(f"{self.report.source}: there is no {self.how.table}; give --data.table a file's path "
                                 "from there")
            return {self.how.table[: self.how.table.rfind("/") + 1]: self.how.table}
        found: dict[str, list[str]] = {}
        for name in self.files:
            at = name[: name.rfind("/") + 1]
            if ending_of(name) in ENDINGS and (not at or stem_of(name) == f"{at}metadata"):
                found.setdefault(at, []).append(name)
        for at, names in found.items():
            if len(names) > 1:
                raise UsageError(f"{self.report.source}/{at} holds {len(names)} tables "
                                 f"({few(map(printable, names), 2)}); keep one, or name it: --data.table "
                                 f"{printable(names[0])}")
        return {at: names[0] for at, names in found.items()}

    def _no_files(self, table: Table) -> UsageError:
        name, row = next(iter(table.rows.items()))
        last = stem_of(name).rpartition("/")[2]
        near = [printable(file) for file in self.files if ending_of(file) in PICTURE_ENDINGS
                and stem_of(file).rpartition("/")[2] == last]
        hint = f"did you mean {near[0]}?" if near else "give each file's path from the table's folder"
        return UsageError(f"{row.where}: there is no {name}, nor any other file that the table lists; {hint}")

    def _file(self, name: str) -> str | None:
        """The file of that name, however its accents are written."""
        return name if name in self.files else self._spelled.get(composed(name))

    def _table(self, name: str) -> Table | None:
        """The table of the nearest folder above a file."""
        above = [at for at in self.tables if name.startswith(at)]
        return self.tables[max(above, key=len)] if above else None
