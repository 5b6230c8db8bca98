"""Human Preference Score v2.1 (arXiv 2306.09341): CLIP ViT-H/14, tuned on human rankings of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from jdm.files import expanded
from jdm.rewards.networks import image_embedding, paired, pretrained, read_weights, text_embedding, weights_file
from jdm.rewards.pick_score import TOKENIZER

if TYPE_CHECKING:
    from transformers import CLIPConfig

WEIGHTS, FILES = "xswu/HPSv2", ("HPS_v2.1_compressed.pt", "HPS_v2.1_compressed.safetensors")

# Prefixes of parameter names: open_clip's -> transformers'.
STEMS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "visual.proj": "visual_projection.weight",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
PARTS = {".ln_1.": ".layer_norm1.", ".ln_2.": ".layer_norm2.", ".attn.": ".self_attn.",
         ".mlp.c_fc.": ".mlp.fc1.", ".mlp.c_proj.": ".mlp.fc2."}


class HPSv2(nn.Module):
    """r = cos(image, prompt): about 0.2 to 0.35; tables print 100 times that.

    Args:
        weights: hub id, folder or file of the published checkpoint, or folder of a transformers CLIP.
        tokenizer: hub id or folder; by default that of a transformers folder, or else the base model's.
        dtype: the network's precision.
        config: configuration of the published checkpoint; by default ViT-H/14.
    """

    name = "hpsv2"

    def __init__(self, weights: str = WEIGHTS, tokenizer: str | None = None, dtype: torch.dtype = torch.float32,
                 config: CLIPConfig | None = None):
        from transformers import AutoTokenizer, CLIPModel

        super().__init__()
        own = (expanded(weights) / "config.json").is_file()
        if own:
            self.clip = pretrained(self.name, CLIPModel, weights, dtype=dtype)
        else:
            published = read_weights(self.name, weights_file(self.name, weights, FILES))
            self.clip = pretrained(self.name, CLIPModel, None, config=config or vit_h_14(), dtype=dtype,
                                   state_dict=renamed(published))
        self.tokenizer = pretrained(self.name, AutoTokenizer, tokenizer or (weights if own else TOKENIZER))

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] and B prompts -> [B]; differentiable in images.

        Nothing is cropped: the published preprocessing pads a picture to a square with black bars.
        """
        paired(images, prompts)
        embedding = image_embedding(self.clip, images, whole=True)
        return (embedding * text_embedding(self.clip, self.tokenizer, prompts)).sum(1)


def renamed(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts a CLIP from open_clip's names to transformers': transposes projections, splits query, key and value."""
    found = {}
    for key, value in published.items():
        stem = next((s for s in STEMS if key.startswith(s)), None)
        name = key if stem is None else STEMS[stem] + key.removeprefix(stem)
        for part, other in PARTS.items():
            name = name.replace(part, other)
        if ".in_proj_" in name:
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                found[name.replace(".in_proj_", f".{letter}_proj.")] = third
        else:
            found[name] = value.T if stem in ("visual.proj", "text_projection") else value
    return found


def vit_h_14() -> CLIPConfig:
    """The transformers configuration of LAION's CLIP ViT-H/14."""
    from transformers import CLIPConfig

    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "hidden_act": "gelu", "projection_dim": 1024}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
              "patch_size": 14, "image_size": 224, "hidden_act": "gelu", "projection_dim": 1024}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024)
