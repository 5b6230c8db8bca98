"""A run from its first step, or its last checkpoint, to the exported model; what goes wrong is said in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from jdm.data.pictures import UnreadableError
from jdm.errors import RunError, TerminatedError, UsageError, in_short, remedy
from jdm.run import Run
from jdm.training import checkpoint, distributed
from jdm.training.folder import claimed
from jdm.training.memory import out_of_memory
from jdm.training.product import write_model
from jdm.training.trainer import Trainer


def train(run: Run, progress: Callable[[int, dict], None] | None = None) -> Path:
    """Train to run.steps, or until run.patience is out, resuming from the last checkpoint in run.out.

    Returns the exported model's folder.

    Args:
        progress: called after every step with its number and the latest numbers.

    Raises:
        UsageError: the run cannot start. RunError: it failed; the message names the last good checkpoint.
        TerminatedError: SIGTERM came; the step was finished and saved.
    """
    try:
        return _trained(run, progress)
    except Exception as error:
        if (cause := distributed.with_cause(error)) is not error:
            raise cause from error
        raise


def _trained(run: Run, progress: Callable[[int, dict], None] | None) -> Path:
    trainer, step = None, 0
    try:
        with claimed(run := distributed.join(run)):
            trainer = Trainer(run)
            step = trainer.start
            with trainer.watching, distributed.Terminator() as terminator:
                if step == 0:
                    trainer.watching.show(step, False, trainer.averaged)
                for step in range(trainer.start, run.steps):
                    if trainer.best.ended:
                        break
                    logs = trainer.step(step)
                    if progress and distributed.first():
                        progress(step + 1, logs)
                    if distributed.agreed(terminator.asked):
                        raise TerminatedError(f"asked to end; saved {trainer.save(step + 1)}, from which the same "
                                              "command resumes")
            return write_model(trainer)
    except UnreadableError as error:  # before any phase of its step moved anything
        if trainer is None or step == trainer.start or distributed.size() > 1:
            raise
        raise UsageError(f"{error}; saved {trainer.save(step)}, from which the same command goes on") from None
    except torch.OutOfMemoryError:
        raise RunError(out_of_memory(run, trainer and trainer.task)) from None
    except RuntimeError as error:
        if not distributed.lost(error):
            raise
        raise distributed.LostError(
            f"another process of this run was lost at step {step} ({in_short(error)}); start it again: it goes on from "
            f"{checkpoint.last(run.out) or 'the start'}") from None
    except OSError as error:  # the log, the pictures, the exported folder
        raise RunError(f"{error.filename or run.out}: {error.strerror or error}; {remedy(error)} and run again: it "
                       f"goes on from {checkpoint.last(run.out) or 'the start'}") from error
