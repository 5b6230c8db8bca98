"""The files beside a run's checkpoints: run.json, from which it can be repeated, and the log of its numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from jdm.data.sources import fingerprint, load_pictures
from jdm.errors import UsageError
from jdm.files import write
from jdm.run import Run, described, without_cache
from jdm.training import distributed


def refuse_another(run: Run) -> None:
    """UsageError where run.out holds a run on other data, of another model, batch or seed.

    The method's own settings may change: a run that failed is often cured by a lower rate.
    """
    try:
        before = without_cache(json.loads((run.out / "run.json").read_text(encoding="utf-8"))["run"])
    except (OSError, ValueError, KeyError):
        return  # the tensors themselves still have to fit
    now = without_cache(json.loads(json.dumps(described(run))))
    changed = [k for k in ("model", "data", "batch", "seed") if now.get(k) != before.get(k)]
    if changed:
        raise UsageError(f"{run.out} holds a run with another {changed[0]}; choose another --out, or go on with it as "
                         f"it was: jdm train {run.out / 'run.json'}")


def record(run: Run) -> None:
    """run.json: the recipe and the versions a run can be repeated from."""
    import platform

    import diffusers
    import transformers

    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "diffusers": diffusers.__version__, "transformers": transformers.__version__}
    pictures = load_pictures(run.data.source, run.data.split, run.data.size)
    data = {"source": pictures.source, "n": len(pictures), "sha256": fingerprint(pictures)}
    record = {"run": described(run), "data": data, "versions": versions, "threads": torch.get_num_threads()}
    write(run.out / "run.json", json.dumps(record, indent=1) + "\n")


class Log:
    """metrics.jsonl, cut back to the step a run resumes from."""

    def __init__(self, path: Path, start: int):
        self.path = path
        lines = path.read_text().splitlines() if path.is_file() else []
        kept = [line for line in lines if _step_of(line) <= start]
        if distributed.first():
            write(path, "".join(line + "\n" for line in kept))

    def write(self, step: int, values: dict[str, Any]) -> None:
        if not distributed.first():
            return
        row = {"step": step} | {k: float(v) for k, v in values.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf
