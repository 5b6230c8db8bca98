"""Time and memory: seconds per picture, and peak memory."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch

from jdm.errors import UsageError


def seconds_per_image(fn: Callable[[], object], batch: int, repeats: int = 5, at_least: float = 0.5) -> float:
    """Median wall-clock seconds per picture of fn(), which makes `batch` pictures; after one warm-up call.

    Args:
        repeats: minimum number of calls.
        at_least: calls go on until they took this many seconds in total, so that a single pause of the machine
            does not dominate the time of a quick call.
    """
    if batch < 1 or repeats < 1:
        raise UsageError(f"batch and repeats must be at least 1, got {batch} and {repeats}")
    fn()
    _finish()
    times: list[float] = []
    while len(times) < repeats or sum(times) < at_least:
        start = time.perf_counter()
        fn()
        _finish()
        times.append(time.perf_counter() - start)
    return statistics.median(times) / batch


def peak_memory_mb(device: str | torch.device = "cpu") -> float:
    """Peak memory in MiB: the process's resident set since its start; on CUDA, tensors since the last reset."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _finish() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
