"""Progress of a long command: a bar on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from jdm.metrics.timing import peak_memory_mb

BETWEEN_UPDATES, BETWEEN_LINES = 0.5, 60.0  # seconds
TERMS = ("fidelity", "condition", "matching", "guidance", "augmentation", "reward_direction", "regulariser",
         "anchor")


class _Pace:
    """The speed of a counted task since its first update, and the time left."""

    def __init__(self, of: int, unit: str, device: str):
        self.of, self.unit, self.device = of, unit, device
        self.begun: tuple[float, int] | None = None

    def text(self, done: int) -> str:
        """Counts per second, time left and peak memory, as far as they are known."""
        now = time.monotonic()
        began, first = self.begun = self.begun or (now, done)
        parts = []
        if done > first and now > began:
            rate = (done - first) / (now - began)
            parts += [f"{rate:.3g} {self.unit}/s", f"{_spelled((self.of - done) / rate)} left"]
        return "  ".join([*parts, f"peak {peak_memory_mb(self.device) / 1024:.2f} GiB"])


class _Shown:
    """A context that shows counted tasks: as bars on a terminal, as lines elsewhere."""

    def __init__(self, console: Console | None):
        self.console = console or Console(stderr=True)
        self.drawn = self.console.is_terminal and not self.console.is_dumb_terminal
        self.bars = Progress(TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(),
                             TextColumn("{task.fields[numbers]}"), console=self.console)
        self.said = 0.0

    def __enter__(self) -> Any:
        if self.drawn:
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.drawn:
            self.bars.stop()

    def waits(self) -> bool:
        """Whether the last update was a moment ago."""
        return time.monotonic() - self.said < (BETWEEN_UPDATES if self.drawn else BETWEEN_LINES)

    def show(self, task: TaskID, what: str, done: int, of: int, numbers: str) -> None:
        self.said = time.monotonic()
        if self.drawn:
            self.bars.update(task, completed=done, numbers=numbers)
        else:
            with suppress(OSError):  # a log that is full or gone does not end a run
                print(what + (f" {done}/{of}" if of else "") + f"  {numbers}", file=sys.stderr, flush=True)


class TrainingProgress(_Shown):
    """Shows a training run: steps done, steps per second, time left, peak memory, the terms' sizes and the last probe.

    Enter it as a context, then pass it to `train`, which calls it with (steps done, latest numbers). The numbers are
    copied from the device only when they are shown.

    Args:
        device: device whose peak memory is shown: the process's on a CPU, the tensors' on a GPU.
    """

    def __init__(self, steps: int, device: str = "cpu", console: Console | None = None):
        super().__init__(console)
        self.steps, self.pace = steps, _Pace(steps, "steps", device)
        self.task = self.bars.add_task("", total=steps, numbers="")
        self.probed: dict[str, float] = {}

    def __call__(self, done: int, logs: dict[str, Any]) -> None:
        new = {k.removeprefix("probe/"): float(v) for k, v in logs.items() if k.startswith("probe/")}
        self.probed |= new
        if self.pace.begun is not None and self.waits() and done < self.steps and not new:
            return
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in self._numbers(logs).items())
        self.show(self.task, "step", done, self.steps, f"{self.pace.text(done)}  {numbers}")

    def _numbers(self, logs: dict[str, Any]) -> dict[str, float]:
        terms = [k for k in TERMS if k in logs] or [k for k in logs if k.endswith("/loss")]
        return {k: float(logs[k]) for k in terms} | self.probed


class PartsProgress(_Shown):
    """Shows each part that a command writes: how much of it is done, items per second, time left and peak memory.

    Enter it as a context, then call it with (part, done, of).
    """

    def __init__(self, device: str = "cpu", console: Console | None = None):
        super().__init__(console)
        self.device = device
        self.parts: dict[str, tuple[TaskID, _Pace]] = {}

    def __call__(self, part: str, done: int, of: int) -> None:
        new = part not in self.parts
        if new:
            self.parts[part] = self.bars.add_task(f"{part:9}", total=of, numbers=""), _Pace(of, "items", self.device)
        task, pace = self.parts[part]
        if new or done >= of or not self.waits():
            self.show(task, part, done, of, pace.text(done))


def _spelled(seconds: float) -> str:
    """A time for a reader: 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
