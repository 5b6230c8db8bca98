"""Keeps a run's best averages by a measurement of its probe, and decides when to stop early."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jdm.errors import UsageError
from jdm.run import Run
from jdm.sharing import batch_mean
from jdm.training import checkpoint, distributed
from jdm.training.record import measurements

BETTER = {"judge": 1.0, "prompt_agreement": 1.0, "fd": -1.0, "consistency": -1.0}  # 1: more is better; -1: less
FOLDER = "best"  # in a run's folder; its checkpoints hold only averages


class Best:
    """Tracks the best probe so far by run.best; a resumed run restores this from its log.

    Args:
        log: the run's metrics.jsonl.
        measures: True if the task has a probe.

    Raises:
        UsageError: run.best is not a known measurement, or the run never measures it.
    """

    def __init__(self, run: Run, log: Path, measures: bool = True):
        self.run, self.seen = run, []
        if not run.best:
            if run.patience:
                raise UsageError(f"patience {run.patience} needs --best, the measurement to compare probes by: "
                                 f"{', '.join(BETTER)}")
            return
        if run.best not in BETTER:
            raise UsageError(f"probes cannot be compared by {run.best!r}; choose --best from {', '.join(BETTER)}")
        if not measures:
            raise UsageError(f"this run has no validation pictures to measure {run.best} on; leave out --best")
        if run.probe_every < 1:
            raise UsageError("--best needs --probe-every of at least 1, got 0")
        for row in measurements(log):
            if f"probe/{run.best}" in row:
                self.seen.append((int(row["step"]), float(row[f"probe/{run.best}"])))
        self._forget()

    @property
    def ended(self) -> bool:
        """True once `patience` probes have passed since the best one."""
        return bool(self.run.patience and self.seen) and len(self.seen) - 1 - self._best >= self.run.patience

    @property
    def place(self) -> Path | None:
        """The checkpoint of the best averages, or None."""
        found = {checkpoint.step_of(place): place for place in checkpoint.all_checkpoints(self.run.out / FOLDER)}
        return found.get(self.seen[self._best][0]) if self.seen else None

    def note(self, step: int, measured: Mapping[str, Any], averages: Mapping[str, dict[str, Tensor]]) -> None:
        """Records a probe, and saves the averages if no earlier probe was as good.

        Raises:
            UsageError: the probe does not measure run.best.
            RunError: the disk is full.
        """
        if not self.run.best:
            return
        if self.run.best not in measured:
            raise UsageError(f"this run's probe does not measure {self.run.best}; choose --best from "
                             f"{', '.join(k for k in measured if k in BETTER) or 'nothing: leave it out'}")
        value = batch_mean(torch.tensor(float(measured[self.run.best]), dtype=torch.float64))
        self.seen.append((step, float(value)))  # one value for all processes
        if self._best == len(self.seen) - 1:
            checkpoint.save(checkpoint.State({}, {}, averages, {}), self.run.out / FOLDER, step)

    def _forget(self) -> None:
        """Deletes averages that are damaged or from steps after the resume point; without the best, drops all
        measurements."""
        taken = {step for step, _ in self.seen}
        for place in checkpoint.all_checkpoints(self.run.out / FOLDER) if distributed.first() else ():
            if checkpoint.step_of(place) not in taken or checkpoint.damage_of(place):
                shutil.rmtree(place)
        distributed.barrier()
        if self.place is None:
            self.seen = []

    @property
    def _best(self) -> int:
        """Index of the best measurement; the first one in a tie."""
        values = [BETTER[self.run.best] * value for _, value in self.seen]
        return max(range(len(values)), key=values.__getitem__)
