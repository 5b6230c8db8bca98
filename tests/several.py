"""Compares what several processes compute with what one does.

python several.py OUT TEACHER ACTION...             each action in this process, or in those of torchrun
python several.py OUT TEACHER forked:N ACTION...    the same in N processes, forked after the imports
python several.py OUT TEACHER all                   ALL; `more` is MORE, `scales` is GRADIENTS

An action is KIND:SHARD[:NAME...]. `gradients` and `trained` compute in float64, where the order of a sum changes
nothing that a bound of 1e-9 sees; `critic`, gradients of a run whose term brings a module, computes in float32, as the
teacher's features are.
"""

import os
import shutil
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

import jdm.evaluation.evaluate
import jdm.training.loop
import jdm.training.trainer
import tiny
from jdm.cli.streams import failed
from jdm.errors import RunError
from jdm.loading import Loaded
from jdm.models.family import Denoiser
from jdm.recipes import find
from jdm.regularisers import Adversarial
from jdm.run import Optimiser, Run
from jdm.training import checkpoint, distributed
from jdm.training.product import write_model
from jdm.training.trainer import Trainer
from tiny import nano_canny, nano_diff_instruct

STEPS, SAVED = 5, 3  # the last zero convolutions and LoRAs wake at the third step
# In turn, what one process, then two, and then one again compute: one folder for each name.
# A process's first optimiser step on a new mesh costs seconds (DTensor plans it), so actions of one mesh stay together.
ALL = [
    (1, ["gradients:1:full", "trained:1:whole:one-to-two"]),
    (2, ["gradients:1:full", "gradients:2:full", "exported:2:model", "judged:2:judged", "trained:1:replicated",
         "trained:2:sharded:two-to-four:two-to-one", "trained:2:one-to-two"]),
    (1, ["trained:1:two-to-one"]),
]
MORE = [(1, ["critic:1:gan", "gradients:1:lora"]), (2, ["critic:1:gan", "critic:2:gan", "gradients:2:lora"])]
FOUR = ["gradients:2:full", "gradients:4:full", "trained:2:two-to-four", "trained:4:sharded-over-four"]  # for four
GRADIENTS = [(1, ["gradients:1:full", "gradients:1:lora"]), (2, ["gradients:2:full", "gradients:2:lora"]),
             (4, ["gradients:4:full"])]
IN_DOUBLE = ("gradients", "trained")
RANKS = {"full": 0, "lora": 2, "gan": 0}
ZERO = (".lora_B.", "controlnet_", "pos_embed_input", "before_proj", "after_proj")  # zero at the start


def run_of(out: Path, teacher: Path, shard: int, ranks: str = "full", **changes) -> Run:
    """JDM on the tiny teacher, or Decoupled DMD with a critic ("gan"), whose networks move from the first step on.

    It saves nothing by itself.
    """
    recipe = nano_canny()
    if ranks == "gan":
        ddmd = find("nano-ddmd-4")()
        recipe = replace(ddmd, method=replace(ddmd.method, regulariser=Adversarial()))
    run = tiny.run(recipe, out, teacher, steps=100, shard=shard, **changes)
    method: Any = at_once(run.method)
    rank = RANKS[ranks]
    method = replace(method, student=replace(method.student, rank=rank), fake=replace(method.fake, rank=rank))
    return replace(run, method=method, save_every=100)


def at_once(settings: Any) -> Any:
    """A method's settings with one step of warm-up in every optimiser."""
    if isinstance(settings, Optimiser):
        return replace(settings, warmup=1)
    return replace(settings, **{k: at_once(v) for k, v in vars(settings).items() if is_dataclass(v)})


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
            if any(part in key for part in ZERO):
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


def trained(out: Path, teacher: Path, shard: int, name: str, *copies: str) -> None:
    """Up to STEPS. A fresh run saves at SAVED where folders to copy it to are named; a resumed one at its end."""
    resumed = (out / name).exists()
    trainer = Trainer(replace(run_of(out / name, teacher, shard), save_every=STEPS if resumed else 100))
    for step in range(trainer.start, STEPS):
        trainer.step(step)
        if step + 1 == SAVED and copies:
            checkpoint.save(trainer.state, trainer.run.out, SAVED)
            for copy in copies if distributed.first() else ():
                shutil.copytree(out / name, out / copy)
    keep(out, name, everything(trainer))


def exported(out: Path, teacher: Path, shard: int, name: str) -> None:
    """A step in float32 with its probe and preview, exported; and the averages that should be in the folder."""
    trainer = Trainer(replace(run_of(out / name, teacher, shard), steps=1, probe_every=1, preview_every=1))
    trainer.step(0)
    write_model(trainer)
    keep(out, name, {f"{n}.{k}": v for n, average in trainer.averages.items() for k, v in average.items()})


