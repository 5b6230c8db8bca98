"""Batches of a run's pictures; the next step's pictures are read while the current step is computed."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from jdm.data.noise import rows_at
from jdm.data.sources import Pictures
from jdm.sharing import Share, share


class Batches:
    """step -> (rows [B] of a split, their pictures uint8 [B, 3, H, W]): this share's part of the step's batch.

    Each part of a batch is read once, even if several phases use it. A reading error is raised at the step that
    needs the picture.
    """

    def __init__(self, pictures: Pictures, batch: int, seed: int):
        self.pictures, self.batch, self.seed = pictures, batch, seed
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="pictures")
        self._asked: dict[tuple[int, Share], tuple[Tensor, Future[Tensor]]] = {}

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        for old in [key for key in self._asked if key[0] not in (step, step + 1)]:
            self._asked.pop(old)[1].cancel()
        if not self.pictures.slow:
            rows = rows_at(len(self.pictures), self.batch, self.seed, step)
            return rows, self.pictures.batch(rows)
        rows, images = self._ask(step)
        self._ask(step + 1)
        return rows, images.result()

    def _ask(self, step: int) -> tuple[Tensor, Future[Tensor]]:
        key = step, share()
        if key not in self._asked:
            rows = rows_at(len(self.pictures), self.batch, self.seed, step)
            self._asked[key] = rows, self._reader.submit(self.pictures.batch, rows)
        return self._asked[key]
