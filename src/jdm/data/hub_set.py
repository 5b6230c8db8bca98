"""A data set of the Hugging Face hub: its splits, columns and captions."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jdm.data.pictures import (
    UnreadableError,
    decoded,
    load_picture,
    read_all,
    read_picture,
    refuse_other_aspect,
    sides_of,
)
from jdm.data.report import Report
from jdm.data.split import Pictures, Unread
from jdm.data.tables import CAPTIONS, column
from jdm.data.texts import MISSING, captions_of
from jdm.data.tree import SPLITS
from jdm.errors import UsageError, in_short
from jdm.models import hub
from jdm.run import Data
from jdm.size import Frame, Size

HELD_OUT = 5000  # at most so many training pictures, and at most a tenth, stand for a split that a set lacks
PICTURES = ("image", "img", "picture")
TEMPLATES = ("{}", "a {}", "a photo of a {}", "a picture of a {}", "a grey photo of a {}",
             "a product photo of a {}", "a {} on a black background", "one {}")


def hub_pictures(name: str, split: str, size: Size, how: Data) -> Pictures:
    """A split of a hub data set; one that it lacks is held out of its training pictures.

    Raises:
        UsageError: the hub cannot be asked, there is no such set, or its columns are ambiguous or not captions.
    """
    report = Report(name)
    whole, first, last = _split(name, split, report)
    picture, text, drawn = _columns(whole, name, how, report)
    whole = _undecoded(whole, picture, drawn)
    labels, captions = (None, _texts(whole, text, name)) if text else _labels(whole, name)
    said = [bool(row) for row in captions] if labels is None else (labels >= 0).tolist()
    for row in range(first, last):
        if not said[row]:
            report.leave_out(f"row {row}", "rows without a caption")

    def images(rows: Tensor, frames: Sequence[Frame] | None = None) -> Tensor:
        return read_all(partial(_picture, name), whole[rows.tolist()][picture], frames or [size] * len(rows))

    def maps(rows: Tensor, frames: Sequence[Frame] | None = None) -> Tensor:
        chosen = whole[rows.tolist()]
        return read_all(partial(_map, name, drawn), chosen[drawn], chosen[picture], frames or [size] * len(rows))

    return Pictures(
        images=images,
        captions=tuple(captions),
        labels=labels,
        indices=torch.tensor([row for row in range(first, last) if said[row]], dtype=torch.long),
        size=size,
        source=f"{name}/{split}",
        files=lambda rows: [Path(part["filename"]) for part in whole.cache_files],
        slow=True,
        controls=maps if drawn else None,
        report=report,
        unread=Unread(how.unreadable),
        stamps=lambda rows: [(str(whole._fingerprint), len(rows), 0)],
        name_of=lambda i: f"{name}, row {i}",
        sides=lambda rows: _sides(whole[rows.tolist()][picture]),
    )


def _columns(whole: Any, name: str, how: Data, report: Report) -> tuple[str, str, str]:
    """The columns of pictures, captions and control maps; captions "" where labels name classes, maps "" for none."""
    columns = list(whole.features)
    images = [k for k in columns if k in PICTURES] or \
        [k for k in columns if type(whole.features[k]).__name__ == "Image"]
    picture = column(columns, how.pictures, images, "--data.pictures", name) if images or how.pictures else ""
    described = bool(how.captions) or any(k in columns for k in CAPTIONS)
    if not picture or not (described or "label" in columns):
        raise UsageError(f"{name}: needs an image column and a text or label column, has {columns}; name them with "
                         "--data.pictures and --data.captions")
    text = column(columns, how.captions, CAPTIONS, "--data.captions", name) if described else ""
    drawn = column(columns, how.controls, (), "--data.controls", name) if how.controls else ""
    for other in columns:
        if other not in (picture, text or "label", drawn):
            report.leave_out(other, "columns that are not read", "--data.controls NAME reads one as control maps")
    return picture, text, drawn


def _split(name: str, split: str, report: Report) -> tuple[Any, int, int]:
    """(rows of a data set, first, last + 1): its own split, or the part of its training pictures that stands for it."""
    if split != "train" and (own := _loaded(name, split)) is not None:
        report.splits[split] = len(own)
        return own, 0, len(own)
    whole = _loaded(name, "train")
    if whole is None:
        raise UsageError(f"{name} has no train split; give a data set that has one")
    absent = [other for other in ("validation", "test") if other == split or _loaded(name, other) is None]
    end, places = len(whole), {}
    for other in absent:  # validation from the end, the test before it
        n = min(HELD_OUT, len(whole) // 10)
        places[other], end = (end - n, end), end - n
        report.note(f"{name} has no {other} split: {n:,} of its {len(whole):,} training pictures are held out for it")
    places["train"] = 0, end
    report.splits |= {part: b - a for part, (a, b) in places.items()}
    return whole, *places[split]


def _loaded(name: str, split: str) -> Any:
    """The rows of a split by any of its names; None where the set has others alone.

    Raises:
        UsageError: the set cannot be loaded.
    """
    from datasets import load_dataset

    wanted, why = split, hub.unfetched(name)  # asked first: what is not there is then not tried again and again
    while True:
        try:
            return load_dataset(name, split=wanted)
        except Exception as error:
            known = re.findall(r"'([^']+)'", str(error).partition("Should be one of")[2])
            other = [one for one in known if one in SPLITS[split]]
            if "Unknown split" in str(error) and known and wanted not in known and not other:
                return None
            if other and other[0] != wanted:
                wanted = other[0]
                continue
            raise UsageError(f"{name!r} is neither fashion-mnist, a folder, nor a dataset that could be loaded "
                             f"({in_short(error)}); {why or 'check its name, or log in with: hf auth login'}") from None


def _undecoded(whole: Any, *columns: str) -> Any:
    """The rows with their pictures as bytes: this package opens them, as datasets would open any format."""
    from datasets import Image

    for name in columns:
        if name and isinstance(whole.features[name], Image):
            whole = whole.cast_column(name, Image(decode=False))
    return whole


def _texts(whole: Any, text: str, name: str) -> list[tuple[str, ...]]:
    """The captions of each row; none where it says nan or the like, which nobody here can mend."""
    found = []
    for i, value in enumerate(whole[text]):
        said = [one for one in (value if isinstance(value, list) else [value])
                if not (isinstance(one, str) and one.strip().lower() in MISSING)]
        found.append(tuple(dict.fromkeys(captions_of(said, f"{name}, row {i}"))))
    return found


def _labels(whole: Any, name: str) -> tuple[Tensor, list[tuple[str, ...]]]:
    """The class of each row, -1 where it has none, and the captions of each class."""
    names = getattr(whole.features["label"], "names", None)
    if not names:
        raise UsageError(f"{name}: its labels have no names ({whole.features['label']}); name a column of captions "
                         "with --data.captions")
    labels = torch.tensor([-1 if label is None else label for label in whole["label"]])
    return labels, [tuple(phrase(t, n.lower()) for t in TEMPLATES) for n in names]


def phrase(template: str, noun: str) -> str:
    """A caption of a class, with "an" where the noun asks for it."""
    return re.sub(r"\ba ([aeiou])", r"an \1", template.format(noun))


def _map(name: str, drawn: str, file: Any, picture: Any, size: Size | Frame) -> Tensor:
    """A control map from the column `drawn`, of the same proportions as its picture."""
    files = _opened(file), _opened(picture)
    if files[0] and files[1]:
        refuse_other_aspect(files[0], files[1], f"{name}: a map in {drawn}")
    return _picture(name, file, size)


def _sides(files: list[Any]) -> list[tuple[int, int]]:
    """(width, height) of the pictures in a column."""
    return [sides_of([opened])[0] if (opened := _opened(file)) else file.size for file in files]


def _opened(file: Any) -> io.BytesIO | Path | None:
    if not isinstance(file, dict):
        return None
    return Path(file["path"]) if file["bytes"] is None else io.BytesIO(file["bytes"])


def _picture(name: str, file: Any, size: Size | Frame) -> Tensor:
    """A picture of a hub data set, which holds its bytes, its path, or an open picture."""
    if file is None:
        raise UnreadableError(f"{name}: a row has no picture; remove it")
    if not isinstance(file, dict):
        return decoded(file, size, name)
    if file["bytes"] is None:
        return load_picture(file["path"], size)
    return read_picture(io.BytesIO(file["bytes"]), f"{name}: {file['path'] or 'a picture'}", len(file["bytes"]), size)
