"""The files below a folder of pictures, and which of them a flag means."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jdm.data.pictures import SUFFIXES
from jdm.data.report import Report
from jdm.data.texts import few, printable
from jdm.errors import UsageError, remedy
from jdm.files import LOCK

SPLITS = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"),
          "test": ("test", "testing", "eval", "evaluation")}  # folders' names, as `datasets` knows them
Stamp = tuple[int, int]  # bytes, and when it was written in ns


def files_below(root: Path, report: Report) -> dict[str, Stamp]:
    """Path from the root, with /, -> its size and time, of every file below it, in order; links are followed.

    Raises:
        UsageError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UsageError(f"{printable(error.filename)}: {error.strerror}; {remedy(error)}") from None

    found: dict[str, Stamp] = {}
    above: dict[str, tuple[tuple[int, int], ...]] = {str(root): (_identity(root),)}  # the way to it
    for here, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        way, at = above.pop(here), "" if here == str(root) else os.path.relpath(here, root) + "/"
        kept = []
        for name in sorted(folders):
            path = os.path.join(here, name)
            if name.startswith(".") or name == "__MACOSX":
                report.leave_out(f"{at}{name}/", "hidden folders")
            elif os.path.lexists(os.path.join(path, LOCK)):
                report.leave_out(f"{at}{name}/", "folders that a run of jdm writes")
            elif (own := _identity(path)) in way:
                report.leave_out(f"{at}{name}/", "links to a folder that they are in")
            else:
                kept.append(name)
                above[path] = (*way, own)
        folders[:] = kept
        for name in names:
            _add(found, os.path.join(here, name), f"{at}{name}", report)
    return dict(sorted(found.items(), key=lambda item: item[0].split("/")))


def _identity(folder: str | Path) -> tuple[int, int]:
    at = os.stat(folder)
    return at.st_dev, at.st_ino


def _add(found: dict[str, Stamp], path: str, name: str, report: Report) -> None:
    if os.path.basename(name).startswith("."):
        report.leave_out(name, "hidden files")
        return
    try:
        at = os.stat(path)
    except OSError:
        report.leave_out(name, "links to nothing")
        return
    if stat.S_ISREG(at.st_mode):
        found[name] = at.st_size, at.st_mtime_ns
    else:
        report.leave_out(name, "pipes, sockets and devices")


@dataclass(frozen=True)
class Choice:
    """The files that a flag means, and what each of them has in common with the others of its picture.

    Attributes:
        value: "" for every file with one of the endings; "*_mask.png", a pattern whose one * stands for that common
            part, or "p???.png", whose ? stand for a character of it each; ".png", an ending; "masks", a folder, which
            is left out of the common part.
        flag: the flag, for messages.
        endings: endings of the files in a folder that is named, or of all where nothing is said.
    """

    value: str
    flag: str
    endings: Iterable[str]

    def __post_init__(self):
        if self.value.count("*") > 1 or (not {"*", "?"} & {*self.value} and "/" in self.value.strip("/")):
            raise UsageError(f"{self.flag} {self.value}: give a pattern with one *, such as '*_mask.png' or "
                             "'masks/*.png', an ending, such as .png, or the name of a folder")

    def key(self, name: str) -> str | None:
        """The common part of a file's path; None for a file that is not meant."""
        value = f"*{self.value}" if self.value.startswith(".") else self.value.rstrip("/")
        if wild := re.search(r"[*?](.*[*?])?", value):
            before, after = value[: wild.start()], value[wild.end() :]
            common = "".join({"*": ".+", "?": "[^/]"}.get(c, re.escape(c)) for c in wild[0])
            whole = re.fullmatch(f"{re.escape(before)}({common}){re.escape(after)}", name, re.DOTALL)
            return whole[1] if whole else None
        if ending_of(name) not in self.endings:
            return None
        parts = stem_of(name).split("/")
        if not value:
            return "/".join(parts)
        if value not in parts[:-1]:
            return None
        parts.remove(value)
        return "/".join(parts)

    def chosen(self, names: Iterable[str]) -> dict[str, str]:
        """Common part -> file, of the files that are meant.

        Raises:
            UsageError: two of them have one common part, as 1.jpg and its mask 1.png have.
        """
        found: dict[str, str] = {}
        for name in names:
            key = self.key(name)
            if key is not None and key in found:
                one, other = (f"*.{each.rsplit('.', 1)[-1]}" for each in (found[key], name))
                raise UsageError(f"{printable(found[key])} and {printable(name)} could both be meant; say which files "
                                 f"are: {self.flag} {printable(one)!r} or {printable(other)!r}")
            if key is not None:
                found[key] = name
        return found


def stem_of(name: str) -> str:
    """A path without its last ending."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + (last.rsplit(".", 1)[0] if "." in last[1:] else last)


def ending_of(name: str) -> str:
    """The last ending of a path, in small letters, with its dot; "" for none."""
    return name[len(stem_of(name)) :].lower()


def split_tops(names: Iterable[str], how: str, root: Path) -> dict[str, str]:
    """Folder at the root -> the split that its name says; none where the folder is not divided so.

    Args:
        names: names of the pictures.
        how: Data.splits.

    Raises:
        UsageError: some folders are named as splits and others are not, or two are named as one split.
    """
    tops = dict.fromkeys(name.partition("/")[0] if "/" in name else "" for name in names)
    named = {top: split for top in tops for split, words in SPLITS.items() if top.lower() in words}
    others = [top or "pictures beside them" for top in tops if top not in named]
    if how == "held-out" or not named:
        return {}
    if others and how != "folders":
        raise UsageError(f"{printable(root)}: {few(map(printable, named))} are named as splits and "
                         f"{few(map(printable, others))} not; say --data.splits folders to read the splits alone, or "
                         "--data.splits held-out to read all as one set, of which some pictures are held out")
    for split in SPLITS:
        if len(same := [top for top, its in named.items() if its == split]) > 1:
            raise UsageError(f"{printable(root)}: {' and '.join(same)} are both named as {split}; merge or rename them")
    return named


PICTURE_ENDINGS = frozenset(SUFFIXES)
