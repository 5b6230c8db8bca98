"""PickScore (arXiv 2305.01569): CLIP ViT-H/14, tuned on people's choices between two pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from jdm.rewards.networks import image_embedding, paired, pretrained, text_embedding

WEIGHTS = "yuvalkirstain/PickScore_v1"
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the one named by its authors


class PickScore(nn.Module):
    """r = exp(s) cos(image, prompt), s the learnt logit scale: about 20; a difference of 1 means odds of e to 1.

    Args:
        weights: hub id or folder of a transformers CLIP.
        tokenizer: hub id or folder; by default that of the weights' folder, or else the one named by the authors.
        dtype: the network's precision.
    """

    name = "pick-score"

    def __init__(self, weights: str = WEIGHTS, tokenizer: str | None = None, dtype: torch.dtype = torch.float32):
        from transformers import AutoTokenizer, CLIPModel

        super().__init__()
        self.clip = pretrained(self.name, CLIPModel, weights, dtype=dtype)
        self.tokenizer = pretrained(self.name, AutoTokenizer,
                                    tokenizer or (weights if Path(weights).is_dir() else TOKENIZER))

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] and B prompts -> [B]; differentiable in images."""
        paired(images, prompts)
        cosine = (image_embedding(self.clip, images) * text_embedding(self.clip, self.tokenizer, prompts)).sum(1)
        return self.clip.logit_scale.to(cosine.dtype).exp() * cosine
