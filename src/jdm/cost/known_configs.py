"""Models without weights, from published configurations or those of a local folder or checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import CLIPVisionConfig, CLIPVisionModel, DPTConfig, DPTForDepthEstimation

from jdm.controls.encoders import Encoder, Pixels, pooled_output
from jdm.errors import UsageError
from jdm.files import ASSETS
from jdm.formats.single_file_import import checkpoint_configs
from jdm.library import FAMILIES, SHIPPED
from jdm.models.folder import CARD, folder_json, folder_scheduler, model_index
from jdm.models.published import PUBLISHED
from jdm.models.stock import StockModel, Zeros


def without_weights(name: str) -> StockModel:
    """The model that `load_model(name)` returns, with random weights and a tokenizer that maps all prompts to zeros.

    Under a FakeTensorMode or torch.device("meta") its networks take no memory.

    Raises:
        UsageError: the name is neither known nor shipped, nor a local folder with configurations, nor a checkpoint.
    """
    family, configs = configured(name)
    return family.made(configs)


def configured(name: str) -> tuple[type[StockModel], dict[str, Any]]:
    """A model's family and its parts' configurations, from which no network is made.

    Raises:
        UsageError: as `without_weights`.
    """
    configs = PUBLISHED.get(name) or checkpoint_configs(name) or _of_folder(name)
    plain = "StableDiffusionXLPipeline" if "text_encoder_2" in configs else "StableDiffusionPipeline"
    return FAMILIES[str(configs.get("pipeline", plain))], configs


def _of_folder(name: str) -> dict[str, Any]:
    folder, controlnet = SHIPPED.get(name, (name, None)) if not Path(name).is_dir() else (name, None)
    path = ASSETS / folder if name in SHIPPED and folder is not name else Path(folder)
    if not path.is_dir():
        raise UsageError(f"the shapes of {name} are not known; give a diffusers folder, or one of "
                         f"{', '.join([*SHIPPED, *PUBLISHED])}")
    index = model_index(str(path))
    kind = str(index.get("_class_name"))
    if kind not in FAMILIES:
        raise UsageError(f"{name} is a {kind}; families that are read: {', '.join(FAMILIES)}")
    there = [part for part, of in FAMILIES[kind].PARTS.items()
             if of.make is not None and (index.get(part) or [None])[0] is not None]
    found = {part: folder_json(str(path), f"{part}/config.json", FAMILIES[kind].PARTS[part].kind) for part in there}
    if controlnet:
        found["controlnet"] = folder_json(str(ASSETS / controlnet), "config.json")
    if missing := [part for part, config in found.items() if config is None]:
        raise UsageError(f"{name} lacks {missing[0]}/config.json; fetch the model again")
    with torch.device("cpu"), unset_fake_temporarily():  # diffusers computes the levels, whatever mode estimates run in
        scheduler = folder_scheduler(str(path), index, FAMILIES[kind].SCHEDULERS)
    return {**found, "card": folder_json(str(path), CARD), "scheduler": scheduler, "pipeline": kind}


def dpt_hybrid() -> nn.Module:
    """Intel/dpt-hybrid-midas without its weights."""
    config = DPTConfig(is_hybrid=True, neck_hidden_sizes=[256, 512, 768, 768], add_projection=False,
                       readout_type="project", image_size=384)
    return frozen(DPTForDepthEstimation(config))


def clip_vision() -> Encoder:
    """The image encoder of openai/clip-vit-large-patch14 without its weights."""
    config = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                              patch_size=14)
    return Encoder(frozen(CLIPVisionModel(config)), Pixels((224, 224), None, "bicubic"), pooled_output)


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
