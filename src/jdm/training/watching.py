"""Ways to see a run while it trains: previews, report.html, and trackers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from jdm.errors import UsageError
from jdm.run import Run, Task
from jdm.training import distributed, trackers
from jdm.training.monitors import Monitors
from jdm.training.previews import Previews
from jdm.training.record import Log
from jdm.training.report import report

Averages = Callable[[], AbstractContextManager[dict[str, nn.Module]]]


class Watching:
    """Draws what is due and writes the run's page; only the first process writes. A context: its end closes trackers.

    Raises:
        UsageError: a tracker cannot start.
    """

    def __init__(self, run: Run, task: Task, start: int, log: Log, monitors: Monitors):
        self.run, self.log, self.monitors = run, log, monitors
        self.previews, self.ended = Previews(run, task, start), False
        if distributed.first():
            log.trackers += trackers.opened(run, start)

    def __enter__(self) -> Watching:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for tracker in self.log.trackers:
            tracker.close(kind is not None)

    def show(self, done: int, ended: bool, averages: Averages) -> None:
        """Draws and shows the preview after `done` steps: every preview_every, before the first and after the last.

        Args:
            ended: no step follows.
            averages: a context in which the trained modules hold their averages.
        """
        self.ended = ended
        every = self.run.preview_every
        if not every or (done % every and not ended):
            return
        with averages() as modules:
            drawn = self.previews.draw(done, modules)
        if drawn:
            for tracker in self.log.trackers:
                tracker.picture(done, drawn)
            self.page()

    def warn(self, logs: Mapping[str, Any], step: int) -> None:
        """Prints what the monitors find in a logged step, once for all processes."""
        for warning in self.monitors.note(logs, step):
            if distributed.first():
                print(f"warning: {warning}", file=sys.stderr, flush=True)

    def page(self) -> None:
        """Writes report.html; says why where a file that it reads is damaged, which the training does not need."""
        if not distributed.first():
            return
        try:
            report(self.run.out, self.ended, self.monitors.said)
        except UsageError as error:
            print(f"warning: report.html is not up to date ({error})", file=sys.stderr, flush=True)
