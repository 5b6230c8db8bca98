"""Which part of a step's global batch is computed here, and means over all parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """Part `index` of `count` equal parts."""

    index: int = 0
    count: int = 1

    def rows(self, n: int) -> slice:
        """This part's rows of n global samples; a sample's noise and prompt do not depend on who computes it."""
        each = n // self.count
        return slice(self.index * each, (self.index + 1) * each)


_NOW = [Share()]


def share() -> Share:
    """The part that is computed now; outside `sharing`, the whole batch."""
    return _NOW[-1]


@contextmanager
def sharing(index: int, count: int) -> Iterator[None]:
    """Context in which batches and noise are drawn for part `index` of `count`."""
    _NOW.append(Share(index, count))
    try:
        yield
    finally:
        _NOW.pop()


def batch_mean(value: Tensor) -> Tensor:
    """The mean over processes of a detached number that stands for this process's samples."""
    many = dist.is_initialized() and dist.get_world_size() > 1
    return mean_over_processes_(value.detach().clone()) if many else value


def mean_over_processes_(value: Tensor) -> Tensor:
    """The mean over processes, in place."""
    dist.all_reduce(value)
    return value.div_(dist.get_world_size())
