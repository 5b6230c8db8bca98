"""Runs of several processes: torchrun's process group, FSDP2 for large networks, and collective decisions.

A network is sharded over `run.shard` processes and replicated over the others: 1 is plain data parallelism, the number
of processes is full sharding. Each process computes its share of the global batch (sharing.py).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from jdm.errors import RunError, TerminatedError, UsageError, in_short, plural
from jdm.models.adapters import Adapter
from jdm.run import Run, Task
from jdm.sharing import mean_over_processes_, processes

T = TypeVar("T")
PATIENCE = timedelta(minutes=10)  # timeout of a collective, after which a silent process counts as lost
TERMINATED = 128 + signal.SIGTERM  # the exit code that schedulers read as "stopped on request"
WAIT = 3.0  # seconds for another process's error to arrive
GRACE = 20.0  # seconds from SIGTERM to the end of the step, before the process ends without it


size = processes  # in the run; 1 without a process group


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def first() -> bool:
    """True in the process that writes files and prints messages."""
    return rank() == 0


def barrier() -> None:
    if size() > 1:
        dist.barrier()


def by_first(action: Callable[[], T]) -> T:
    """Runs an action in the first process alone; its result, UsageError or RunError reaches all."""
    if size() == 1:
        return action()
    told: list[Any] = [None]
    if first():
        try:
            told = [(action(), None)]
        except (UsageError, RunError) as error:
            told = [(None, error)]
    dist.broadcast_object_list(told)
    result, error = told[0]
    if error:
        raise error
    return result


def leave() -> None:
    """Destroys the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def join(run: Run) -> Run:
    """Joins torchrun's process group, if there is one; returns the run with this process's device.

    Raises:
        UsageError: the batch or the sharding does not divide evenly among the processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        on_gpu = torch.device(run.device).type == "cuda"
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)
    if size() % run.shard:
        raise UsageError(f"--shard {run.shard} does not divide {plural(size(), 'process')}; give a divisor, or "
                         f"{size()} to shard over all of them")
    if run.batch % (size() * run.accumulate):
        raise UsageError(f"a batch of {run.batch} does not divide into {plural(size(), 'process')} times "
                         f"{plural(run.accumulate, 'accumulated part')}; give a multiple of {size() * run.accumulate}")
    return replace(run, device=f"cuda:{torch.cuda.current_device()}") if size() > 1 and run.device == "cuda" else run


def shard(task: Task, run: Run) -> None:
    """Shard the networks of every denoiser in place, by its `shard_units`, and give the task's phases the parameters
    that take the old ones' place. Other networks stay whole; their gradients are averaged (`averaged_gradients`).

    Raises:
        UsageError: the run asks for sharding and has nothing to shard.
    """
    if size() == 1:
        return
    networks = [*task.frozen, *(m for m in task.modules.values() if not isinstance(m, Adapter))]
    parts = list(dict.fromkeys(part for network in networks for part in network.modules()))
    denoisers: list[Any] = [part for part in parts if hasattr(part, "shard_units")]
    units = dict.fromkeys(unit for denoiser in denoisers for unit in denoiser.shard_units())
    if run.shard > 1 and not units:
        raise UsageError(f"--shard {run.shard}: this run has no network to shard; leave it out")
    mesh = init_device_mesh(torch.device(run.device).type, (size() // run.shard, run.shard),
                            mesh_dim_names=("replicate", "shard"))
    before = {id(p): (part, key) for part in parts for key, p in part._parameters.items() if p is not None}
    for unit in units:
        fully_shard(unit, mesh=mesh)
    inner = {part for unit in units for part in unit.modules() if part is not unit}
    for unit in [unit for unit in units if unit not in inner]:
        # FSDP2 makes the first module that runs a root; a ControlNet may run its transformer's parts before that does.
        unit._get_fsdp_state()._lazy_init()

    def now(p: nn.Parameter) -> nn.Parameter:
        part, key = before[id(p)]
        return part._parameters[key]  # type: ignore[return-value]

    for phase in task.phases:
        phase.groups = [([now(p) for p in parameters], optimiser) for parameters, optimiser in phase.groups]


def averaged_gradients(loss: Tensor, parameters: Sequence[nn.Parameter],
                       others: Iterable[nn.Parameter]) -> list[Tensor | None]:
    """Gradients of the mean of `loss` over processes, sharded like the parameters.

    FSDP2 reduces only gradients accumulated by a plain `backward`: autograd.grad and backward(inputs=...) silently
    leave a sharded parameter without one. Gradients that `backward` also writes to `others` are dropped.
    """
    loss.backward()
    gradients = [p.grad for p in parameters]
    for p in others:
        p.grad = None
    for gradient in gradients:
        if gradient is not None and not isinstance(gradient, DTensor):
            mean_over_processes_(gradient)
    return gradients


def agreed(flag: bool) -> bool:
    """True in every process if `flag` is True in any."""
    if size() == 1:
        return flag
    seen = torch.tensor([float(flag)])
    dist.all_reduce(seen, dist.ReduceOp.MAX)
    return bool(seen)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, sharing its memory; any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shards a whole tensor, equal in every process, like `like`."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


class LostError(RunError):
    """Another process ended while this one waited for it."""


def lost(error: RuntimeError) -> bool:
    """True if the error is that of a collective which another process did not join."""
    words = ("gloo", "nccl", "peer", "distbackend", "distnetwork", "timed out")
    return size() > 1 and any(word in f"{type(error).__name__} {error}".lower() for word in words)


def with_cause(error: Exception) -> Exception:
    """The error to raise for one that ended this process's part of a run.

    A process that knows its cause tells the others. One that only lost another raises what that one told; the command
    prints an error outside the first process only if it is `alone` with it.
    """
    if size() == 1 or isinstance(error, TerminatedError):
        return error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as `Terminator` does: it may have failed before or after that
    store = dist.distributed_c10d._get_default_store()
    own = isinstance(error, UsageError), str(error) if isinstance(error, UsageError | RunError) else in_short(error)
    try:
        if not isinstance(error, LostError):
            store.set(f"failed/{rank()}", json.dumps(own))
            return error if first() or _told(store, [0]) else _of_process(rank(), *own)
        for other, usage, message in _told(store, [r for r in range(size()) if r != rank()]):
            return _of_process(other, usage, message)
    except RuntimeError:  # the store's process has ended
        pass
    return error


def _of_process(number: int, usage: bool, message: str) -> Exception:
    error = (UsageError if usage else RunError)(f"process {number}: {message}")
    error.alone = True
    return error


def _told(store: dist.Store, ranks: Sequence[int]) -> list[tuple[int, bool, str]]:
    """Returns the message of the first of these processes to fail, waiting a little for it."""
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        for other in ranks:
            if store.check([f"failed/{other}"]):
                return [(other, *json.loads(store.get(f"failed/{other}")))]
        time.sleep(0.05)
    return []


class Terminator:
    """Context in which SIGTERM sets `asked`, so that the loop can finish and save the current step.

    A process that waits for a lost one cannot finish its step, so with several processes each one exits GRACE seconds
    after SIGTERM.
    """

    def __init__(self):
        self.asked = False

    def __enter__(self) -> Terminator:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = signal.signal(signal.SIGTERM, self._ask)
            if size() > 1:
                self._read, self._write = socket.socketpair()
                self._write.setblocking(False)
                # A thread sees the signal even while a collective blocks the main thread.
                signal.set_wakeup_fd(self._write.fileno())
                threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._main:
            fails = kind is not None and size() > 1 and not issubclass(kind, TerminatedError)
            # torchrun ends the others at once, before they can tell what they know
            signal.signal(signal.SIGTERM, signal.SIG_IGN if fails else self._before)
            if size() > 1:
                signal.set_wakeup_fd(-1)
                self._write.close()

    def _ask(self, *_: object) -> None:
        self.asked = True

    def _watch(self) -> None:
        while signals := self._read.recv(1):
            if signals[0] == signal.SIGTERM:
                time.sleep(GRACE)
                os._exit(TERMINATED)
