"""LAION's aesthetic predictor, version 2: an affine head on CLIP ViT-L/14, fitted to human ratings of pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from jdm.rewards.networks import fill, frozen, image_embedding, pretrained, read_weights, score_head, weights_file

CLIP = "openai/clip-vit-large-patch14"
WEIGHTS, FILES = "trl-lib/ddpo-aesthetic-predictor", ("aesthetic-model.pth", "sac+logos+ava1-l14-linearMSE.pth")


class Aesthetic(nn.Module):
    """r = the predicted rating, about 1 to 10; prompts are ignored.

    Args:
        weights: the head: hub id, folder or file (sac+logos+ava1-l14-linearMSE.pth, as .pth or .safetensors).
        clip: hub id or folder of CLIP.
        dtype: CLIP's precision; the head stays in float32 or wider.
    """

    name = "aesthetic"

    def __init__(self, weights: str = WEIGHTS, clip: str = CLIP, dtype: torch.dtype = torch.float32):
        from transformers import CLIPVisionModelWithProjection

        super().__init__()
        file = weights_file(self.name, weights, FILES)
        published = {key.removeprefix("layers."): value for key, value in read_weights(self.name, file).items()}
        self.clip = pretrained(self.name, CLIPVisionModelWithProjection, clip, dtype=dtype)
        head = score_head(self.clip.config.projection_dim)
        fill(self.name, head, published, file)
        self.head = frozen(head.to(torch.promote_types(dtype, torch.float32)))

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> [B]; differentiable in images."""
        return self.head(image_embedding(self.clip, images))[:, 0]
