"""One row of `gpu.py`: seconds from a prompt and a control map to pixels, at batch 1, on random weights in bfloat16."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from gpu_step import TOY, clocked, peak_memory, uncompiled
from torch import Tensor

from jdm.cost.known_configs import without_weights
from jdm.evaluation.sampling import Sampler
from jdm.models import published
from jdm.recipes.scales import SD15

# How torch.compile is called for each of a sampler's networks. "cudagraphs" compiles nothing.
WAYS: dict[str, dict[str, Any]] = {"eager": {}, "CUDA graphs": {"backend": "cudagraphs"},
                                   "compiled": {"backend": "inductor"},
                                   "compiled, CUDA graphs": {"mode": "reduce-overhead"}}


@dataclass(frozen=True)
class Drawing:
    """Pictures by SD1.5 with a ControlNet, in `steps`; many are guided, so that each step is two passes.

    Attributes:
        way: one of WAYS.
        size: side of the pictures in pixels.
        toy: narrow networks, for a CPU, compiled by name only.
    """

    steps: int
    way: str
    size: int
    device: str
    toy: bool = False
    rounds: int = 10


@torch.no_grad()
def drawn(asked: Drawing) -> dict[str, float]:
    """Median seconds of a picture, the first one's, and peak memory; the prompt's text states are remembered."""
    with patch.dict(published.PUBLISHED, {SD15: TOY} if asked.toy else {}), torch.device(asked.device):
        model = without_weights(SD15).at(asked.size)
        model = model.with_networks(controlnet=model.new_controlnet().eval().requires_grad_(False))
    for part in (model.backbone, model.controlnet, model.vae):
        part.to(torch.bfloat16)
    sampler = Sampler(model, asked.steps, 7.5)
    for part in (model.backbone, model.controlnet, model.vae.decoder):
        if way := WAYS[asked.way]:
            part.compile(**way, dynamic=False)
    z = torch.randn(model.latent_shape(1, asked.size), device=asked.device)
    control = torch.rand(1, 3, asked.size, asked.size, device=asked.device)

    def picture() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # what the last picture was made of may be written over
        with torch.autocast(torch.device(asked.device).type, torch.bfloat16):
            return model.space.decode(sampler.x(z, ["a house"], control)).float().cpu()

    with uncompiled(asked.toy):
        first = clocked(picture, asked.device)
        for _ in range(1 if asked.steps > 1 else 3):
            picture()
        times = [clocked(picture, asked.device) for _ in range(asked.rounds)]
    return {"seconds": statistics.median(times), "least": min(times), "most": max(times), "first": first,
            "memory": peak_memory(asked.device), "passes": sampler.nfe}
