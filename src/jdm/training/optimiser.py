"""AdamW with less state: no first moment if beta1 is 0, and optionally 8-bit moments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import pad
from torch.optim.adamw import adamw as fused_adamw

from jdm.errors import UsageError
from jdm.run import Phase
from jdm.training.distributed import local

MOMENTS = "exp_avg", "exp_avg_sq"
BLOCK = 256  # largest number of elements in a row that share a scale
SMALL = 4096  # moments of parameters with fewer elements, and of vectors, are never quantised
OCTAVES = 10 * math.log2(10) / 254  # distance of neighbouring levels: 255 levels span ten decades, 127 span five
GOLDEN = (math.sqrt(5) - 1) / 2


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW(fused=True), bit for bit, without exp_avg in groups whose beta1 is 0.

    With beta1 = 0, exp_avg = 0 exp_avg + 1 g, so the kernel gets the gradient instead. A gradient whose strides differ
    from its parameter's is first copied to the same strides, which torch does not do but its CPU kernel needs.

    The state of a parameter is step, exp_avg_sq and, unless beta1 is 0, exp_avg. 8-bit moments are stored as codes,
    with their scales in exp_avg_sq_scale and exp_avg_scale.

    Args:
        groups: parameter groups of torch's AdamW, each with an optional `states`: "float32" keeps moments in the
            parameters' dtype; "8bit" keeps those of matrices and kernels with SMALL or more elements as `quantised`
            between steps, and all others in float.

    Raises:
        UsageError: `states` has another value.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]):
        super().__init__([{"states": "float32", **group} for group in groups], fused=True)
        if wrong := [g["states"] for g in self.param_groups if g["states"] not in ("float32", "8bit")]:
            raise UsageError(f"an optimiser's states must be float32 or 8bit, got {wrong[0]!r}")
        self._step_supports_amp_scaling = False  # a GradScaler divides the gradients itself

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            present = [p for p in group["params"] if p.grad is not None]
            self._update([p for p in present if not _packed(p, group)], group)
            for parameter in present:  # one at a time, so that only one parameter's moments are in float
                if _packed(parameter, group):
                    self._update([parameter], group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads any AdamW's state; drops an unneeded exp_avg; moments of other `states` are converted on use."""
        groups = [{**saved, "states": own["states"], "fused": True}
                  for saved, own in zip(state_dict["param_groups"], self.param_groups, strict=True)]
        super().load_state_dict({**state_dict, "param_groups": groups})
        for own, group in zip(self.param_groups, groups, strict=True):
            for parameter, number in zip(own["params"], group["params"], strict=True):
                slots, saved = self.state.get(parameter, {}), state_dict["state"].get(number, {})
                for name in MOMENTS:
                    if f"{name}_scale" in saved:  # torch has cast both to the parameter's dtype; this restores them
                        slots |= {k: saved[k].to(parameter.device) for k in (name, f"{name}_scale")}
                if not own["betas"][0]:
                    slots.pop("exp_avg", None)
                    slots.pop("exp_avg_scale", None)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """One step of some of a group's parameters."""
        beta1, beta2 = group["betas"]
        gradients = [_laid_out(p.grad, p) for p in parameters if p.grad is not None]
        steps = [self.state[p].setdefault("step", torch.zeros((), device=p.device)) for p in parameters]
        means = [self._moment(p, "exp_avg") for p in parameters] if beta1 else gradients
        squares = [self._moment(p, "exp_avg_sq") for p in parameters]
        fused_adamw(parameters, gradients, means, squares, [], steps, fused=True, amsgrad=False, maximize=False,
              beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"])
        for parameter in parameters:
            slots = self.state[parameter]
            for name in MOMENTS if _packed(parameter, group) else ():
                if name in slots:
                    kind = torch.uint8 if name == "exp_avg_sq" else torch.int8
                    codes, scale = quantised(local(slots[name]), slots["step"], kind)
                    slots |= {name: _sharded(codes, parameter), f"{name}_scale": _sharded(scale, parameter)}

    def _moment(self, parameter: Tensor, name: str) -> Tensor:
        """Returns a moment as a float tensor, stored in its slot; zeros if there is none yet."""
        slots = self.state[parameter]
        if name not in slots:
            slots[name] = torch.zeros_like(parameter)
        elif (scale := slots.pop(f"{name}_scale", None)) is not None:
            value = dequantised(local(slots[name]), local(scale)).to(parameter.dtype)
            slots[name] = _sharded(value, parameter)
        slots[name] = _laid_out(slots[name], parameter)
        return slots[name]


def quantised(moment: Tensor, step: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantises a moment to 8-bit levels at equal ratios below the largest value of each block.

    A level is 9.5% above the one below it. A value between two levels is rounded up with the probability that preserves
    its expectation; multiples of the golden ratio replace random numbers. Moments are rounded at every step, and with
    rounding to the nearest level one could stay on it for ever. A nonzero exp_avg_sq never becomes zero, because it is
    divided by; an exp_avg below 1e-5 of its block's largest value may.

    Args:
        moment: [rows, ...].
        step: number of updates so far, [].
        kind: uint8 for a moment that is never negative, else int8.

    Returns:
        Codes shaped like moment, contiguous; scales [rows, blocks], float32: the largest value of each block.
    """
    rows = _blocks(moment.flatten(1).float())
    scale = rows.abs().amax(-1)
    top, least = torch.iinfo(kind).max, 1 if kind == torch.uint8 else 0
    # v is rounded up from level L to R L if v > (1 + u (R - 1)) L; u uniform in [0, 1) preserves v's expectation.
    bar = 1 + (step.double() * GOLDEN).frac().float() * (2**OCTAVES - 1)
    shares = rows.abs().div_((scale.clamp(min=torch.finfo(torch.float32).tiny) * bar)[..., None])
    level = shares.log2_().div_(OCTAVES).floor_().add_(1 + top).clamp_(least, top).mul_(rows.sign())
    return _unblocked(level.to(kind), moment.shape), scale


def dequantised(codes: Tensor, scale: Tensor) -> Tensor:
    """Inverse of `quantised`: float32 values, contiguous."""
    rows = _blocks(codes.flatten(1).float())
    sign, top = rows.sign(), torch.iinfo(codes.dtype).max
    return _unblocked(rows.abs_().sub_(top).mul_(OCTAVES).exp2_().mul_(scale[..., None]).mul_(sign), codes.shape)


def _blocks(rows: Tensor) -> Tensor:
    """[rows, width] -> [rows, blocks, at most BLOCK], padded with zeros; a copy only if padding is needed."""
    n = math.ceil(rows.shape[1] / BLOCK)
    return pad(rows, (0, -rows.shape[1] % n)).unflatten(1, (n, -1))


def _unblocked(blocks: Tensor, shape: torch.Size) -> Tensor:
    return blocks.flatten(1)[:, :math.prod(shape[1:])].reshape(shape)


def _packed(parameter: Tensor, group: dict[str, Any]) -> bool:
    return group["states"] == "8bit" and parameter.ndim > 1 and parameter.numel() >= SMALL


def _laid_out(value: Tensor, like: Tensor) -> Tensor:
    """Returns `value` in the strides of `like`: fused kernels go through memory and ignore strides."""
    return value if value.stride() == like.stride() else torch.empty_like(like).copy_(value)


def _sharded(rows: Tensor, like: Tensor) -> Tensor:
    """Makes a tensor sharded like `like` from this process's rows, which are contiguous."""
    if not isinstance(like, DTensor):
        return rows
    if any(isinstance(place, Shard) and place.dim for place in like.placements):
        raise ValueError(f"8bit states need parameters sharded by their first dimension, got {like.placements}")
    shape = torch.Size((like.shape[0], *rows.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(rows, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


def adamw(phase: Phase) -> AdamW:
    """The optimiser of a phase, a group for each of its own."""
    return AdamW({"params": p, "lr": o.lr, "betas": o.betas, "weight_decay": o.weight_decay, "states": o.states}
                 for p, o in phase.groups)
