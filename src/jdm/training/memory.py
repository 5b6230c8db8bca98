"""Advice for a run that is out of memory: the options that are still off, and what each would save."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from jdm.run import Run, Task
from jdm.size import bytes_of
from jdm.training.distributed import local

GIB = 2**30


def out_of_memory(run: Run, task: Task | None) -> str:
    """One-line message for a device without free memory: the options that are still off and what each would save.

    Args:
        task: the run's task, or None if it could not be built; without it savings are given without numbers.
    """
    found = "; ".join(_savings(run, task)) or f"a smaller --batch than {run.batch}, or more processes with --shard"
    return f"{run.device} has no memory left; these options save some: {found}. jdm estimate gives the total"


def _savings(run: Run, task: Task | None) -> list[str]:
    method: Any = run.method
    found: list[str] = []
    if not run.checkpointing:
        found.append("--checkpointing, most of the activations")
    if task and run.precision == "fp32":
        frozen = _bytes(p for network in task.frozen for p in network.parameters() if not p.requires_grad)
        found.append(f"--precision bf16, {frozen / 2 / GIB:.1f} GiB of frozen weights and half the activations")
    if task and "fake" in task.modules and getattr(getattr(method, "fake", None), "rank", None) == 0:
        weights = _bytes(task.modules["fake"].parameters())
        found.append(f"--method.fake.rank 64, about {3 * weights / GIB:.1f} GiB of weights, gradients and moments")
    wide = sum(_bytes(parameters) * (1 if optimiser.betas[0] == 0 else 2)
               for phase in (task.phases if task else ()) for parameters, optimiser in phase.groups
               if optimiser.states == "float32")
    if wide:
        found.append("8-bit moments (--method.student.optimiser.states 8bit and the others), "
                     f"{wide * 0.75 / GIB:.1f} GiB")
    if run.batch // run.accumulate > 1:
        found.append(f"--accumulate {2 * run.accumulate}, half the activations")
    return found


def _bytes(tensors: Iterable[Tensor]) -> int:
    return bytes_of(local(t.data) for t in tensors)
