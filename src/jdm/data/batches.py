"""Batches of a run's pictures; the next step's pictures are read while the current step is computed."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from torch import Tensor

from jdm.data.noise import rows_at
from jdm.data.sources import Pictures
from jdm.sharing import Share, share


class Batch(NamedTuple):
    """A share's part of a batch.

    Attributes:
        rows: [B] of the split; a row whose picture cannot be read is replaced.
        images: their pictures, uint8 [B, 3, H, W].
        maps: their control maps, uint8 [B, 3, H, W]; None where the source has none of its own.
    """

    rows: Tensor
    images: Tensor
    maps: Tensor | None


class Batches:
    """step -> this share's part of the step's batch.

    Each part of a batch is read once, even if several phases use it. A reading error is raised at the step that
    needs the picture.
    """

    def __init__(self, pictures: Pictures, batch: int, seed: int):
        self.pictures, self.batch, self.seed = pictures, batch, seed
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="pictures")
        self._asked: dict[tuple[int, Share], Future[Batch]] = {}

    def __call__(self, step: int) -> Batch:
        for old in [key for key in self._asked if key[0] not in (step, step + 1)]:
            self._asked.pop(old).cancel()
        if not self.pictures.slow:
            return self._read(rows_at(len(self.pictures), self.batch, self.seed, step))
        found = self._ask(step)
        self._ask(step + 1)
        return found.result()

    def _ask(self, step: int) -> Future[Batch]:
        key = step, share()
        if key not in self._asked:
            rows = rows_at(len(self.pictures), self.batch, self.seed, step)
            self._asked[key] = self._reader.submit(self._read, rows)
        return self._asked[key]

    def _read(self, rows: Tensor) -> Batch:
        return Batch(*self.pictures.sound(rows))
