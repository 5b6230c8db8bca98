"""The files of one sample of a shard: which is the picture, which are its captions and its control map."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from jdm.data.pictures import SUFFIXES
from jdm.data.tables import CAPTIONS, column
from jdm.data.texts import captions_of, few, unicode_of
from jdm.errors import UsageError
from jdm.run import Data

TEXTS = (".txt", ".json")
Left = dict[str, list[Any]]


class SampleError(UsageError):
    """A part of a sample is ambiguous, missing, or not text; the caller adds the shard's name."""


def hidden(name: str, left: Left) -> bool:
    """Leaves out a file that its system hides, such as ._1.jpg, which macOS packs beside 1.jpg."""
    found = any(part.startswith(".") and part.strip(".") for part in name.split("/")) or name.startswith("__MACOSX/")
    if found:
        leave(left, "hidden files", name)
    return found


def leave(left: Left, rule: str, name: str) -> None:
    """Counts a file under the rule that leaves it out."""
    left.setdefault(rule, [name, 0])[1] += 1


def sample_key(name: str) -> str:
    """The path up to the first dot of the name, which the files of one sample share in WebDataset's layout."""
    path = PurePosixPath(name)
    return str(path.parent / path.name.split(".")[0])


def samples(tar: tarfile.TarFile, key: str, files: Sequence[tarfile.TarInfo], asked: Data,
            left: Left) -> Iterator[dict[str, Any]]:
    """The samples among adjacent files with one key: one, or several whose names differ behind a first dot.

    Args:
        asked: its flags name a sample's files by endings such as jpg and canny.png, or the key of a .json.
        left: rule -> [a file that it left out, how many]; added to.

    Raises:
        SampleError: it cannot be said which file is the picture, or it has no caption.
    """
    stem = PurePosixPath(key).name
    by_ending: dict[str, tarfile.TarInfo] = {}
    for file in files:
        ending = PurePosixPath(file.name).name[len(stem) + 1 :].lower()
        if ending in by_ending:
            raise SampleError(f"{file.name} appears twice; write the shard again with each file once")
        by_ending[ending] = file
    for middle, parts in _apart(by_ending, asked).items():
        if (found := _sample(tar, f"{key}{middle and '.'}{middle}", parts, asked, left)) is not None:
            yield found


def _apart(by_ending: Mapping[str, tarfile.TarInfo], asked: Data) -> dict[str, dict[str, tarfile.TarInfo]]:
    """Text between key and ending -> files by ending; one sample unless each of several has its own caption.

    "shoe_v1.0.jpg", "shoe_v1.0.txt", "shoe_v1.1.jpg", "shoe_v1.1.txt" are two samples of one key.
    """
    parted: dict[str, dict[str, tarfile.TarInfo]] = {}
    for ending, file in by_ending.items():
        middle, _, last = ending.rpartition(".")
        parted.setdefault(middle, {})[last] = file
    whole = [any(f".{e}" in SUFFIXES for e in parts) and any(f".{e}" in TEXTS for e in parts)
             for parts in parted.values()]
    if len(parted) == 1 or asked.pictures or not all(whole):
        return {"": dict(by_ending)}
    if "" in parted:
        names = [file.name for file in by_ending.values()]
        ending = next(e for e in parted[""] if f".{e}" in SUFFIXES)
        raise SampleError(f"{few(names, 6)} could be one sample or several; say which ending the picture has: "
                          f"--data.pictures {ending}, or put no dot into their names")
    return parted


