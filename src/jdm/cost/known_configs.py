"""Models without weights, from published configurations or those of a local folder or checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import BatchEncoding, DPTConfig, DPTForDepthEstimation

from jdm.errors import UsageError
from jdm.files import ASSETS
from jdm.formats.single_file_import import checkpoint_configs
from jdm.library import FAMILIES, SHIPPED
from jdm.models.folder import folder_json, folder_scheduler, model_index
from jdm.models.published import PUBLISHED, networks
from jdm.models.stable_diffusion import StableDiffusion
from jdm.models.stable_diffusion_xl import StableDiffusionXL


def without_weights(name: str) -> StableDiffusion:
    """The model that `load_model(name)` returns, with random weights and a tokenizer that maps all prompts to zeros.

    Under a FakeTensorMode or torch.device("meta") its networks take no memory.

    Raises:
        UsageError: the name is neither known nor shipped, nor a local folder with configurations, nor a checkpoint.
    """
    configs = PUBLISHED.get(name) or checkpoint_configs(name) or _of_folder(name)
    lengths = {k: v.get("max_position_embeddings", 77) for k, v in configs.items() if k.startswith("text_encoder")}
    parts: dict[str, Any] = {**networks(configs), "tokenizer": Zeros(lengths["text_encoder"]),
                             "scheduler": configs["scheduler"], "card": configs.get("card")}
    if "text_encoder_2" in configs:
        parts["tokenizer_2"] = Zeros(lengths["text_encoder_2"])
        model = StableDiffusionXL(**parts)
    else:
        model = StableDiffusion(**parts)
    for part in model.modules().values():
        part.float().eval().requires_grad_(False)
    return model


class Zeros:
    """A tokenizer without a vocabulary: every prompt becomes `length` zeros."""

    def __init__(self, length: int):
        self.model_max_length = length

    def __call__(self, prompts: Sequence[str], **_: Any) -> BatchEncoding:
        ids = torch.zeros(len(prompts), self.model_max_length, dtype=torch.long)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def _of_folder(name: str) -> dict[str, dict]:
    folder, controlnet = SHIPPED.get(name, (name, None)) if not Path(name).is_dir() else (name, None)
    path = ASSETS / folder if name in SHIPPED and folder is not name else Path(folder)
    if not path.is_dir():
        raise UsageError(f"the shapes of {name} are not known; give a diffusers folder, or one of "
                         f"{', '.join([*SHIPPED, *PUBLISHED])}")
    index = model_index(str(path))
    files = {"unet": "unet/config.json", "vae": "vae/config.json", "text_encoder": "text_encoder/config.json",
             "card": "jdm.json"}
    if FAMILIES.get(str(index.get("_class_name"))) is StableDiffusionXL:
        files["text_encoder_2"] = "text_encoder_2/config.json"
    if (index.get("controlnet") or [None])[0] is not None:
        files["controlnet"] = "controlnet/config.json"
    found = {part: folder_json(str(path), file) for part, file in files.items()}
    if controlnet:
        found["controlnet"] = folder_json(str(ASSETS / controlnet), "config.json")
    missing = [part for part, config in found.items() if config is None and part != "card"]
    if missing:
        raise UsageError(f"{name} lacks {files.get(missing[0], missing[0])}; fetch the model again")
    with torch.device("cpu"), unset_fake_temporarily():  # diffusers computes the levels, whatever mode estimates run in
        scheduler = folder_scheduler(str(path), index)
    return {part: config or {} for part, config in found.items()} | {"scheduler": scheduler}


def dpt_hybrid() -> nn.Module:
    """Intel/dpt-hybrid-midas without its weights."""
    config = DPTConfig(is_hybrid=True, neck_hidden_sizes=[256, 512, 768, 768], add_projection=False,
                       readout_type="project", image_size=384)
    return frozen(DPTForDepthEstimation(config))


def image_reward() -> nn.Module:
    """ImageReward without its weights: the published encoders and head, with a tokenizer that returns zeros."""
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    from jdm.rewards.image_reward import TOKENS, ImageReward, published_text, published_vision
    from jdm.rewards.networks import score_head

    reward = ImageReward.__new__(ImageReward)
    nn.Module.__init__(reward)
    reward.vision, reward.text = BlipVisionModel(published_vision()), BlipTextModel(
        published_text(), add_pooling_layer=False)
    reward.head = score_head(reward.text.config.hidden_size)
    reward.tokenizer = Zeros(TOKENS)
    return frozen(reward)


def frozen(module: nn.Module) -> nn.Module:
    return module.float().eval().requires_grad_(False)
