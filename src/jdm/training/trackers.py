"""Programs that get a run's numbers and previews while it trains: TensorBoard and W&B, each an extra of the package."""

from __future__ import annotations

import importlib
import os
import secrets
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jdm.errors import UsageError, in_short
from jdm.files import write
from jdm.run import Run, described

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}  # a tracker -> the package that it needs


def refuse_missing(run: Run) -> None:
    """UsageError where a tracker's package is not installed, before anything is loaded."""
    for name in run.trackers:
        if name in PACKAGES and find_spec(PACKAGES[name]) is None:
            raise UsageError(f"--trackers {name} needs the package {PACKAGES[name]}; install it with: "
                             f"pip install 'jdm[{name}]'")


def opened(run: Run, start: int) -> list[Tracker]:
    """The trackers of a run that goes on after step `start`; metrics.jsonl is written without one.

    Raises:
        UsageError: a tracker cannot start.
    """
    kinds = {"tensorboard": TensorBoard, "wandb": WandB}
    return [kinds[name](run, start) for name in dict.fromkeys(run.trackers) if name in kinds]


class TensorBoard:
    """Event files in OUT/tensorboard; steps that a resumed run takes again replace those of before."""

    def __init__(self, run: Run, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.out / "tensorboard"), purge_step=start + 1)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, image: Image.Image) -> None:
        self.writer.add_image("preview", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        self.writer.close()


class WandB:
    """A W&B run that a resumed run goes on with, by the id in OUT/wandb-id. WANDB_* variables say where it goes."""

    def __init__(self, run: Run, start: int):
        wandb: Any = importlib.import_module("wandb")
        settings = wandb.Settings(silent=True, console="off")
        try:
            self.run = wandb.init(project=os.environ.get("WANDB_PROJECT", "jdm"), name=run.out.resolve().name,
                                  id=_id(run.out / "wandb-id"), resume="allow", dir=str(run.out),
                                  config=described(run), settings=settings)
        except Exception as error:  # its own errors, of the network and of the account
            raise UsageError(f"W&B could not start ({in_short(error)}); run wandb login, or set WANDB_MODE=offline to "
                             "keep the run here until wandb sync, or leave out --trackers wandb") from error
        self.image = wandb.Image

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def picture(self, step: int, image: Image.Image) -> None:
        self.run.log({"preview": self.image(image)}, step=step)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


Tracker = TensorBoard | WandB  # gets a run's numbers and pictures in the order of its steps, then its end


def _id(file: Path) -> str:
    """The id of a run, made where there is none."""
    if not file.is_file():
        write(file, secrets.token_hex(4) + "\n")
    return file.read_text().strip()
