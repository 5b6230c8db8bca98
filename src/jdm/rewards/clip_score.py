"""CLIP score (arXiv 2104.08718, without its scale factor): how well a picture fits its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from jdm.rewards.networks import image_embedding, paired, pretrained, text_embedding

WEIGHTS = "openai/clip-vit-large-patch14"


class CLIPScore(nn.Module):
    """r = cos(image, prompt): about .15 to .35; tables print 100 times that.

    Args:
        weights: hub id or folder of a transformers CLIP.
        tokenizer: hub id or folder; by default that of the weights.
        dtype: the network's precision.
    """

    def __init__(self, weights: str = WEIGHTS, tokenizer: str | None = None, dtype: torch.dtype = torch.float32):
        from transformers import AutoTokenizer, CLIPModel

        super().__init__()
        self.name = "clip"
        self.network = Path(weights).name  # scores of different CLIPs are not comparable
        self.clip = pretrained(self.name, CLIPModel, weights, dtype=dtype)
        self.tokenizer = pretrained(self.name, AutoTokenizer, tokenizer or weights)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] and B prompts -> [B]; differentiable in images."""
        paired(images, prompts)
        return (image_embedding(self.clip, images) * text_embedding(self.clip, self.tokenizer, prompts)).sum(1)
