"""The files beside a run's checkpoints: run.json, from which it can be repeated, and the log of its numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from jdm.data.cache import facts, sha256
from jdm.data.sources import Pictures, fingerprint
from jdm.errors import UsageError
from jdm.files import read_json, read_lines, write, write_json
from jdm.loading import Loaded
from jdm.run import Record, Run, described, without_cache
from jdm.training import distributed
from jdm.training.trackers import Tracker

COMPARED = {"n": "their number", "sha256": "what they show", "files": "their names or sizes", "captions": "captions"}
GIVE_UP = "delete it to go on without it, or choose another --out"


def refuse_another(run: Run) -> None:
    """UsageError where run.out holds a run on other data, of another model, batch or seed.

    The method's own settings may change: a run that failed is often cured by a lower rate.
    """
    if not (run.out / "run.json").exists():
        return  # the tensors themselves still have to fit
    before = without_cache(read_json(run.out / "run.json", Record, GIVE_UP)["run"])
    now = without_cache(json.loads(json.dumps(described(run))))
    changed = [k for k in ("model", "data", "batch", "seed") if now.get(k) != before.get(k)]
    if changed:
        raise UsageError(f"{run.out} holds a run with another {changed[0]}; choose another --out, or go on with it as "
                         f"it was: jdm train {run.out / 'run.json'}")


def facts_of(run: Run, pictures: Pictures) -> dict[str, Any]:
    """The identity of a run's pictures: their number, and hashes of pixels (the first 1,000), files and captions."""
    stamps = pictures.stamps(pictures.indices) if pictures.stamps else []
    return {"source": pictures.source, "n": len(pictures), "sha256": fingerprint(pictures),
            "captions": facts(run.data, pictures)["prompts"], "files": sha256([stamp[:2] for stamp in stamps]),
            "written": sha256([stamp[2] for stamp in stamps])}


def record(run: Run, pictures: Pictures, step: int, preprocessor: dict | None) -> None:
    """run.json: the recipe, versions and pictures a run can be repeated from; others that it read before are kept.

    Args:
        step: from which these pictures are read.
        preprocessor: how the control's map is made; None for a run without one.

    Raises:
        UsageError: pictures or captions changed since an earlier step, and run.data.changed does not allow it.
    """
    import platform

    import diffusers
    import transformers

    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "diffusers": diffusers.__version__, "transformers": transformers.__version__}
    data, known = facts_of(run, pictures), read_json(run.out / "run.json", Record, GIVE_UP) if step else {}
    before, others = known.get("data", {}), [*known.get("before", [])]
    if differ := [said for key, said in COMPARED.items() if key in before and before[key] != data[key]]:
        if not run.data.changed:
            raise UsageError(f"the pictures of {run.data.source} changed since {run.out} began: {', '.join(differ)} "
                             f"({before.get('n')} pictures then, {data['n']} now); put them back, choose another "
                             "--out, or go on with those that are there: --data.changed")
        others.append(before)
        data["from step"] = step
    else:
        data |= {key: value for key, value in before.items() if key == "from step"}
    whole = {"run": described(run), "data": data, "before": others, "found": pictures.report.summary(),
             "unreadable": list(pictures.unread.found.values()), "versions": versions,
             "threads": torch.get_num_threads(), "preprocessor": preprocessor}
    write_json(run.out / "run.json", whole)


class Skipped:
    """Prints once what was found of a run's pictures, then each picture that a step finds to be unreadable."""

    def __init__(self, run: Run, loaded: Loaded):
        self.run, self.pictures, self.known = run, loaded.pictures, 0
        if distributed.first():
            _say(loaded.found())

    def note(self, done: int) -> None:
        """Names what this step, and reading ahead of it, could not read, and adds it to run.json."""
        found = list(self.pictures.unread.found.values())
        if len(found) == self.known:
            return
        _say([f"step {done}: {why}; another picture takes its place ({n:,} of {len(self.pictures):,} so far)"
              for n, why in enumerate(found[self.known :], self.known + 1)])
        self.known = len(found)
        if distributed.first():
            file = self.run.out / "run.json"
            write_json(file, read_json(file, Record, GIVE_UP) | {"unreadable": found})


def _say(lines: list[str]) -> None:
    for line in lines:
        print(f"data: {line}", file=sys.stderr, flush=True)


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
        numbers = {k: float(v) for k, v in values.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step} | numbers) + "\n")
        for tracker in self.trackers:
            tracker.numbers(step, numbers)


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
