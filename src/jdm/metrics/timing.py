"""Cost: seconds per picture and peak memory."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch

from jdm.errors import UsageError


def seconds_per_image(fn: Callable[[], object], batch: int, repeats: int = 5, at_least: float = 0.5) -> float:
    """Median wall-clock seconds per picture of fn(), which makes `batch` of them; one warm-up call first.

    Args:
        repeats: calls at least; more until `at_least` seconds were measured, so that one pause of the machine does
            not decide what a quick call costs.
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
    """Peak in MiB: the process's resident set since its start; on CUDA, tensors since the last reset."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _finish() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
