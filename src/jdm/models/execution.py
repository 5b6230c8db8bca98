"""How networks compute: precision, activation checkpointing and compilation. None of it changes the function."""

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

from jdm.directions import gradient
from jdm.errors import UsageError
from jdm.models.adapters import now_on, switched_on
from jdm.run import Run

DTYPES = {"fp32": None, "bf16": torch.bfloat16}
BACKEND = "inductor"
GRAPHS = 128  # limit per function: adapters x batch x gradients, for all networks that share its code
SIZES = 64  # aspect buckets at most, each of which has graphs of its own


def computing(device: torch.device, dtype: torch.dtype | None):
    """Context with torch's autocast to `dtype`; parameters stay as they are."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def choose_attention(run: Run) -> None:
    """Chooses the process's attention before anything of a run is computed, its prompts among it.

    On a CPU, bf16 attention is computed without PyTorch's fused kernel, whose backward takes a third of a step of a
    small UNet.
    """
    fused = DTYPES[run.precision] is None or run.device != "cpu"
    torch.backends.cuda.enable_flash_sdp(fused)  # in spite of its name, the CPU's too


def settle(run: Run, *networks: nn.Module) -> None:
    """Applies the run's precision, checkpointing and compilation to the networks in place.

    With bf16 a denoiser's frozen parameters are stored in bfloat16; those that train stay in float32 and are cast when
    used. Checkpointing recomputes a block in backward instead of keeping its activations; passes without gradients are
    unaffected. A compiled network keeps its class and its parameters' names.
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
                if run.frozen == "fp8":
                    _compress_frozen(part, dtype)
                if dtype is not None:
                    _cast_frozen(part, dtype)
                if run.compile:
                    _compile(part, SIZES if run.data.buckets else 1)


def _checkpoint_pieces(decoder: nn.Module) -> None:
    """Checkpoints each residual block of an autoencoder's decoder.

    diffusers checkpoints all blocks of a resolution together, which at full size keeps most of a step's memory.
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


def _compress_frozen(denoiser: nn.Module, dtype: torch.dtype | None) -> None:
    """Keeps the frozen weights of the denoiser's `compressible` layers in 8 bits; autocast converts them when used."""
    layers: list[Any] = denoiser.compressible()  # type: ignore[operator]
    if dtype is None or not layers:
        what = "needs --precision bf16, which converts them" if layers else "knows no layers of this model"
        raise UsageError(f"--frozen fp8 {what}; leave it out")
    for layer in layers:
        if not layer.weight.requires_grad and layer.weight.dtype in (torch.float32, torch.bfloat16):
            layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)


def _compile(denoiser: nn.Module, sizes: int) -> None:
    """Compiles each network of a denoiser, with one graph per way it is called: Dynamo's guards check the adapters.

    Args:
        sizes: how many sizes of pictures it may meet; beyond Dynamo's limits it would run uncompiled, and slowly.

    Adapters and autocast are switched outside the graph, which would otherwise have to restore them. A compiled
    backward computes all gradients, needed or not: on a full copy the posterior's passes pay for its weights too.
    """
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, GRAPHS * sizes)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 2 * GRAPHS * sizes)
    for network in denoiser.children():
        for part in network if isinstance(network, nn.ModuleList) else [network]:
            if part._compiled_call_impl is None:  # a UNet may serve several denoisers
                part.compile(backend=BACKEND, dynamic=False)


def checkpointed(block: nn.Module, *inputs: Any) -> Tensor:
    """`block(*inputs)`, recomputed in backward with the adapters that are active now."""
    if torch.compiler.is_compiling():  # the graph includes its adapters
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    on = now_on()
    return checkpoint(block.__call__, *inputs, use_reentrant=False, preserve_rng_state=False,
                      context_fn=lambda: (nullcontext(), switched_on(on)))


def picture_by_picture(value: Callable[[Tensor, slice], Tensor]) -> Callable[[Tensor], Tensor]:
    """x [B, ...] -> [B], sample by sample, each sample's gradient taken before the next, so that memory is that of one.

    Args:
        value: (x of some rows, the rows) -> one value per row, of that row alone. Differentiated once, in the forward.
    """
    return lambda x: OneByOne.apply(x, value)  # type: ignore[return-value]


class OneByOne(torch.autograd.Function):
    """`picture_by_picture`'s forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Callable[[Tensor, slice], Tensor]) -> Tensor:
        values, gradients = [], []
        for k in range(len(x)):
            with torch.enable_grad():
                row = x[k : k + 1].detach().requires_grad_()
                found = value(row, slice(k, k + 1))
                gradients.append(gradient(found, row, 1))
            values.append(found.detach())
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *along: Tensor) -> tuple[Tensor, None]:
        (gradients,) = ctx.saved_tensors
        return along[0].view(-1, *[1] * (gradients.ndim - 1)).to(gradients) * gradients, None
