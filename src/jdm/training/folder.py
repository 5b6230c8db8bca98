"""A run's folder: whose it is, who works in it, and what a killed run left there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from jdm.errors import UsageError
from jdm.files import LOCK, alone, read_json, recover
from jdm.run import Run
from jdm.training import checkpoint, distributed
from jdm.training.best import FOLDER as BEST
from jdm.training.previews import FOLDER as PREVIEWS
from jdm.training.report import LOG, PAGE, RECORD

MODEL = "model"
REPLACED = ("checkpoints", BEST, MODEL, PREVIEWS)  # folders whose contents a run deletes


@contextmanager
def claimed(run: Run) -> Iterator[None]:
    """Context in which this run alone writes to run.out; what a killed run left there is removed first.

    Raises:
        UsageError: another run is in progress there, or there are files that no run wrote, or that this one reads.
    """
    new = not run.out.exists()
    with ExitStack() as held:
        distributed.by_first(lambda: _claim(run, held))
        try:
            yield
        finally:
            if new and distributed.first() and [file.name for file in run.out.iterdir()] == [LOCK]:
                shutil.rmtree(run.out)  # it could not start


def _claim(run: Run, held: ExitStack) -> None:
    _refuse_inputs(run)
    _refuse_foreign(run.out)
    try:
        held.enter_context(alone(run.out))
    except OSError as error:
        raise UsageError(f"{run.out} cannot be written ({error.strerror or error}); choose another --out") from None
    for file in (RECORD, LOG, PAGE):
        (run.out / f".{file}.draft").unlink(missing_ok=True)
    for folder in (run.out, run.out / BEST):
        for draft in (folder / "checkpoints").glob(".draft-*"):
            shutil.rmtree(draft)
    recover(run.out / MODEL)


def _refuse_foreign(out: Path) -> None:
    """UsageError where a file or folder that a run writes to is there, and no run has written it."""
    present = [name for name in (RECORD, LOG, PAGE, *REPLACED) if os.path.lexists(out / name)]
    if not present:
        return
    if not (out / LOCK).is_file() and not checkpoint.all_checkpoints(out) and "versions" not in read_json(out / RECORD):
        raise UsageError(f"{out} has a {present[0]} that no run of jdm wrote, and this run would overwrite it; choose "
                         "another --out, such as a new folder")
    model = out / MODEL
    written = (model / "model_index.json", model / "config.json")
    if os.path.lexists(model) and (model.is_symlink() or not model.is_dir() or any(model.iterdir())) and not (
            "run" in read_json(out / RECORD) and any(file.is_file() for file in written)):
        raise UsageError(f"{model} exists, was not written by a run of jdm, and would be replaced by this run; move "
                         "it away, or choose another --out")


def _refuse_inputs(run: Run) -> None:
    """UsageError where the run would overwrite what it reads."""
    needs = run.method.needs(run)
    out = run.out.resolve()
    for name in (*needs.models.values(), needs.autoencoder, run.decoder, run.data.source, run.data.prepared):
        places = Path(name).absolute(), Path(name).resolve()
        if name and places[0].exists() and any(place.is_relative_to(base / part) for place in places
                                               for base in (out, run.out.absolute()) for part in REPLACED):
            raise UsageError(f"{name} is read by this run and would be replaced by it; choose another --out than "
                             f"{run.out}")
    if Path(run.data.source).is_dir() and Path(run.data.source).resolve() == out:
        raise UsageError(f"{run.out} is the folder of the pictures; choose another --out, such as {run.out}/run")
