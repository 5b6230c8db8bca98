"""One loop for every method: phases in turn, each moving only its own parameters."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jdm import checkpoint
from jdm.errors import RunError, UsageError
from jdm.run import Phase, Run, Task, described


def train(run: Run, progress: Callable[[int, dict], None] | None = None) -> Path:
    """Train to run.steps, resuming from the last checkpoint in run.out; returns the exported model's folder.

    Args:
        progress: called after every step with its number and the latest numbers.

    Raises:
        UsageError: the run cannot start. RunError: it failed; the message names the last good checkpoint.
    """
    if run.steps < 1 or run.batch < 1:
        raise UsageError(f"steps and batch must be at least 1, got {run.steps} and {run.batch}")
    torch.manual_seed(run.seed)
    task = run.method.task(run)
    optimizers = {p.name: p.optimizer() for p in task.phases}
    averages = {n: _frozen_copy(task.modules[n]) for n in task.averaged}
    state = checkpoint.State(task.modules, optimizers, averages, {})
    _record(run)
    place = checkpoint.last(run.out)
    start = int(checkpoint.load(state, place)["step"]) if place else 0
    if start > run.steps:
        raise UsageError(f"{place} is past {run.steps} steps already; raise --steps or choose another --out")
    log = _Log(run.out / "metrics.jsonl", start)
    for step in range(start, run.steps):
        clock = time.perf_counter()
        logs = _iteration(task, optimizers, step, run)
        for name, average in averages.items():
            _average(average, task.modules[name], min(run.ema, (1 + step) / (10 + step)))
        done = step + 1
        if run.probe_every and task.probe and (done % run.probe_every == 0 or done == run.steps):
            logs |= {f"probe/{k}": v for k, v in task.probe(averages).items()}
        if done % run.log_every == 0 or done == run.steps or "probe/" in "".join(logs):
            log.write(done, logs | {"seconds": time.perf_counter() - clock})
        if done % run.save_every == 0 or done == run.steps:
            checkpoint.save(state, run.out, done)
        if progress:
            progress(done, logs)
    folder = run.out / "model"
    task.export(folder, averages)
    return folder


def _iteration(task: Task, optimizers: dict, step: int, run: Run) -> dict[str, Any]:
    logs: dict[str, Any] = {}
    state = task.begin(step)
    for phase in task.phases:
        if step % phase.every:
            continue
        for repeat in range(phase.repeats):
            loss, more = phase.loss(state, repeat)
            gradients = torch.autograd.grad(loss, phase.parameters, allow_unused=True)
            norm = _step(phase, optimizers[phase.name], gradients, step, run)
            if not math.isfinite(norm) or not math.isfinite(float(loss.detach())):
                where = checkpoint.last(run.out)
                raise RunError(
                    f"phase {phase.name} gave {'a loss' if math.isfinite(norm) else 'gradients'} that "
                    f"{'is' if math.isfinite(norm) else 'are'} not finite at step {step}; "
                    f"last good checkpoint: {where or 'none yet'}; lower its learning rate "
                    f"({phase.groups[0][1].lr:g}) or raise its warm-up, and run again")
        logs |= more | {f"{phase.name}/loss": loss.detach(), f"{phase.name}/gradient": norm}
    return logs


def _step(phase: Phase, optimizer: torch.optim.Optimizer, gradients: Sequence[Tensor | None], step: int,
          run: Run) -> float:
    """Clip and apply, unless the norm is not finite. Returns the norm before clipping."""
    present = [g for g in gradients if g is not None]
    norm = float(torch.nn.utils.get_total_norm(present))
    if not math.isfinite(norm):
        return norm
    torch._foreach_mul_(present, min(1.0, phase.groups[0][1].clip / (norm + 1e-6)))
    for parameter, gradient in zip(phase.parameters, gradients, strict=True):
        parameter.grad = gradient
    for group, (_, optimiser) in zip(optimizer.param_groups, phase.groups, strict=True):
        group["lr"] = optimiser.rate(step, run.steps)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


@torch.no_grad()
def _average(average: nn.Module, module: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)
    for kept, now in zip(average.buffers(), module.buffers(), strict=True):
        kept.copy_(now)


def _frozen_copy(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).eval().requires_grad_(False)


def _record(run: Run) -> None:
    """run.json: the recipe and the versions a run can be repeated from."""
    import platform

    import diffusers
    import transformers

    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "diffusers": diffusers.__version__, "transformers": transformers.__version__}
    record = {"run": described(run), "versions": versions, "threads": torch.get_num_threads()}
    try:
        run.out.mkdir(parents=True, exist_ok=True)
        (run.out / "run.json").write_text(json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise UsageError(f"{run.out} cannot be written ({error}); choose another --out") from None


class _Log:
    """metrics.jsonl, cut back to the step a run resumes from."""

    def __init__(self, path: Path, start: int):
        self.path = path
        lines = path.read_text().splitlines() if path.is_file() else []
        kept = [line for line in lines if _step_of(line) <= start]
        path.write_text("".join(line + "\n" for line in kept))

    def write(self, step: int, values: dict[str, Any]) -> None:
        row = {"step": step} | {k: float(v) for k, v in values.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf
