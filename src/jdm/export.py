"""A run's model as a folder of its own, for use without this package."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from jdm import checkpoint
from jdm.errors import RunError, UsageError
from jdm.recipes import recorded


def export(run: str | Path, out: str | Path, dtype: torch.dtype = torch.float32) -> Path:
    """Copy a finished run's model, or build it from the last checkpoint's averages; returns `out`.

    Args:
        run: a run's folder, or a model's.
        out: a new or empty folder; it appears whole or not at all.
        dtype: of the weights on disk. The configs stay, so a stock loader computes in the precision asked of it.

    Raises:
        UsageError: there is nothing to export, or `out` is taken. RunError: the disk refuses.
    """
    run, out = Path(run), Path(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UsageError(f"{out} is there already and is not empty; name a new folder")
    write = _writer(run)
    draft = out.with_name(f".{out.name}.draft")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.parent.mkdir(parents=True, exist_ok=True)
        write(draft)
        if dtype != torch.float32:
            for file in draft.rglob("*.safetensors"):
                _recast(file, dtype)
        if out.is_dir():
            out.rmdir()
        draft.rename(out)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{out} could not be written ({error}); free some space or name another folder") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return out


def _writer(run: Path) -> Callable[[Path], object]:
    """What writes the model of `run` into a folder."""
    for folder in (run / "model", run):
        if (folder / "model_index.json").is_file() or (folder / "config.json").is_file():
            return lambda out: shutil.copytree(folder, out)
    place = checkpoint.last(run)
    if place is None or not (run / "run.json").is_file():
        what = "is no run" if not (run / "run.json").is_file() else "has no checkpoint yet"
        raise UsageError(f"{run} {what}; give the --out of a jdm train, such as runs/nano-canny")
    again = replace(recorded(run / "run.json"), out=run)
    task = again.method.task(again)
    averages = {name: task.modules[name].eval() for name in task.averaged}
    checkpoint.load(checkpoint.State({}, {}, averages, {}), place)
    return lambda out: task.export(out, averages)


def _recast(file: Path, dtype: torch.dtype) -> None:
    tensors = {k: v.to(dtype) if v.dtype == torch.float32 else v for k, v in load_file(file).items()}
    draft = file.with_suffix(".draft")  # tensors left as they were may still be read from the file
    save_file(tensors, draft, metadata={"format": "pt"})
    draft.replace(file)
