"""Shares of a step's global batch: the one that is computed here, and means over all parts and processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
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


@dataclass
class Means:
    """The means over a batch whose parts are computed one after another.

    A first pass over the parts records what each says; `known` then holds the means for a second pass, which asks in
    the same order.
    """

    recorded: list[list[Tensor]] = field(default_factory=list)
    known: list[Tensor] = field(default_factory=list)
    asked: int = 0

    def take(self, value: Tensor) -> Tensor:
        if not self.known:
            self.recorded[-1].append(value.detach())
            return value
        self.asked += 1
        return self.known[self.asked - 1]

    def settle(self) -> None:
        """End the first pass."""
        self.known = [mean_over_processes(torch.stack(values).mean(0)) for values in zip(*self.recorded, strict=True)]


_MEANS: list[Means] = []


@contextmanager
def part_of(means: Means) -> Iterator[None]:
    """Context of one part's computation in the first or the second pass."""
    means.recorded.append([])
    means.asked = 0
    _MEANS.append(means)
    try:
        yield
    finally:
        _MEANS.pop()


def batch_mean(value: Tensor) -> Tensor:
    """The mean over parts and processes of a detached number that stands for the samples computed here."""
    return _MEANS[-1].take(value) if _MEANS else mean_over_processes(value)


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean over processes of a detached number."""
    return mean_over_processes_(value.detach().clone()) if processes() > 1 else value


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mean_over_processes_(value: Tensor) -> Tensor:
    """The mean over processes, in place."""
    dist.all_reduce(value)
    return value.div_(dist.get_world_size())
