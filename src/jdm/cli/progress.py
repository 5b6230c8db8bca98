"""Progress of a long command: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

BETWEEN_UPDATES, BETWEEN_LINES = 0.5, 10.0  # seconds
TERMS = ("fidelity", "condition")


class TrainingProgress:
    """Shows the steps done, the terms' sizes, the last probe and the time left of a training run.

    Enter it as a context, then pass it to `train`, which calls it with (steps done, latest numbers). The numbers are
    copied from the device only when they are shown.
    """

    def __init__(self, steps: int, console: Console | None = None):
        self.steps, self.console = steps, console or Console(stderr=True)
        self.bar = Progress(BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn(compact=True),
                            TextColumn("{task.fields[numbers]}"), console=self.console)
        self.task = self.bar.add_task("", total=steps, numbers="")
        self.probed: dict[str, float] = {}
        self.begun: tuple[float, int] | None = None
        self.shown = 0.0

    def __enter__(self) -> TrainingProgress:
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.bar.stop()

    def __call__(self, done: int, logs: dict[str, Any]) -> None:
        now = time.monotonic()
        if self.begun is None:
            self.begun = now, done
            self.bar.reset(self.task, total=self.steps, completed=done)
        new = {k.removeprefix("probe/"): float(v) for k, v in logs.items() if k.startswith("probe/")}
        self.probed |= new
        wait = BETWEEN_UPDATES if self.console.is_terminal else BETWEEN_LINES
        if now - self.shown < wait and done < self.steps and not new:
            return
        self.shown = now
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in self._numbers(logs).items())
        if self.console.is_terminal:
            self.bar.update(self.task, completed=done, numbers=numbers)
        else:
            with suppress(OSError):  # a log that is full or gone does not end a run
                print(f"step {done}/{self.steps}  {numbers}{self._left(now, done)}", file=sys.stderr, flush=True)

    def _numbers(self, logs: dict[str, Any]) -> dict[str, float]:
        terms = [k for k in TERMS if k in logs] or [k for k in logs if k.endswith("/loss")]
        return {k: float(logs[k]) for k in terms} | self.probed

    def _left(self, now: float, done: int) -> str:
        began, first = self.begun or (now, done)
        if done == first or done >= self.steps:
            return ""
        seconds = (now - began) / (done - first) * (self.steps - done)
        return f"  {seconds / 60:.0f} min left" if seconds >= 90 else f"  {seconds:.0f} s left"


class PartsProgress:
    """Shows a bar for each part that `prepare` writes, on a terminal; shows nothing elsewhere.

    Enter it as a context, then pass it to `prepare`, which calls it with (part, done, of).
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True)
        self.bars = Progress(TextColumn("{task.description:9}"), BarColumn(24), MofNCompleteColumn(),
                             TimeRemainingColumn(compact=True), console=self.console)
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> PartsProgress:
        if self.console.is_terminal:
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.bars.stop()

    def __call__(self, part: str, done: int, of: int) -> None:
        if part not in self.tasks:
            self.tasks[part] = self.bars.add_task(part, total=of)
        self.bars.update(self.tasks[part], completed=done)
