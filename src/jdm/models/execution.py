"""How networks compute: in which precision, and what is kept for backward. What they compute does not change."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jdm.models.adapters import now_on, switched_on
from jdm.run import Run

DTYPES = {"fp32": None, "bf16": torch.bfloat16}


def computing(device: torch.device, dtype: torch.dtype | None):
    """Networks inside compute in `dtype` where they can: torch's autocast, parameters in float32 staying so."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def settle(run: Run, *networks: nn.Module) -> None:
    """Have the networks compute as the run says, in place.

    In bf16 a denoiser's frozen parameter is kept in bfloat16; one that trains stays in float32 and is cast where it is
    used. Checkpointing recomputes a block in backward in place of keeping its activations; a pass without gradients is
    not touched by it.
    """
    dtype = DTYPES[run.precision]
    for network in networks:
        for part in network.modules():
            if run.checkpointing and getattr(part, "_supports_gradient_checkpointing", False):
                part.enable_gradient_checkpointing(checkpointed)  # type: ignore[operator]
            if "autocast" in part.__dict__:  # a denoiser
                part.autocast = dtype  # type: ignore[assignment]
                if dtype is not None:
                    _cast_frozen(part, dtype)


def _cast_frozen(network: nn.Module, dtype: torch.dtype) -> None:
    for part in network.modules():
        for key, p in part._parameters.items():
            if p is not None and not p.requires_grad and p.dtype == torch.float32:
                part._parameters[key] = nn.Parameter(p.to(dtype), requires_grad=False)


def checkpointed(block: nn.Module, *inputs: Any) -> Tensor:
    """`block(*inputs)`, recomputed in backward under the adapters that are on now."""
    on = now_on()
    return checkpoint(block.__call__, *inputs, use_reentrant=False, preserve_rng_state=False,
                      context_fn=lambda: (nullcontext(), switched_on(on)))
