"""Named LoRA adapters on one backbone, switched without touching requires_grad.

peft's set_adapter, enable_adapters and disable_adapter toggle requires_grad of the adapter's parameters, which
silently freezes or unfreezes them in the middle of a step; `switched_on` does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from jdm.errors import UsageError


class Adapter(nn.Module):
    """A LoRA inside `backbone`, inactive until switched on; at initialisation it is zero (B = 0).

    As a module it has only the LoRA's parameters, under their names in the backbone.

    Args:
        backbone: changed in place: its target layers are wrapped, their own parameters stay the same objects.
        rank: rank of every LoRA pair; alpha = rank, so the scale is 1.
        targets: which layers, by the end of their path; `Family.lora_targets`.
    """

    def __init__(self, backbone: nn.Module, name: str, rank: int, targets: Sequence[str]):
        super().__init__()
        if rank < 1:
            raise UsageError(f"LoRA rank must be at least 1, got {rank}")
        ends = tuple(f".{target}.{weight}" for target in targets for weight in ("weight", "base_layer.weight"))
        widest = max((max(len(p), p[0].numel()) for name, p in backbone.named_parameters()
                      if p.ndim > 1 and f".{name}".endswith(ends)), default=0)
        if rank > widest:
            raise UsageError(f"LoRA rank must be at most {widest}, the larger side of this model's largest layer, got "
                             f"{rank}")
        frozen = {id(p): p.requires_grad for p in backbone.parameters()}
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)), backbone, name)
        for p in backbone.parameters():  # injection freezes the base; restore its state
            p.requires_grad_(frozen.get(id(p), True))
        found = [(k, m) for k, m in backbone.named_modules() if isinstance(m, BaseTunerLayer)]
        self.__dict__.update(name=name, layers=dict(found))  # not submodules: the base is not part of this module
        for layer in self.layers.values():
            layer._active_adapter = []

    name: str
    layers: Mapping[str, BaseTunerLayer]

    def named_parameters(self, prefix: str = "", recurse: bool = True,
                         remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """The LoRA's parameters, in a fixed order."""
        for path, layer in self.layers.items():
            for key, p in layer.named_parameters():  # type: ignore[attr-defined]
                if f".{self.name}." in f".{key}.":
                    yield f"{prefix}{path}.{key}", p

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {key: p.detach() for key, p in self.named_parameters()}


_ON: list[tuple[Adapter, ...]] = [()]


@contextmanager
def switched_on(adapters: Sequence[Adapter]) -> Iterator[None]:
    """Context in which exactly these adapters of a backbone are active.

    A forward that is recomputed in backward needs the same ones again; `execution.checkpointed` ensures this.
    """
    names = [adapter.name for adapter in adapters]
    before = [(layer, layer._active_adapter) for a in adapters for layer in a.layers.values()]
    for layer, _ in before:
        layer._active_adapter = names
    _ON.append(tuple(adapters))
    try:
        yield
    finally:
        _ON.pop()
        for layer, was in reversed(before):
            layer._active_adapter = was


def now_on() -> tuple[Adapter, ...]:
    """The adapters of the innermost `switched_on`."""
    return _ON[-1]


def base_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The backbone's parameters without those of adapters."""
    adapters = {id(p) for m in module.modules() if isinstance(m, BaseTunerLayer)
                for k, p in m.named_parameters() if "lora_" in k}
    return [p for p in module.parameters() if id(p) not in adapters]


def without_adapters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A backbone's state without adapters, under its original names."""
    return {key.replace(".base_layer.", "."): value for key, value in state.items() if ".lora_" not in key}


@torch.no_grad()
def merged(backbone: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """The backbone's state with the adapter merged into its weights, W + B A, in float32, under its original names."""
    state = {key: value.float().clone() for key, value in without_adapters(backbone.state_dict()).items()}
    for path, layer in adapter.layers.items():
        state[f"{path}.weight"] += layer.get_delta_weight(adapter.name).float()  # type: ignore[attr-defined]
    return state
