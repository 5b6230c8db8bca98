"""The files beside a run's checkpoints: run.json, from which it can be repeated, and the log of its numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from jdm.data.sources import fingerprint, load_pictures
from jdm.errors import UsageError
from jdm.files import read_json, read_lines, write
from jdm.run import Record, Run, described, without_cache
from jdm.training import distributed
from jdm.training.trackers import Tracker


def refuse_another(run: Run) -> None:
    """UsageError where run.out holds a run on other data, of another model, batch or seed.

    The method's own settings may change: a run that failed is often cured by a lower rate.
    """
    if not (run.out / "run.json").exists():
        return  # the tensors themselves still have to fit
    remedy = "delete it to go on without it, or choose another --out"
    before = without_cache(read_json(run.out / "run.json", Record, remedy)["run"])
    now = without_cache(json.loads(json.dumps(described(run))))
    changed = [k for k in ("model", "data", "batch", "seed") if now.get(k) != before.get(k)]
    if changed:
        raise UsageError(f"{run.out} holds a run with another {changed[0]}; choose another --out, or go on with it as "
                         f"it was: jdm train {run.out / 'run.json'}")


def record(run: Run, preprocessor: dict | None) -> None:
    """run.json: the recipe and the versions a run can be repeated from, and how its control's map is made."""
    import platform

    import diffusers
    import transformers

    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "diffusers": diffusers.__version__, "transformers": transformers.__version__}
    pictures = load_pictures(run.data.source, run.data.split, run.data.size)
    data = {"source": pictures.source, "n": len(pictures), "sha256": fingerprint(pictures)}
    record = {"run": described(run), "data": data, "versions": versions, "threads": torch.get_num_threads(),
              "preprocessor": preprocessor}
    write(run.out / "run.json", json.dumps(record, indent=1) + "\n")


class Log:
    """metrics.jsonl, cut back to the step a run resumes from, and the run's trackers, which get the same numbers."""

    def __init__(self, path: Path, start: int):
        self.path = path
        self.trackers: list[Tracker] = []
        kept = [row for row in measurements(path) if row["step"] <= start]
        if distributed.first():
            write(path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, step: int, values: dict[str, Any]) -> None:
        if not distributed.first():
            return
        row = {"step": step} | {k: float(v) for k, v in values.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for tracker in self.trackers:
            tracker.numbers(step, {k: v for k, v in row.items() if k != "step"})


def measurements(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl, each with its step; none if there is no such file.

    Raises:
        UsageError: a line is not what `Log` writes.
    """
    rows = read_lines(path, dict[str, float])
    for n, row in enumerate(rows, 1):
        if not 0 <= row.get("step", -1) < 2**53:
            raise UsageError(f"{path}, line {n}: step: expected a number in 0..2^53; delete that line")
    return rows
