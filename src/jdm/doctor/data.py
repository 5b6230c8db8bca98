"""Examines a source of pictures for `jdm doctor`: what is there, what training refuses, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from jdm.controls.base import control_of
from jdm.data.buckets import Buckets
from jdm.data.cache import distinct
from jdm.data.pictures import UnreadableError
from jdm.data.texts import few
from jdm.doctor.reading import Progress, Reader, Seen, seen
from jdm.errors import UsageError, in_short, plural
from jdm.loading import MOST_PROMPTS
from jdm.run import Run
from jdm.size import height_width, spelled
from jdm.space import from_bytes, unit

SHEET = 24  # pictures that are shown
CUT = 1 / 3  # of a picture's area, from which on its crop is worth a remark
SHOWN = 5  # messages of one kind


@dataclass(frozen=True)
class Picture:
    """A picture of the sheet: uint8 [3, H, W], its control map likewise or None, its captions, its name."""

    image: Tensor
    drawn: Tensor | None
    captions: tuple[str, ...]
    name: str


@dataclass
class Findings:
    """Everything that `jdm doctor` found.

    Attributes:
        splits: heads of the table's columns.
        rows: of the table: what is counted, then a cell for each split.
        refused: kind -> (how many, the first messages), for each kind of thing that training refuses.
        remarks: sentences on what training accepts and a person may not want, each with what to do.
        sheet: pictures of the training split.
    """

    splits: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    refused: dict[str, tuple[int, list[str]]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    sheet: list[Picture] = field(default_factory=list)

    def refuse(self, kind: str, message: str, count: int = 1) -> None:
        """Adds what training refuses; a message that is there already counts once."""
        known, messages = self.refused.get(kind, (0, []))
        if message not in messages:
            self.refused[kind] = known + count, [*messages, message]

    @contextmanager
    def refusing(self, kind: str) -> Iterator[None]:
        """Returns a context manager; a UsageError inside it is refused as that kind, and the block ends there."""
        try:
            yield
        except UsageError as error:
            self.refuse(kind, str(error))

    def lines(self) -> list[str]:
        """Lists what training refuses, then the remarks, in lines of text."""
        found = []
        for kind, (count, messages) in self.refused.items():
            found += [f"refused, {count:,} {kind}:" if count > 1 else f"refused, {kind}:"]
            found += [f"  {message}" for message in messages[:SHOWN]]
            found += [f"  and {len(messages) - SHOWN:,} more of them"] * (len(messages) > SHOWN)
        return [*found, *self.remarks]


def examined(run: Run, progress: Progress) -> Findings:
    """Reads every split of a run's pictures once, and what training would read beside them.

    Raises:
        UsageError: there is no such source.
    """
    found, run = Findings(), replace(run, device="cpu", data=replace(run.data, prepared=""))
    reader = None
    with found.refusing("settings that do not go together"):
        reader = Reader(run)
    if reader is None:
        return found
    splits: dict[str, Seen] = {}
    for title, split in {"train": run.data.split, "validation": run.data.validation, "test": "test"}.items():
        try:
            pictures = reader.split(split)
            splits[title] = seen(pictures, title, progress)
        except UsageError as error:
            if not splits and not Path(run.data.source).exists() and not run.data.source.endswith(".tar"):
                raise
            found.refuse("what the pictures are", str(error))
            continue
        if title == "train" and not len(pictures) and not pictures.report.refused:
            found.refuse("what the pictures are", f"{run.data.source}, split {split}: no pictures; give a wider slice "
                         "or more pictures")
        for kind, refused in pictures.report.refused.items():
            for message in refused.first:
                found.refuse(kind, message, refused.count if len(refused.first) == 1 else 1)
    if splits:
        _count(found, splits, run)
        _remark(found, splits, run)
    if "train" in splits:
        _check(found, reader, splits["train"])
    return found


# The table


def _count(found: Findings, splits: dict[str, Seen], run: Run) -> None:
    found.splits = list(splits)
    rows: dict[str, Callable[[Seen], str]] = {
        "pictures": lambda s: f"{len(s.pictures):,}",
        "cannot be read": lambda s: f"{len(s.unreadable):,}",
        "the same as another": lambda s: f"{sum(len(group) - 1 for group in s.doubled):,}",
        "of one colour": lambda s: f"{len(s.plain):,}",
        "different captions": lambda s: f"{len(s.captions):,}",
        "shorter side, pixels": _sides,
        "width : height": lambda s: ", ".join(f"{name} {count / len(s.sides):.0%}"
                                              for name, count in s.aspects().most_common(3)),
    }
    found.rows = [[name, *(of(each) for each in splits.values())] for name, of in rows.items()]
    others = [""] * (len(splits) - 1)
    if run.data.buckets and "train" in splits and splits["train"].sides:  # what is measured on has `size`
        buckets = Buckets(splits["train"].sides, run.data.size, run.data.buckets)
        found.rows += [[f"bucket {spelled(size)}", f"{n:,}", *others]
                       for size, n in zip(buckets.sizes, buckets.counts.tolist(), strict=True)]
    mute = sum(count for kind, (count, _) in found.refused.items() if "without a caption" in kind)
    found.rows.insert(1, ["without a caption", f"{mute:,}", *others])


def _sides(split: Seen) -> str:
    shorter = [min(sides) for sides in split.sides]
    if not shorter:
        return ""
    low, high = min(shorter), max(shorter)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}, median {median(shorter):,.0f}"


# What is worth a remark


def _remark(found: Findings, splits: dict[str, Seen], run: Run) -> None:
    for title, split in splits.items():
        n = len(split.pictures)
        found.remarks += [line for line in split.pictures.report.lines() if line not in found.remarks]
        if split.unreadable:
            _remark_unreadable(found, split, title)
        if more := sum(len(group) - 1 for group in split.doubled):
            found.remarks.append(f"same as another at {spelled(run.data.size)}: {more:,} of {n:,} {title} pictures, "
                                 f"such as {_named(split, split.doubled[0])}; remove all but one, or each counts as "
                                 "often as it is there")
        if split.plain:
            found.remarks.append(f"of one colour all over: {len(split.plain):,} of {n:,} {title} pictures, such as "
                                 f"{_named(split, split.plain)}; remove what was not meant so")
    train = splits.get("train")
    if train is None:
        return
    for title, split in splits.items():
        shared = [digest for digest in split.contents if digest in train.contents and not _same(split, train)]
        if title != "train" and shared:
            here, there = (_named(each, each.contents[shared[0]]) for each in (split, train))
            found.remarks.append(f"training pictures too: {len(shared):,} {title} pictures, such as {here}, the same "
                                 f"as {there}; remove them from one of both, or measurements flatter the model")
    _remark_shapes(found, train, run)
    if len(train.pictures) > 1 and len(train.captions) == 1:
        found.remarks.append(f"all train pictures have the caption {next(iter(train.captions))[:60]!r}, from which the "
                             "model learns nothing of prompts; describe each picture")


def _same(a: Seen, b: Seen) -> bool:
    return bool(torch.isin(a.pictures.indices, b.pictures.indices).any()) and a.pictures.source == b.pictures.source


def _remark_unreadable(found: Findings, split: Seen, title: str) -> None:
    reasons, n = list(split.unreadable.values()), len(split.pictures)
    try:
        split.pictures.unread.note(split.unreadable, n)
    except UnreadableError as error:
        found.refuse("pictures that cannot be read", str(error), len(reasons))
        return
    found.remarks.append(f"cannot be read, so that another takes its place: {len(reasons):,} of {n:,} {title} "
                         f"pictures: {few(reasons, SHOWN)}")


def _remark_shapes(found: Findings, train: Seen, run: Run) -> None:
    n, targets, to = len(train.sides), [height_width(run.data.size)] * len(train.sides), spelled(run.data.size)
    if run.data.buckets and n:
        buckets, to = Buckets(train.sides, run.data.size, run.data.buckets), "its bucket"
        targets = [height_width(buckets.sizes[k]) for k in buckets.of.tolist()]
        found.remarks += [said] if (said := buckets.small(run.batch)) else []
    each = [(*sides, *target) for sides, target in zip(train.sides, targets, strict=True)]
    if small := sum(across < width or down < height for across, down, height, width in each):
        found.remarks.append(f"smaller than {to}, so that they are enlarged and blurred: {small:,} "
                             f"of {n:,} train pictures; remove them, or lower --data.size")
    cut = [1 - min(across * height, down * width) / max(across * height, down * width)
           for across, down, height, width in each]
    if much := sum(share > CUT for share in cut):
        remedy = "" if run.data.buckets else ", give --data.size HEIGHT WIDTH of their usual shape, or --data.buckets"
        found.remarks.append(f"more than a third of the area is lost to the crop to {to} (height x "
                             f"width): {much:,} of {n:,} train pictures, at most {max(cut):.0%}; crop them "
                             f"yourself{remedy}")


def _named(split: Seen, indices: Sequence[int]) -> str:
    return few([split.pictures.name_of(index) for index in indices])


# What training reads beside the pictures


def _check(found: Findings, reader: Reader, train: Seen) -> None:
    """Adds what the recipe's models and control make of the pictures, and the sheet."""
    captions = distinct(train.pictures)[:MOST_PROMPTS] if len(train.pictures) else []
    for role in reader.needs.prompts:
        with found.refusing("models that cannot be used"):
            if reader.has(role):
                reader.model(role).latent_shape(1, reader.run.data.size)
                cut = reader.text(role).overlong(captions)
                found.rows.append([f"captions too long for {reader.needs.models[role]}", f"{len(cut):,}",
                                   *[""] * (len(found.splits) - 1)])
                _remark_cut(found, cut, reader.needs.models[role])
    with found.refusing("the control"):
        rows = torch.tensor(train.sound, dtype=torch.long)
        chosen = rows[torch.linspace(0, len(rows) - 1, min(SHEET, len(rows))).round().long()]
        found.sheet = _sheet(reader, train, chosen)


