"""Batches of a run's pictures; the next step's pictures are read while the current step is computed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from jdm.data.buckets import Buckets, buckets_of
from jdm.data.noise import Noise, rows_at
from jdm.data.sources import AS_USUAL, Pictures
from jdm.run import Data
from jdm.sharing import Share, share
from jdm.size import Frame, Size

HANDED = re.compile(r"\b(left|right)(\b|-|most|wards?\b|hand)", re.IGNORECASE)  # captions that a mirror makes wrong


class Batch(NamedTuple):
    """A share's part of a batch.

    Attributes:
        rows: [B] of the split; a row whose picture cannot be read is replaced.
        images: their pictures, uint8 [B, 3, H, W], of one size in all shares.
        maps: their control maps, uint8 [B, 3, H, W]; None where the source has none of its own.
    """

    rows: Tensor
    images: Tensor
    maps: Tensor | None


class Drawn(NamedTuple):
    """A step's random choices for a share, made before a picture is read; numbers in [0, 1) are of the step's `Noise`.

    Attributes:
        rows: [B] of the split.
        among: the rows of their bucket; None without buckets.
        frames: what is seen of each, or nothing for the middle of the split's own size.
        caption, mirror: [B], by which `drawn_captions` and the mirror are chosen.
    """

    rows: Tensor
    among: Tensor | None
    frames: tuple[Sequence[Frame], ...]
    caption: Tensor
    mirror: Tensor


class Batches:
    """step -> this share's part of the step's batch.

    Each part of a batch is read once, even if several phases use it. A reading error is raised at the step that
    needs the picture.

    Args:
        data: buckets, crop and flip; what they do is noted in the pictures' report.
    """

    def __init__(self, pictures: Pictures, batch: int, seed: int, data: Data = AS_USUAL):
        self.pictures, self.batch, self.seed, self.data = pictures, batch, seed, data
        self.buckets: Buckets | None = buckets_of(pictures, data) if data.buckets else None
        self._note()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="pictures")
        self._asked: dict[tuple[int, Share], Future[Batch]] = {}

    def __call__(self, step: int) -> Batch:
        for old in [key for key in self._asked if key[0] not in (step, step + 1)]:
            self._asked.pop(old).cancel()
        if not self.pictures.slow:
            return self._read(self._drawn(step))
        found = self._ask(step)
        self._ask(step + 1)
        return found.result()

    def _note(self) -> None:
        report = self.pictures.report
        if self.buckets is not None:
            report.note(self.buckets.said)
            if said := self.buckets.small(self.batch):
                report.note(said)
        if self.data.flip:
            keys = self.pictures.keys().tolist()
            n = sum(any(HANDED.search(caption) for caption in self.pictures.captions[key]) for key in keys)
            report.note(f"mirrored are {self.data.flip:.0%} of the pictures, drawn anew in every step, and none whose "
                        f"caption says left or right: {n:,} of {len(keys):,} have such a caption")

    def _ask(self, step: int) -> Future[Batch]:
        key = step, share()
        if key not in self._asked:
            self._asked[key] = self._reader.submit(self._read, self._drawn(step))
        return self._asked[key]

    def _drawn(self, step: int) -> Drawn:
        noise = Noise(self.seed, step)
        size, among = self.pictures.size, None
        if self.buckets is None:
            rows = rows_at(len(self.pictures), self.batch, self.seed, step)
        else:
            k, rows = self.buckets.at(step, self.batch, self.seed)
            size, among = self.buckets.sizes[k], self.buckets.rows[k]
        frames = (self._frames(size, noise, len(rows)),) if self.data.recut else ()
        return Drawn(rows, among, frames, noise.uniform("caption", len(rows)), noise.uniform("flip", len(rows)))

    def _frames(self, size: Size, noise: Noise, n: int) -> list[Frame]:
        if self.data.crop == "centre":
            return [Frame(size)] * n
        across, down = (noise.uniform(f"crop/{name}", n).tolist() for name in ("across", "down"))
        return [Frame(size, *at) for at in zip(across, down, strict=True)]

    def _read(self, drawn: Drawn) -> Batch:
        found = Batch(*self.pictures.sound(drawn.rows, *drawn.frames, among=drawn.among))
        if not self.data.flip:
            return found
        said = self.pictures.prompts(found.rows, drawn.caption)
        chosen = [u < self.data.flip and not HANDED.search(y)
                  for u, y in zip(drawn.mirror.tolist(), said, strict=True)]
        maps = None if found.maps is None else mirrored(found.maps, chosen)
        return Batch(found.rows, mirrored(found.images, chosen), maps)


def drawn_captions(pictures: Pictures, rows: Tensor, noise: Noise) -> list[str]:
    """The caption of each of this share's rows [B] that the step draws."""
    return pictures.prompts(rows, noise.uniform("caption", len(rows)).cpu())


def mirrored(images: Tensor, chosen: Sequence[bool]) -> Tensor:
    """uint8 [B, 3, H, W] with the chosen ones mirrored left to right; computed by NumPy, as in `pictures.read_all`."""
    pixels: Any = images.numpy()
    return torch.from_numpy(np.where(np.array(chosen)[:, None, None, None], pixels[..., ::-1], pixels))
