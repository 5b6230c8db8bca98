"""The one thread that draws: a short queue before it, and a time for every request."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from jdm.app.limits import BusyError, Limits

T = TypeVar("T")


class Worker:
    """Runs work in a thread of its own, one piece after the other, in the order in which it came.

    All of PyTorch runs in that thread: a second thread that entered its parallel loops would bring OpenMP threads of
    its own, and both sets would wait for each other on the cores.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self.waiting = 0
        self._usual = 0.1  # seconds of a piece of work, a running mean
        self._thread = ThreadPoolExecutor(1, "draw")

    async def run(self, work: Callable[[float], T], counted: bool = True) -> T:
        """The value of work(deadline), where the deadline is a time.monotonic() that it should not pass.

        Args:
            counted: False for work whose number is bounded elsewhere, such as one for each live page.

        Raises:
            BusyError: as many wait as may wait, or the time was over before its turn came.
        """
        if counted and self.waiting >= self.limits.waiting:
            raise BusyError(f"{self.waiting} requests are waiting already", self.retry_after())
        deadline = time.monotonic() + self.limits.seconds
        self.waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._timed, work, deadline)
        finally:
            self.waiting -= 1

    def retry_after(self) -> int:
        """Seconds after which there should be room, at least 1."""
        return max(1, math.ceil(self._usual * (self.waiting + 1) / 2))

    def call(self, work: Callable[[], T]) -> T:
        """The value of work(), run in the thread, such as the loading of what it will draw with."""
        return self._thread.submit(work).result()

    def _timed(self, work: Callable[[float], T], deadline: float) -> T:
        start = time.monotonic()
        if start > deadline:
            raise BusyError(f"the request waited {self.limits.seconds} seconds for its turn", self.retry_after())
        try:
            return work(deadline)
        finally:
            self._usual += 0.1 * (time.monotonic() - start - self._usual)

    def close(self) -> None:
        """Ends the thread after the work that it does now."""
        self._thread.shutdown(wait=True, cancel_futures=True)


@contextmanager
def stopped_at(deadline: float, net: nn.Module, limits: Limits) -> Iterator[None]:
    """A context in which a network raises BusyError when it starts a step after the deadline."""

    def check(*_: Any) -> None:
        if time.monotonic() > deadline:
            raise BusyError(f"the request took longer than its limit, {limits.seconds} seconds; ask for fewer "
                            "pictures or steps", 1)

    hook = net.register_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()
