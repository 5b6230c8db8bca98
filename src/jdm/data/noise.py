"""All random numbers of a run (picture order, noise, choices), each a pure function of (seed, step, stream)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from jdm.sharing import Share, share


def rows_at(n: int, batch: int, seed: int, step: int, bucket: str = "") -> Tensor:
    """This share's rows of batch `step`. Batches are consecutive pieces of a new permutation of n in every epoch.

    Args:
        bucket: name of the part of a split that the n rows are; each has permutations of its own.
    """
    places = torch.arange(step * batch, (step + 1) * batch)[share().rows(batch)]
    order = _bucket_permutation if bucket else _permutation
    return torch.stack([order(n, seed, int(p) // n, f"order{bucket}")[int(p) % n] for p in places])


def _drawn(n: int, seed: int, epoch: int, stream: str) -> Tensor:
    return torch.randperm(n, generator=keyed_generator(seed, epoch, stream))


_permutation = lru_cache(maxsize=4)(_drawn)
_bucket_permutation = lru_cache(maxsize=64)(_drawn)  # of the parts of a split, which are smaller


def keyed_generator(seed: int, step: int, stream: str) -> torch.Generator:
    """A random generator that depends only on (seed, step, stream)."""
    digest = hashlib.blake2b(f"{seed}/{step}/{stream}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


@dataclass(frozen=True)
class Noise:
    """The random numbers of one step, by stream name, independent of resuming, order of calls and share."""

    seed: int
    step: int
    device: torch.device | str = "cpu"
    share: Share = field(default_factory=share)

    def normal(self, stream: str, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers of `shape`: this share's rows of the global batch."""
        return self._rows(torch.randn((shape[0] * self.share.count, *shape[1:]), generator=self._generator(stream)))

    def uniform(self, stream: str, n: int) -> Tensor:
        """Uniform numbers in [0, 1), [n]: this share's rows of the global batch."""
        return self._rows(torch.rand(n * self.share.count, generator=self._generator(stream)))

    def choice(self, stream: str, n: int) -> int:
        """One number of 0..n-1, the same for every share of the batch."""
        return int(torch.randint(n, (1,), generator=self._generator(stream)))

    def _rows(self, drawn: Tensor) -> Tensor:
        return drawn[self.share.rows(len(drawn))].to(self.device)

    def _generator(self, stream: str) -> torch.Generator:
        return keyed_generator(self.seed, self.step, stream)
