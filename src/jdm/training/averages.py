"""Exponential moving averages of what is exported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from jdm.training import checkpoint
from jdm.training.distributed import local


@torch.no_grad()
def move(average: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    """Parameters tend to the module's; buffers, which may count, are the module's."""
    now, parameters = checkpoint.trained(module), dict(module.named_parameters())
    moving = [name for name in average if name in parameters]
    torch._foreach_lerp_([local(average[name]) for name in moving], [local(now[name]) for name in moving], 1 - decay)
    for name in average.keys() - parameters.keys():
        average[name].copy_(now[name])


def copied_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in checkpoint.trained(module).items()}


@contextmanager
def averaged(modules: Mapping[str, nn.Module],
             averages: Mapping[str, dict[str, Tensor]]) -> Iterator[dict[str, nn.Module]]:
    """The averaged modules themselves, holding their averages and in eval mode; put back at the end."""
    chosen = {name: modules[name] for name in averages}
    modes = {name: module.training for name, module in chosen.items()}
    _exchange(chosen, averages)
    try:
        for module in chosen.values():
            module.eval()
        yield chosen
    finally:
        _exchange(chosen, averages)
        for name, module in chosen.items():
            module.train(modes[name])


@torch.no_grad()
def _exchange(modules: Mapping[str, nn.Module], averages: Mapping[str, dict[str, Tensor]]) -> None:
    for name, module in modules.items():
        for key, value in checkpoint.trained(module).items():
            ours, theirs = local(value), local(averages[name][key])
            kept = ours.clone()
            ours.copy_(theirs)
            theirs.copy_(kept)
