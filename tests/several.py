"""python several.py OUT TEACHER ACTION...: what several processes compute, and what one does.

An action is KIND:SHARD[:NAME]. Alone, or under torchrun. In float64 but for `gradients`, so that the order of a sum is
all that can differ.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

import jdm.evaluate
import jdm.train
import tiny
from jdm import checkpoint, distributed
from jdm.cli import _failed
from jdm.errors import RunError
from jdm.methods.jdm import JDM
from jdm.models.stable_diffusion import Denoiser
from jdm.recipes.nano import nano_canny
from jdm.run import Run
from jdm.train import Trainer

STEPS, HALF = 10, 5
RANKS = {"full": {}, "lora": {"student_rank": 2, "fake_rank": 2}}


def run_of(out: Path, teacher: Path, shard: int, ranks: str = "full", **changes) -> Run:
    run = tiny.run(nano_canny(), out, teacher, steps=STEPS, shard=shard, **changes)
    method: JDM = run.method
    fast = {k: replace(getattr(method, k), warmup=1) for k in ("unet", "controlnet", "fake", "posterior")}
    return replace(run, method=replace(method, **fast, **RANKS[ranks]), save_every=STEPS)


def gathered(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: (v.full_tensor() if hasattr(v, "full_tensor") else v).detach().clone()
            for k, v in sorted(tensors.items())}


def keep(out: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    tensors = gathered(tensors)
    if distributed.first():
        torch.save(tensors, out / f"{name}.pt")


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Networks, averages and what the optimisers hold."""
    found = {f"{n}.{k}": v for n, m in trainer.task.modules.items() for k, v in checkpoint.trained(m).items()}
    found |= {f"average.{n}.{k}": v for n, average in trainer.averages.items() for k, v in average.items()}
    for name, optimizer in trainer.optimizers.items():
        for i, slots in optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{name}.{i}.{k}": v for k, v in slots.items()}
    return found


def gradients(out: Path, teacher: Path, shard: int, ranks: str, accumulate: int = 1) -> None:
    """Each phase's gradients at step 0, and the bytes of parameters that this process holds."""
    n = int(os.environ.get("WORLD_SIZE", "1"))
    name = f"gradients-{ranks}-{n}x{shard}" + (f"-{accumulate}" if accumulate > 1 else "")
    trainer = Trainer(run_of(out / name, teacher, shard, ranks, accumulate=accumulate, batch=8))
    for module in trainer.task.modules.values():  # adapters and zero convolutions that speak, alike in every process
        for key, p in module.named_parameters():
            if ".lora_B." in key or "controlnet_" in key:
                drawn = torch.randn(p.shape, generator=torch.Generator().manual_seed(len(key))) * 0.1
                distributed.local(p.data).copy_(distributed.local(distributed.placed_like(drawn, p.data)))
    begun = trainer._begun(0, 0) if accumulate == 1 else None
    found = {}
    for phase in trainer.task.phases:
        for i, gradient in enumerate(trainer._gradients(phase, 0, 0, begun)[0]):
            if gradient is not None:
                found[f"{phase.name}.{i}"] = gradient
    keep(out, name, found)
    shared = {id(p): p.data for m in [*trainer.task.frozen, *trainer.task.modules.values()] for p in m.parameters()
              if isinstance(p.data, DTensor)}.values()
    held, whole = sum(distributed.local(p).nbytes for p in shared), sum(p.nbytes for p in shared)
    print(f"bytes {name} {distributed.rank()} held {held} of {whole}\n", end="", flush=True)


def trained(out: Path, teacher: Path, shard: int, name: str) -> None:
    """To the end, from the last checkpoint of the folder `name` if there is one; a -half stops in the middle."""
    trainer = Trainer(run_of(out / name, teacher, shard))
    last = HALF if trainer.start == 0 and name.startswith("half") else STEPS
    for step in range(trainer.start, last):
        trainer.step(step)
    if last == HALF:
        checkpoint.save(trainer.state, trainer.run.out, HALF)
    keep(out, f"{name}-at-{last}", everything(trainer))


def exported(out: Path, teacher: Path, shard: int, name: str) -> None:
    """Two steps in float32 by `train`, exported."""
    jdm.train.train(replace(run_of(out / name, teacher, shard), steps=2, save_every=1, probe_every=1))


def endless(out: Path, teacher: Path, shard: int, name: str) -> None:
    """A run that something else will end."""
    run = replace(run_of(out / name, teacher, shard), steps=100_000, save_every=2, log_every=1)
    print(f"pid {os.environ.get('RANK', '0')} {os.getpid()}", flush=True)
    try:
        jdm.train.train(run)
    except RunError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(_failed(error))  # as the command does, without waiting for the group


def in_double() -> None:
    """Every network computes in float64: its weights, and what comes in."""
    settle, forward = jdm.train.settle, Denoiser.forward

    def doubled(run: Run, *networks: nn.Module) -> None:
        settle(run, *networks)
        for network in networks:
            network.double()

    def cast(self: Denoiser, x_t, index, text, control=None):
        return forward(self, x_t.double(), index, text.double(), None if control is None else control.double())

    torch.set_default_dtype(torch.float64)
    jdm.train.settle, Denoiser.forward = doubled, cast


def main(out: Path, teacher: Path, actions: list[str]) -> None:
    kinds = {"trained": trained, "exported": exported, "endless": endless}
    for action in actions:
        kind, shard, *more = action.split(":")
        if kind == "gradients":
            gradients(out, teacher, int(shard), more[0], *map(int, more[1:]))
        else:
            kinds[kind](out, teacher, int(shard), *more)


if __name__ == "__main__":
    folder, model, *wanted = sys.argv[1:]
    torch.set_num_threads(1)
    jdm.evaluate.PROBE_SAMPLES = 8
    main(Path(folder), Path(model), [a for a in wanted if not a.startswith("trained")])
    if double := [a for a in wanted if a.startswith("trained")]:
        in_double()
        main(Path(folder), Path(model), double)
    distributed.leave()
