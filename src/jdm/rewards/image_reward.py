"""ImageReward v1.0 (arXiv 2304.05977): BLIP's text encoder attends to the picture, a head scores the result."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jdm.rewards.networks import clip_pixels, fill, frozen, paired, pretrained, read_weights, score_head, weights_file

if TYPE_CHECKING:
    from transformers import BlipTextConfig, BlipVisionConfig

WEIGHTS, FILES = "THUDM/ImageReward", ("ImageReward.pt", "ImageReward.safetensors")
TOKENIZER, TOKENS = "google-bert/bert-base-uncased", 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # published mean and deviation of the head's output

# The checkpoint's names -> transformers'; the first match applies.
NAMES = (
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.", r"vision.encoder.layers.\1.self_attn."),
    (r"^blip\.visual_encoder\.blocks\.", "vision.encoder.layers."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.layers\.", "head."),
)
# Projections used only in BLIP's contrastive training, and a buffer; neither is needed here.
UNUSED = re.compile(r"^blip\.(vision_proj|text_proj)\.|\.position_ids$")


class ImageReward(nn.Module):
    """r = (the head's score of (prompt, picture) - its mean) / its deviation: mostly -2 to 2.

    Args:
        weights: hub id, folder or file of the published checkpoint.
        tokenizer: hub id or folder.
        dtype: precision of both encoders; the head stays in float32 or wider.
        vision, text: configurations of the checkpoint's encoders; by default the published ones.
    """

    name = "image-reward"

    def __init__(self, weights: str = WEIGHTS, tokenizer: str = TOKENIZER, dtype: torch.dtype = torch.float32,
                 vision: BlipVisionConfig | None = None, text: BlipTextConfig | None = None):
        from transformers import AutoTokenizer
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        super().__init__()
        file = weights_file(self.name, weights, FILES)
        published = renamed(read_weights(self.name, file))
        vision, text = vision or published_vision(), text or published_text()
        self.vision: Any = BlipVisionModel(vision)
        self.text: Any = BlipTextModel(text, add_pooling_layer=False)
        self.head = score_head(text.hidden_size)
        fill(self.name, self, published, file)
        self.vision.to(dtype)
        self.text.to(dtype)
        self.head.to(torch.promote_types(dtype, torch.float32))
        frozen(self)
        self.tokenizer = pretrained(self.name, AutoTokenizer, tokenizer)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] and B prompts, truncated to 35 tokens -> [B]; differentiable in images."""
        paired(images, prompts)
        pixels = clip_pixels(images, self.vision.config.image_size, self.vision.dtype)
        seen = self.vision(pixel_values=pixels).last_hidden_state
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=TOKENS,
                                return_tensors="pt").to(images.device)
        # The first token is BERT's [CLS], as in the published code; BLIP's own image-text matching uses [ENC].
        read = self.text(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen,
                         encoder_attention_mask=seen.new_ones(seen.shape[:2], dtype=torch.long))
        first = read.last_hidden_state[:, 0]
        score = self.head(first.to(torch.promote_types(first.dtype, torch.float32)))[:, 0]
        return (score - MEAN) / STD


def published_vision() -> BlipVisionConfig:
    """The checkpoint's picture encoder; its norms have 1e-6 where transformers' default is 1e-5."""
    from transformers import BlipVisionConfig

    return BlipVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                            image_size=224, layer_norm_eps=1e-6)


def published_text() -> BlipTextConfig:
    """The checkpoint's text encoder; it has 12 heads where transformers' default is 8."""
    from transformers import BlipTextConfig

    return BlipTextConfig(encoder_hidden_size=1024, num_attention_heads=12)


def renamed(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the checkpoint's weights to the parameter names of `ImageReward`."""
    found = {}
    for key, value in published.items():
        if UNUSED.search(key):
            continue
        pattern, name = next(((p, n) for p, n in NAMES if re.search(p, key)), (r"^", ""))
        found[re.sub(pattern, name, key, count=1)] = value
    return found