def _sample(tar: tarfile.TarFile, key: str, files: dict[str, tarfile.TarInfo], asked: Data,
            left: Left) -> dict[str, Any] | None:
    pictures = {e: file for e, file in files.items() if f".{e.rpartition('.')[2]}" in SUFFIXES}
    drawn = pictures.pop(asked.controls.lstrip(".").lower(), None) if asked.controls else None
    ending = _picture(pictures, asked)
    if ending is None:  # its download failed when the shard was written; only the text remains
        leave(left, "samples without a picture" + (f" .{asked.pictures.lstrip('.')}" if asked.pictures else ""),
               next(iter(files.values())).name)
        return None
    if asked.controls and drawn is None:
        leave(left, "samples without a control map", pictures[ending].name)
        return None
    said, captions = _captions(tar, key, files, ending, asked)
    for other, file in files.items():
        if other not in (ending, *said) and file is not drawn:
            kind = "further pictures of a sample" if other in pictures else "files of a sample"
            more = ", which --data.controls reads as control maps" if other in pictures else " that are not read"
            leave(left, f"{kind} (.{other}){more}", file.name)
    picture = pictures[ending]
    return {"start": picture.offset_data, "bytes": picture.size, "name": picture.name, "captions": captions,
            "map_start": drawn.offset_data if drawn else 0, "map_bytes": drawn.size if drawn else 0}


def _picture(pictures: Mapping[str, tarfile.TarInfo], asked: Data) -> str | None:
    """The ending of the picture: the one that was named, the only one, or the only one without a dot in it."""
    if asked.pictures:
        wanted = asked.pictures.lstrip(".").lower()
        return wanted if wanted in pictures else None
    plain = [ending for ending in pictures if "." not in ending]
    found = plain or list(pictures)
    if len(found) > 1:
        names = [file.name for file in pictures.values()]
        raise SampleError(f"{' and '.join(names[:3])} could both be the picture; say which: --data.pictures {found[0]}")
    return found[0] if found else None


def _captions(tar: tarfile.TarFile, key: str, files: Mapping[str, tarfile.TarInfo], picture: str,
              asked: Data) -> tuple[list[str], list[str]]:
    """(the endings that were read, the captions) of a sample.

    The text is that of the ending or of the .json's key that was named; else .txt, or .json where that has none. A
    picture v2.large.png has its text in v2.large.txt, v2.txt or .txt.
    """
    parts, stated = picture.split(".")[:-1], asked.captions.lstrip(".").lower()
    if stated in files:
        found = _read(tar, files[stated], stated, "", asked)
        return _needed([stated], found, key, files[picture])
    read: list[str] = []
    for kind in TEXTS if not stated else TEXTS[1:]:
        own = [e for k in range(len(parts), -1, -1) if (e := ".".join((*parts[:k], kind[1:]))) in files]
        if not own:
            continue
        ending = own[0]
        read.append(ending)
        if found := _read(tar, files[ending], ending, asked.captions, asked):
            return read, found
    return _needed(read, [], key, files[picture])


def _needed(read: list[str], found: list[str], key: str, picture: tarfile.TarInfo) -> tuple[list[str], list[str]]:
    if not found:
        name = PurePosixPath(key).name
        raise SampleError(f"{picture.name} has no caption; put {name}.txt beside it, or a {name}.json with a caption "
                          "or captions, next to it in the shard; or name its ending: --data.captions ENDING")
    return read, found


def _read(tar: tarfile.TarFile, file: tarfile.TarInfo, ending: str, named: str, asked: Data) -> list[str]:
    opened = tar.extractfile(file)
    assert opened is not None
    try:
        text = unicode_of(opened.read(), file.name, asked.encoding)
        if not ending.endswith("json"):
            return [text.strip()] if text.strip() else []
        return list(_in_json(text, file.name, named))
    except SampleError:
        raise
    except UsageError as error:
        raise SampleError(str(error)) from None


def _in_json(text: str, where: str, named: str) -> tuple[str, ...]:
    """The captions in an object: of the key that was named, or of the only usual one."""
    try:
        found = json.loads(text)
        json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair could be neither printed nor stored
    except (ValueError, RecursionError) as error:
        raise SampleError(f"{where} is not JSON ({str(error)[:80]}); write it again, or leave it out") from None
    if not isinstance(found, dict):
        raise SampleError(f"{where} is not a JSON object; write one, with a caption or captions in it")
    keys = [named] if named else [k for k in found if k in CAPTIONS]
    filled = {k: captions for k in keys if (captions := captions_of(found.get(k), f"{where}, {k}"))}
    if len(set(filled.values())) > 1 and "captions" not in filled:
        column(list(filled), "", CAPTIONS, "--data.captions", where)
    return filled.get("captions") or next(iter(filled.values()), ())
