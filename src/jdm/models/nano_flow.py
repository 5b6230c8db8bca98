"""Small flow-matching models of SD3's format, made from nothing: nano-flow, of about 4M parameters, by default."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from jdm.models.nano import text_encoder
from jdm.models.stable_diffusion_3 import StableDiffusion3
from jdm.ranges import Count, Positive, Whole

TOKENS = 1  # of T5's part, which is zeros: the fewest that the stock pipeline takes


@dataclass(frozen=True)
class FlowConfig:
    """Sizes of a transformer of two streams and its two text encoders.

    Attributes:
        width: Channels of each stream, a multiple of 32.
        layers: Number of transformer blocks.
        patch: Latents along the side of a token.
        text_width: Channels of each text encoder, a multiple of 4.
        text_layers: Transformer layers of each text encoder, at least 2: the last one's states are not read.
        tokens: Longest prompt in tokens, start and end included.
        merges: Byte-pair merges of the tokenizer at most; without a bound, every word of the captions is one token.
        shift: Shift of the noise levels; larger ones draw noisier levels.
    """

    width: Count = 128
    layers: Count = 6
    patch: Count = 1
    text_width: Count = 96
    text_layers: Count = 2
    tokens: Count = 16
    merges: Whole | None = None
    shift: Positive = 1.0

    def networks(self, latent: Sequence[int], tokens: CLIPTokenizer) -> dict[str, nn.Module]:
        """New networks by part, for latents of that shape [C, h, w]."""
        side = max(latent[1:])
        transformer = SD3Transformer2DModel(
            sample_size=side, patch_size=self.patch, in_channels=latent[0], out_channels=latent[0],
            num_layers=self.layers, attention_head_dim=32, num_attention_heads=self.width // 32,
            joint_attention_dim=2 * self.text_width, caption_projection_dim=self.width // 32 * 32,
            pooled_projection_dim=2 * self.text_width, pos_embed_max_size=max(16, side // self.patch),
            qk_norm="rms_norm")
        first, second = (text_encoder(self, tokens, CLIPTextModelWithProjection) for _ in range(2))
        return {"transformer": transformer, "text_encoder": first, "text_encoder_2": second}

    def model(self, networks: Mapping[str, Any], vae: AutoencoderKL, tokens: CLIPTokenizer) -> StableDiffusion3:
        """The model of these networks; an autoencoder without a shift says that it is 0, as SD3's pipelines ask."""
        said = copy.copy(vae)  # the weights are shared, the config is not
        said.register_to_config(shift_factor=vae.config.get("shift_factor") or 0.0)
        scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": self.shift}
        return StableDiffusion3(networks["transformer"], said, networks["text_encoder"], tokens,
                                networks["text_encoder_2"], tokens, scheduler, tokens=TOKENS)
