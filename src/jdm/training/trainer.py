"""One step of a run: phases in turn, each moving only its own parameters; then averages, measurements, a checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from jdm.errors import RunError, UsageError, plural
from jdm.loading import Loaded
from jdm.models.execution import settle
from jdm.run import Phase, Run
from jdm.sharing import Means, batch_mean, part_of, sharing
from jdm.training import checkpoint, distributed
from jdm.training.averages import averaged, copied_state, move
from jdm.training.best import Best
from jdm.training.monitors import Monitors
from jdm.training.optimiser import adamw
from jdm.training.previews import refuse_unseen
from jdm.training.record import Log, Skipped, record, refuse_another
from jdm.training.trackers import refuse_missing
from jdm.training.watching import Watching


class Trainer:
    """A run in progress: the task's networks, their optimisers, averages and checkpoints.

    Raises:
        UsageError: the run cannot start.
    """

    def __init__(self, run: Run):
        run = distributed.join(run)
        refuse_missing(run)
        torch.manual_seed(run.seed)
        loaded, place = Loaded(run), checkpoint.last(run.out)
        self.run, self.task = run, run.method.task(loaded)
        refuse_unseen(run, self.task)
        if not place and distributed.first():
            loaded.warn_of_misfits()
        settle(run, *self.task.frozen, *self.task.modules.values())
        distributed.shard(self.task, run)
        self.optimizers = {p.name: adamw(p) for p in self.task.phases}
        self.averages = {n: copied_state(self.task.modules[n]) for n in self.task.product.modules}
        self.state = checkpoint.State(self.task.modules, self.optimizers, self.averages, {})
        if checkpoint.last(run.out):
            refuse_another(run)
        place = distributed.by_first(lambda: checkpoint.newest_whole(run.out, aside=True))
        self.start = int(checkpoint.load(self.state, place)["step"]) if place else 0
        if self.start > run.steps:
            raise UsageError(f"{place} is past {plural(run.steps, 'step')} already; raise --steps or choose "
                             "another --out")
        distributed.by_first(lambda: record(run, loaded.pictures, self.start, loaded.preprocessor))
        self.skipped = Skipped(run, loaded)
        self.log = Log(run.out / "metrics.jsonl", self.start)
        distributed.barrier()  # the log is cut back before anyone reads it
        self.best = Best(run, self.log.path, bool(self.task.probe))
        self.saved = place
        self.watching = Watching(run, self.task, self.start, self.log, Monitors(self.log.path))
        self.averaged = partial(averaged, self.task.modules, self.averages)

    def step(self, step: int) -> dict[str, Any]:
        """One iteration: every phase in turn, averages, measurements, log, checkpoint."""
        run, clock, done = self.run, time.perf_counter(), step + 1
        logs = self._phases(step)
        for name, average in self.averages.items():
            move(average, self.task.modules[name], min(run.ema, (1 + step) / (10 + step)))
        probed = run.probe_every and self.task.probe and (done % run.probe_every == 0 or done == run.steps)
        if probed and self.task.probe:
            with self.averaged() as modules:
                measured = self.task.probe(modules)
            self.best.note(done, measured, self.averages)
            logs |= {f"probe/{k}": v for k, v in measured.items()}
        if probed or done % run.log_every == 0 or done == run.steps:
            self.log.write(done, logs | {"seconds": time.perf_counter() - clock})
            self.watching.warn(logs, done)
        self.skipped.note(done)
        last = done == run.steps or self.best.ended
        self.watching.show(done, last, self.averaged)
        if done % run.save_every == 0 or last:
            self.save(done)
        return logs

    def save(self, done: int) -> Path:
        """Writes the checkpoint after `done` steps, unless it was before.

        Raises:
            RunError: a tensor of it is not finite; the checkpoint before it stays the last.
        """
        if self.saved is not None and self.saved.name == checkpoint.name_of(done):
            return self.saved
        checkpoint.refuse_not_finite(self.state, self.run.out, done)
        self.saved = checkpoint.save(self.state, self.run.out, done)
        self.watching.page()
        return self.saved

    def _phases(self, step: int) -> dict[str, Any]:
        logs: dict[str, Any] = {}
        begun = self._begun(step, 0) if self.run.accumulate == 1 else None
        for phase in self.task.phases:
            if step < phase.start or step % phase.every:
                continue
            for repeat in range(phase.repeats):
                gradients, loss, more = self._gradients(phase, step, repeat, begun)
                norm = _step(phase, self.optimizers[phase.name], gradients, step, self.run)
                more |= phase.after(more) if phase.after else {}
                if not math.isfinite(norm) or not math.isfinite(loss):
                    raise self._not_finite(phase, step, norm)
            logs |= more | {f"{phase.name}/loss": loss, f"{phase.name}/gradient": norm}
        return logs

    def _begun(self, step: int, turn: int) -> Any:
        """This process's share of the batch, or a turn's part of that."""
        turns = self.run.accumulate
        with sharing(distributed.rank() * turns + turn, distributed.size() * turns):
            return self.task.begin(step)

    def _gradients(self, phase: Phase, step: int, repeat: int,
                   begun: Any) -> tuple[list[Tensor | None], float, dict[str, Any]]:
        """Gradients of the global batch's mean loss, that loss, and the mean of what its parts log."""
        turns, total, value, logs = self.run.accumulate, None, torch.zeros(()), []
        parts = [begun] if begun is not None else [self._begun(step, turn) for turn in range(turns)]
        means = self._surveyed(phase, parts, repeat)
        for turn in range(turns):
            with part_of(means) if means else nullcontext():
                loss, more = phase.loss(parts[turn], repeat)
            parts[turn] = None  # its graph is not needed beside the next part's
            value, found = value.to(loss.device) + loss.detach() / turns, self._backward(loss / turns, phase)
            total = found if total is None else [_sum(a, b) for a, b in zip(total, found, strict=True)]
            logs.append(more)
            del loss
        assert total is not None
        return total, float(batch_mean(value)), _mean(logs)

    def _surveyed(self, phase: Phase, parts: Sequence[Any], repeat: int) -> Means | None:
        """The means over the whole batch that the loss of each part asks for; None where none are needed."""
        if len(parts) == 1 or not phase.asks_batch:
            return None
        means = Means()
        for part in parts:
            with torch.no_grad(), part_of(means):
                phase.loss(part, repeat)
        means.settle()
        return means

    def _backward(self, loss: Tensor, phase: Phase) -> list[Tensor | None]:
        if distributed.size() == 1:
            return list(torch.autograd.grad(loss, phase.parameters, allow_unused=True))
        trained = (p for module in self.task.modules.values() for p in module.parameters())
        return distributed.averaged_gradients(loss, phase.parameters, trained)

    def _not_finite(self, phase: Phase, step: int, norm: float) -> RunError:
        what = "gradients that are" if not math.isfinite(norm) else "a loss that is"
        good = checkpoint.last(self.run.out) or "none yet"
        return RunError(f"phase {phase.name} gave {what} not finite at step {step}; last good checkpoint: {good}; "
                        f"lower its learning rate ({phase.groups[0][1].lr:g}) or raise its warm-up, and run again")


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


def _mean(logs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of each value over a batch's parts."""
    return {k: sum(part[k] for part in logs) / len(logs) for k in logs[0]} if len(logs) > 1 else logs[0]


def _step(phase: Phase, optimizer: torch.optim.Optimizer, gradients: Sequence[Tensor | None], step: int,
          run: Run) -> float:
    """Clip and apply, unless the norm is not finite. Returns the norm before clipping."""
    present = [g for g in gradients if g is not None]
    total = torch.nn.utils.get_total_norm(present)
    norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
    if not math.isfinite(norm):
        return norm
    torch._foreach_mul_([distributed.local(g) for g in present], min(1.0, phase.clip / (norm + 1e-6)))
    for parameter, gradient in zip(phase.parameters, gradients, strict=True):
        parameter.grad = gradient
    for group, (_, optimiser) in zip(optimizer.param_groups, phase.groups, strict=True):
        group["lr"] = optimiser.rate(step, run.steps)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