def judged(out: Path, teacher: Path, shard: int, name: str) -> None:
    """Ended by its judge. By the first process alone step 1 was the best, by their mean step 2."""
    seen = [(-1.0, -4.0), (-2.0, -2.0), (-9.0, -9.0), (0.0, 0.0)]
    run = replace(run_of(out / name, teacher, shard), probe_every=1, best="judge", patience=1)
    step = Trainer.step

    def watched(trainer: Trainer, number: int) -> dict:
        trainer.task.probe = lambda modules: {"judge": seen[number][distributed.rank()]}
        logs = step(trainer, number)
        keep(out, f"{name}-{number + 1}", {f"{n}.{k}": v for n, a in trainer.averages.items() for k, v in a.items()})
        return logs

    Trainer.step = watched
    jdm.training.loop.train(run)
    Trainer.step = step


def endless_run(out: Path, teacher: Path, shard: int) -> Run:
    """The cheapest run that has several networks to shard."""
    return replace(tiny.run(nano_diff_instruct(), out, teacher, steps=100_000, shard=shard), save_every=2)


def endless(out: Path, teacher: Path, shard: int, name: str) -> None:
    """A run that something else will end."""
    print(f"pid {os.environ.get('RANK', '0')} {os.getpid()}\n", end="", flush=True)  # torchrun's stdout is unbuffered
    try:
        jdm.training.loop.train(endless_run(out / name, teacher, shard))
    except RunError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(failed(error))  # as the command does, without waiting for the group


@contextmanager
def in_double() -> Iterator[None]:
    """Every network of a run computes in float64: its weights, and what comes in."""
    settle, forward = jdm.training.trainer.settle, Denoiser.forward

    def doubled(run: Run, *networks: nn.Module) -> None:
        settle(run, *networks)
        for network in networks:
            network.double()

    def cast(self: Denoiser, x_t, index, text, control=None):
        return forward(self, x_t.double(), index, doubled_text(text), None if control is None else control.double())

    def doubled_text(text):
        if isinstance(text, torch.Tensor):
            return text.double()
        return text[0].double(), {k: v.double() if v.is_floating_point() else v for k, v in text[1].items()}

    warn = Loaded.warn_of_misfits
    torch.set_default_dtype(torch.float64)
    jdm.training.trainer.settle, Denoiser.forward = doubled, cast
    Loaded.warn_of_misfits = lambda self: None  # it asks the networks before they are doubled
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        jdm.training.trainer.settle, Denoiser.forward, Loaded.warn_of_misfits = settle, forward, warn


def main(out: Path, teacher: Path, actions: list[str]) -> None:
    kinds = {"trained": trained, "exported": exported, "judged": judged, "endless": endless}
    for action in actions:
        kind, shard, *more = action.split(":")
        if kind in ("gradients", "critic"):
            gradients(out, teacher, int(shard), more[0], *map(int, more[1:]))
        else:
            kinds[kind](out, teacher, int(shard), *more)


def forked(n: int, out: Path, teacher: Path, actions: list[str]) -> int:
    """The worst exit code of n processes, forked before torch has computed anything."""
    with socket.socket() as spare:
        spare.bind(("127.0.0.1", 0))
        port = spare.getsockname()[1]
    children = []
    for rank in range(n):
        if child := os.fork():
            children.append(child)
            continue
        try:
            if n > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1",
                                  MASTER_PORT=str(port))
            computed(out, teacher, actions)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for child in children)


def computed(out: Path, teacher: Path, actions: list[str]) -> None:
    """The actions in this process: first those in float32, then those in float64."""
    torch.set_num_threads(1)
    jdm.evaluation.evaluate.PROBE_SAMPLES = 8
    main(out, teacher, [a for a in actions if not a.startswith(IN_DOUBLE)])
    if double := [a for a in actions if a.startswith(IN_DOUBLE)]:
        with in_double():
            main(out, teacher, double)
    distributed.leave()


if __name__ == "__main__":
    folder, model, *wanted = sys.argv[1:]
    place = Path(folder), Path(model)
    if lists := {"all": ALL, "more": MORE, "scales": GRADIENTS}.get(wanted[0]):
        sys.exit(max(forked(n, *place, actions) for n, actions in lists))
    if wanted[0].startswith("forked:"):
        sys.exit(forked(int(wanted[0].removeprefix("forked:")), *place, wanted[1:]))
    computed(*place, wanted)
