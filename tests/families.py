"""Tiny models of SD1.5's, SD2.1's and SDXL's classes, with random weights."""

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import tiny
from jdm.models import nano
from jdm.models.stable_diffusion import StableDiffusion
from jdm.models.stable_diffusion_xl import StableDiffusionXL

WIDTH = 16
DOWN, UP = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, sample_size=32, down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4)


def unet(**changes) -> UNet2DConditionModel:
    shape = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32),
             "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 2, "down_block_types": DOWN,
             "up_block_types": UP, "cross_attention_dim": tiny.TEACHER.text_width}
    return UNet2DConditionModel(**(shape | changes))


def made(kind: str) -> StableDiffusion:
    """Random weights in the shapes of a family, with its prediction and schedule."""
    tokenizer = nano.tokenizer(["a photo of an ankle boot", "a coat"], tiny.TEACHER.tokens)
    encoder = nano.text_encoder(tiny.TEACHER, tokenizer)
    if kind == "sd15":
        return StableDiffusion(unet(), autoencoder(), encoder, tokenizer, nano.SCHEDULER)
    if kind == "sd21-v":  # linear projections, heads by block, v-prediction
        net = unet(use_linear_projection=True, attention_head_dim=(2, 4))
        return StableDiffusion(net, autoencoder(), encoder, tokenizer,
                               {**nano.SCHEDULER, "prediction_type": "v_prediction"})
    second = CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=12, max_position_embeddings=tokenizer.model_max_length, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id))
    net = unet(down_block_types=DOWN[::-1], up_block_types=UP[::-1], transformer_layers_per_block=(1, 2),
               cross_attention_dim=tiny.TEACHER.text_width + WIDTH, addition_embed_type="text_time",
               addition_time_embed_dim=8, projection_class_embeddings_input_dim=12 + 6 * 8, use_linear_projection=True)
    return StableDiffusionXL(net, autoencoder(), encoder, tokenizer, nano.SCHEDULER, None, None, second, tokenizer)
