"""Named LoRA adapters on one backbone, switched without touching requires_grad.

peft's own set_adapter, enable_adapters and disable_adapter toggle requires_grad of the adapter's parameters,
which silently freezes or wakes them in the middle of a step; this wrapper leaves it alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from jdm.errors import UsageError

# Attention, feed-forward and convolutions of a UNet2DConditionModel, as LCM-LoRA chooses them.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
           "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")


class Adapter:
    """A LoRA inside `module`, off until `active()`; at initialisation it changes nothing (B = 0).

    Args:
        module: changed in place: its target layers are wrapped, their own parameters stay the same objects.
        rank: of every LoRA pair; alpha = rank, so the scale is 1.
        targets: which layers, by the end of their path.
    """

    def __init__(self, module: nn.Module, name: str, rank: int, targets: Sequence[str] = TARGETS):
        if rank < 1:
            raise UsageError(f"LoRA rank must be at least 1, got {rank}")
        frozen = {id(p): p.requires_grad for p in module.parameters()}
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)), module, name)
        for p in module.parameters():  # injection freezes the base; put it back as it was
            p.requires_grad_(frozen.get(id(p), True))
        self.name = name
        self.layers = [m for m in module.modules() if isinstance(m, BaseTunerLayer)]
        self._switch(False)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The LoRA's own parameters, in a fixed order."""
        return [p for m in self.layers for k, p in m.named_parameters() if f".{self.name}." in f".{k}."]

    @contextmanager
    def active(self) -> Iterator[None]:
        """The LoRA is part of the function inside. Hold it through a backward that recomputes the forward."""
        self._switch(True)
        try:
            yield
        finally:
            self._switch(False)

    def _switch(self, on: bool) -> None:
        for layer in self.layers:
            layer._active_adapter = [self.name] if on else []


def base_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Parameters of the backbone without those of any adapter."""
    adapters = {id(p) for m in module.modules() if isinstance(m, BaseTunerLayer)
                for k, p in m.named_parameters() if "lora_" in k}
    return [p for p in module.parameters() if id(p) not in adapters]
