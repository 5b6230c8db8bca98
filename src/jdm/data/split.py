"""A split of a source: pictures, captions and control maps by row; which cannot be read, and what replaces them."""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jdm.data.pictures import UnreadableError
from jdm.data.report import Report
from jdm.data.texts import few
from jdm.size import Frame, Size

if TYPE_CHECKING:
    from jdm.space import Space

Stamp = tuple[str, int, int | str]
SPARED = 8  # of fewer pictures none is held out
HELD_OUT_OF = 20  # one picture of so many is for validation, and one for the test, where the source has no such split


@dataclass(eq=False)
class Unread:
    """Pictures that turned out to be unreadable, by index, and the share of a split that may be.

    What replaces them depends on nothing but which pictures those are: the next row that can be read.
    """

    share: float = 0.0
    found: dict[int, str] = field(default_factory=dict)

    def note(self, bad: Mapping[int, str], n: int) -> None:
        """Adds pictures of a split of n.

        Raises:
            UnreadableError: there are now more than the share of n, rounded up.
        """
        self.found |= bad
        allowed = math.ceil(self.share * n)
        if len(self.found) > allowed or len(self.found) >= n:
            raise UnreadableError(
                f"{few(self.found.values(), 2)}: {len(self.found):,} of {n:,} pictures cannot be read and {allowed:,} "
                f"may be skipped; mend or remove them, or raise --data.unreadable ({self.share:g})", bad)


@dataclass(frozen=True)
class Pictures:
    """A split: uint8 pictures by index, their captions, and class labels if the source has them.

    Attributes:
        images: indices [B] -> uint8 [B, 3, H, W] of `size`; given a Frame for each as well, what these show.
        captions: for each picture, or each label, the tuple of captions to draw from.
        labels: class of each picture, by index, or None if unknown. With labels, `captions` is indexed by label.
        classes: class of each picture, by index, where each has captions of its own; None if unknown.
        indices: [N] indices of the pictures in this split.
        size: side, or (height, width), in pixels.
        source: name for reports.
        files: indices [B] -> files these pictures are read from: one for each, or the files that hold all of them.
        latents: space -> latents [N, C, h, w] of the split, or None if they are not prepared (cache.py).
        slow: True if a picture is opened and decoded on access, so that a run should read ahead (batches.py).
        controls: as `images`, control maps; None where the source has none of its own.
        report: what was found, and what each rule left out.
        unread: pictures that could not be read so far.
        stamps: indices [B] -> name, bytes and time or version of each picture and map; None if unknown.
        name_of: index -> the picture's name, for messages.
        sides: indices [B] -> (width, height) of each picture as it lies in the source, from its header alone.
    """

    images: Callable[..., Tensor]
    captions: tuple[tuple[str, ...], ...]
    labels: Tensor | None
    indices: Tensor
    size: Size
    source: str
    files: Callable[[Tensor], list[Path]] | None = None
    latents: Callable[[Space], Tensor] | None = None
    slow: bool = False
    controls: Callable[..., Tensor] | None = None
    report: Report = field(default_factory=lambda: Report(""))
    unread: Unread = field(default_factory=Unread)
    stamps: Callable[[Tensor], list[Stamp]] | None = None
    classes: Tensor | None = None
    name_of: Callable[[int], str] = "picture {}".format
    sides: Callable[[Tensor], list[tuple[int, int]]] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, rows: Tensor, *frames: Sequence[Frame]) -> Tensor:
        """Pictures of rows [B] of this split: uint8 [B, 3, H, W]; UnreadableError if one of them cannot be read.

        Args:
            frames: what is seen of each, of one size; the middle of `size` where it is left out.
        """
        return self.images(self.indices[rows], *frames)

    def maps(self, rows: Tensor, *frames: Sequence[Frame]) -> Tensor | None:
        """Control maps of rows [B]: uint8 [B, 3, H, W], or None where the source has none of its own."""
        return None if self.controls is None else self.controls(self.indices[rows], *frames)

    def sound(self, rows: Tensor, *frames: Sequence[Frame],
              among: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """(rows [B], their pictures, their maps), each row that cannot be read replaced by the next that can.

        Args:
            frames: as in `batch`.
            among: rows of the split, rising, that a replacement is looked for in first; all of them where None.

        Raises:
            UnreadableError: more pictures cannot be read than the share that may be.
        """
        while True:
            rows = self.replaced(rows, among)
            try:
                return rows, self.batch(rows, *frames), self.maps(rows, *frames)
            except UnreadableError as error:
                indices = self.indices[rows].tolist()
                self.unread.note({indices[place]: reason for place, reason in error.at.items()}, len(self))

    def replaced(self, rows: Tensor, among: Tensor | None = None) -> Tensor:
        """Rows [B], with those that are known to be unreadable replaced, as `sound` says."""
        if not self.unread.found:
            return rows
        good = [index not in self.unread.found for index in self.indices.tolist()]
        if not any(good):
            raise UnreadableError(f"{self.source}: none of {len(self)} pictures can be read; give other pictures", {})
        fit = [row for row in ([] if among is None else among.tolist()) if good[row]]
        fit = fit or [row for row, sound in enumerate(good) if sound]
        return torch.tensor([row if good[row] else fit[bisect(fit, row) % len(fit)] for row in rows.tolist()])

    def keys(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """The places in `captions` of the captions of rows [B], or of all rows."""
        pictures = self.indices[rows]
        return pictures if self.labels is None else self.labels[pictures]

    def label(self, rows: Tensor) -> Tensor | None:
        """Classes of rows [B], or None if unknown."""
        known = self.classes if self.labels is None else self.labels
        return None if known is None else known[self.indices[rows]]

    def prompts(self, rows: Tensor, uniform: Tensor) -> list[str]:
        """One caption per row, chosen by `uniform` [B] in [0, 1)."""
        choices = [self.captions[key] for key in self.keys(rows).tolist()]
        return [c[int(u * len(c))] for c, u in zip(choices, uniform.tolist(), strict=True)]

    def part(self, expression: str) -> Pictures:
        """The slice "[a:b]" of this split."""
        low, high = expression.strip("[]").split(":")
        chosen = slice(int(low) if low else None, int(high) if high else None)
        return replace(self, indices=self.indices[chosen])


def fingerprint(pictures: Pictures, count: int = 1000) -> str:
    """SHA-256 of a split's length and of its first `count` pictures and captions; recorded with every run."""
    rows = torch.arange(min(count, len(pictures)))
    digest = hashlib.sha256(pictures.sound(rows)[1].numpy().tobytes())
    digest.update(json.dumps([len(pictures), pictures.prompts(rows, torch.zeros(len(rows)))]).encode())
    return digest.hexdigest()


# Splits that a source does not name


def share_of(n: int, absent: Sequence[str], report: Report) -> list[str]:
    """The split of each of n training pictures: those that are absent from the source are held out of them.

    Of fewer than 8 pictures none is held out.
    """
    held = {0: "validation", 1: "test"}
    if not absent:
        return ["train"] * n
    if n < SPARED:
        report.note(f"of fewer than {SPARED} pictures none is held out: all {n} train, and there are no "
                    f"{' or '.join(absent)} pictures to measure on")
        return ["train"] * n
    shares = [part if (part := held.get(i % HELD_OUT_OF)) in absent else "train" for i in range(n)]
    for name in absent:
        report.note(f"1 of {HELD_OUT_OF} pictures is held out for {name}: {shares.count(name):,} of {n:,}")
    return shares  # type: ignore[return-value]
