"""Counts the FLOPs of a program by pass and its live bytes, on any device."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from jdm.errors import UsageError
from jdm.size import Size, height_width

aten = torch.ops.aten
# PyTorch's table has only the attention kernels of GPUs; the CPU's kernel computes the same products.
FORMULAS: dict[Any, Any] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
CONVOLUTIONS = {aten.convolution, aten._convolution, aten.cudnn_convolution, aten.convolution_backward}
SLACK = 0.005  # dead storages are searched for only when the total may exceed the peak by this share
BYTES_PER_PIXEL = 84  # of a batch's pictures and their controls, which an estimate computes for real


def refuse_large(batch: int, size: Size) -> None:
    """UsageError if estimating such a batch would take more than half of this machine's free memory."""
    needed = float(batch) * math.prod(height_width(size)) * BYTES_PER_PIXEL
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free / 2:
        raise UsageError(f"a batch of {batch:,} cannot be estimated here: its pictures are real tensors, and would "
                         f"take {needed / 2**30:,.1f} of the {free / 2**30:,.1f} GiB of memory that are free; "
                         "estimate a smaller --batch, as time and activations grow in proportion")


class Ledger:
    """Bytes of live storages, each counted once, and their maximum to within SLACK.

    Uses PyTorch's weak references, because Python's refer to the wrapper of a storage and not to the storage.
    """

    def __init__(self):
        self.bytes = self.peak = self.clock = self.peak_clock = 0
        self._known: dict[int, tuple[StorageWeakRef, int, int]] = {}  # reference, bytes, clock at creation

    def add(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        if storage._cdata in self._known and not self._known[storage._cdata][0].expired():
            return
        self.clock += 1
        replaced = self._known.get(storage._cdata)
        self._known[storage._cdata] = StorageWeakRef(storage), storage.nbytes(), self.clock
        self.bytes += storage.nbytes() - (replaced[1] if replaced else 0)
        if self.bytes > self.peak * (1 + SLACK):
            self._drop_dead()
            if self.bytes > self.peak:
                self.peak, self.peak_clock = self.bytes, self.clock

    def now(self) -> int:
        """The exact number of live bytes."""
        self._drop_dead()
        return self.bytes

    def reset_peak(self) -> None:
        self._drop_dead()
        self.peak, self.peak_clock = self.bytes, self.clock

    def there_at_peak(self, tensors: Iterable[Tensor | None]) -> int:
        """Bytes of those of the given live tensors that existed at the peak."""
        keys = {t.untyped_storage()._cdata for t in tensors if t is not None}
        found = [self._known[key] for key in keys if key in self._known]
        return sum(n for _, n, created in found if created <= self.peak_clock)

    def _drop_dead(self) -> None:
        for key in [key for key, (reference, *_) in self._known.items() if reference.expired()]:
            self.bytes -= self._known.pop(key)[1]


class Meter(TorchDispatchMode):
    """Counts FLOPs and bytes while it is active, on real and on fake tensors.

    Attributes:
        label: name to which FLOPs are assigned; set it before a forward or backward pass.
        flops: FLOPs by (label, backward, kind of arithmetic); the kind is "convolution" or "product" and the dtype.
        alive: the storages created under the meter.
        held: largest number of live bytes at the start of a backward pass, which includes what autograd saved for it.
    """

    def __init__(self):
        super().__init__()
        self.label = ""
        self.flops: Counter[tuple[str, bool, str]] = Counter()
        self.alive, self.held, self._task = Ledger(), 0, -1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        kwargs, task = kwargs or {}, torch._C._current_graph_task_id()
        if task != -1 and task != self._task:
            self._task, self.held = task, max(self.held, self.alive.now())
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in FORMULAS:
            done = FORMULAS[packet](*args, **kwargs, out_val=out)
            kind = "convolution" if packet in CONVOLUTIONS else "product"
            dtype = str(next(a.dtype for a in args if isinstance(a, Tensor))).removeprefix("torch.")
            self.flops[self.label, task != -1, f"{kind} {dtype}"] += done
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self.alive.add(value)
        return out

    def reset_peak(self) -> None:
        self.alive.reset_peak()
        self.held = 0


def converted(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module._apply, used by `to` and `float`; torch's version cannot replace one fake tensor by another."""
    for child in module.children() if recurse else ():
        converted(child, fn)
    for key, old in module._parameters.items():
        with torch.no_grad():
            new = old if old is None else fn(old)
        if new is not old and old is not None and new is not None:
            module._parameters[key] = nn.Parameter(new, old.requires_grad)
    for key, old in module._buffers.items():
        module._buffers[key] = old if old is None else fn(old)
    return module
