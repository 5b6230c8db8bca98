"""ComfyUI's layouts of transformers, as far as the converters in diffusers pin the names of their tensors.

Z-Image's are pinned. SD3's ControlNets and LoRAs are not, and none are written here.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from jdm.formats.lora_file import LoRA
from jdm.models.stock import StockModel
from jdm.models.z_image import ZImage

PREFIX, LORA_PREFIX = "model.diffusion_model.", "diffusion_model."
RENAMED = {"all_final_layer.2-1.": "final_layer.", "all_x_embedder.2-1.": "x_embedder.",
           ".attention.to_out.0.": ".attention.out.", ".attention.norm_k.": ".attention.k_norm.",
           ".attention.norm_q.": ".attention.q_norm."}
QUERY = re.compile(r"\.attention\.to_q\.")


def checkpoint_tensors(model: StockModel) -> dict[str, Tensor]:
    """The transformer by the names of the original files, query, key and value in one; {} for families without any."""
    found: dict[str, Tensor] = {}
    state = model.backbone.state_dict() if isinstance(model, ZImage) else {}
    for key, value in state.items():
        if QUERY.search(key):
            fused = torch.cat([state[key.replace("to_q", name)] for name in ("to_q", "to_k", "to_v")])
            found[f"{PREFIX}{key.replace('to_q', 'qkv')}"] = fused
        elif not re.search(r"\.attention\.to_[kv]\.", key):
            for ours, theirs in RENAMED.items():
                key = key.replace(ours, theirs)
            found[f"{PREFIX}{key}"] = value
    return found


def controlnet_tensors(net: nn.Module) -> dict[str, Tensor]:
    """A ControlNet by the names of the original files; {} for those that have none."""
    return dict(net.state_dict()) if type(net).__name__ == "ZImageControlNetModel" else {}


def lora_tensors(model: StockModel, lora: LoRA) -> dict[str, Tensor]:
    """A LoRA by the names that ComfyUI reads; {} for families without any."""
    if not isinstance(model, ZImage):
        return {}
    return {f"{LORA_PREFIX}{path}.lora_{half}.weight": tensor for path, pair in lora.at_one_rank().layers.items()
            for half, tensor in zip("AB", pair, strict=True)}