def _remark_cut(found: Findings, cut: dict[str, str], model: str) -> None:
    if cut:
        caption, lost = next(iter(cut.items()))
        found.remarks.append(f"too long for the text encoder of {model}, so that their ends are cut: "
                             f"{plural(len(cut), 'caption')}; of {caption[:40]!r}... it does not read {lost[:60]!r}; "
                             "shorten them, or put what matters first")


@torch.no_grad()
def _sheet(reader: Reader, train: Seen, rows: Tensor) -> list[Picture]:
    pictures, control = train.pictures, reader.control
    if not len(rows):
        return []
    images, maps, drawn = pictures.batch(rows), pictures.maps(rows), None
    if control is not None:
        try:
            drawn = control.image(control_of(control, unit(from_bytes(images)), maps))
        except Exception as error:  # a user's control may raise anything
            raise UsageError(f"{reader.needs.control} failed on the source's own pictures ({in_short(error)}); it must "
                             "take [B, 3, H, W] in [0, 1]") from error
        drawn = (drawn * 255).round().clamp(0, 255).to(torch.uint8)
    return [Picture(images[i], None if drawn is None else drawn[i], pictures.captions[key], pictures.name_of(index))
            for i, (key, index) in enumerate(zip(pictures.keys(rows).tolist(), pictures.indices[rows].tolist(),
                                                 strict=True))]
