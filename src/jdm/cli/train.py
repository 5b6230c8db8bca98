"""`jdm train`: train a recipe, or resume its run; prints the folder of the exported model."""

from __future__ import annotations

import argparse

from jdm.cli import checks
from jdm.cli.console import remark
from jdm.cli.progress import TrainingProgress
from jdm.cli.run_flags import configured
from jdm.training import checkpoint, distributed
from jdm.training.best import FOLDER
from jdm.training.loop import train


def command(asked: argparse.Namespace) -> int:
    run = configured(asked.recipe, asked.flags)
    checks.device(run.device)
    with TrainingProgress(run.steps, run.device) as progress:
        try:
            folder = train(run, progress)
        except KeyboardInterrupt:
            where = checkpoint.last(run.out) or "the start"
            raise KeyboardInterrupt(f"stopped; the same command goes on from {where}") from None
    if distributed.first():
        if run.best and (kept := checkpoint.last(run.out / FOLDER)) and (last := checkpoint.last(run.out)):
            remark(f"the best by {run.best} is exported: {kept.name} of {last.name}")
        print(folder)
    distributed.leave()
    return 0
