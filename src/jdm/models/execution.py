"""How networks compute: in which precision, and what is kept for backward. What they compute does not change."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jdm.models.adapters import now_on, switched_on
from jdm.run import Run

DTYPES = {"fp32": None, "bf16": torch.bfloat16}
BACKEND = "inductor"
GRAPHS = 128  # of one function: adapters x batch x gradients, for every network that shares its code


def computing(device: torch.device, dtype: torch.dtype | None):
    """Networks inside compute in `dtype` where they can: torch's autocast, parameters in float32 staying so."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def settle(run: Run, *networks: nn.Module) -> None:
    """Have the networks compute as the run says, in place.

    In bf16 a denoiser's frozen parameter is kept in bfloat16; one that trains stays in float32 and is cast where it is
    used. Checkpointing recomputes a block in backward in place of keeping its activations; a pass without gradients is
    not touched by it. A compiled network keeps its class and its parameters' names.
    """
    dtype = DTYPES[run.precision]
    for network in networks:
        for part in network.modules():
            if run.checkpointing and getattr(part, "_supports_gradient_checkpointing", False):
                if isinstance(part, AutoencoderKL):
                    _checkpoint_pieces(part.decoder)
                else:
                    part.enable_gradient_checkpointing(checkpointed)  # type: ignore[operator]
                if hasattr(part, "enable_slicing"):  # an autoencoder: one picture's activations at a time
                    part.enable_slicing()  # type: ignore[operator]
            if "autocast" in part.__dict__:  # a denoiser
                part.autocast = dtype  # type: ignore[assignment]
                if dtype is not None:
                    _cast_frozen(part, dtype)
                if run.compile:
                    _compile(part)


def _checkpoint_pieces(decoder: nn.Module) -> None:
    """Recompute an autoencoder's decoder residual block by residual block.

    diffusers' own pieces hold all blocks of a resolution: at full size, most of what a step keeps.
    """
    for part in decoder.modules():
        if isinstance(part, ResnetBlock2D | Upsample2D) and not isinstance(part.forward, partial):
            part.forward = partial(_checkpointed_call, part.forward)


def _checkpointed_call(forward: Callable[..., Tensor], *inputs: Any, **named: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **named)


def _cast_frozen(network: nn.Module, dtype: torch.dtype) -> None:
    for part in network.modules():
        for key, p in part._parameters.items():
            if p is not None and not p.requires_grad and p.dtype == torch.float32:
                part._parameters[key] = nn.Parameter(p.to(dtype), requires_grad=False)


def _compile(denoiser: nn.Module) -> None:
    """A graph for every way its networks are called: Dynamo's guards read which adapters are on.

    What is switched per pass, adapters and autocast, stays outside: the graph would have to put it back. Its backward
    finds every gradient there is, asked for or not: on a full copy the posterior's passes pay for the copy's weights.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    for network in denoiser.children():
        for part in network if isinstance(network, nn.ModuleList) else [network]:
            if part._compiled_call_impl is None:  # a UNet may serve several denoisers
                part.compile(backend=BACKEND, dynamic=False)


def checkpointed(block: nn.Module, *inputs: Any) -> Tensor:
    """`block(*inputs)`, recomputed in backward under the adapters that are on now."""
    if torch.compiler.is_compiling():  # a graph has its adapters in it
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    on = now_on()
    return checkpoint(block.__call__, *inputs, use_reentrant=False, preserve_rng_state=False,
                      context_fn=lambda: (nullcontext(), switched_on(on)))
