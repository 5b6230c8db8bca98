"""Tiny models of the classes of SD1.5, SD2.1, SDXL, SD3, SD3.5 and Z-Image, with random weights."""

from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel, ZImageTransformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, Qwen2Tokenizer, Qwen3Config, Qwen3Model

import tiny
from jdm.models import nano
from jdm.models.stable_diffusion import StableDiffusion
from jdm.models.stable_diffusion_3 import StableDiffusion3
from jdm.models.stable_diffusion_xl import StableDiffusionXL
from jdm.models.z_image import ZImage

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


FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


def flow_autoencoder(channels: int = 4) -> AutoencoderKL:
    """With a shift, and latents of next to no variance: SD3's pipeline draws a sample of a control's."""
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=channels, sample_size=32, norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8), scaling_factor=1.5, shift_factor=0.1, use_quant_conv=False,
        use_post_quant_conv=False)
    with torch.no_grad():
        vae.encoder.conv_out.weight[channels:] = 0
        vae.encoder.conv_out.bias[channels:] = -30.0
    return vae


def clip_with_projection(tokenizer: Any, width: int = WIDTH) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=12, max_position_embeddings=tokenizer.model_max_length, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id))


def sd3(**changes: Any) -> StableDiffusion3:
    """SD3's classes, without T5; `changes` are of the transformer: SD3.5 has qk_norm and blocks with two attentions."""
    tokenizer = nano.tokenizer(["a photo of an ankle boot", "a coat"], 40)
    shape = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 4,
             "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 40, "caption_projection_dim": 16,
             "pooled_projection_dim": 24, "pos_embed_max_size": 16}
    return StableDiffusion3(
        SD3Transformer2DModel(**(shape | changes)), flow_autoencoder(), clip_with_projection(tokenizer), tokenizer,
        clip_with_projection(tokenizer, 20), tokenizer, FLOW, tokens=3)


CHAT = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Bytes, and the words of the chat."""
    words = {token: i for i, token in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=words, merges=[], pad_token="<|endoftext|>", eos_token="<|im_end|>",
                               additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = CHAT
    return tokenizer


def z_image(**changes: Any) -> ZImage:
    """Z-Image's classes, with a text encoder of two layers; `changes` are of the transformer."""
    tokenizer = qwen_tokenizer()
    shape = {"in_channels": 4, "dim": 16, "n_layers": 4, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
             "cap_feat_dim": 16, "axes_dims": [4, 2, 2], "axes_lens": [640, 32, 32]}
    text = Qwen3Model(Qwen3Config(vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                  num_attention_heads=2, num_key_value_heads=1, head_dim=8,
                                  max_position_embeddings=1024))
    return ZImage(ZImageTransformer2DModel(**(shape | changes)), flow_autoencoder(), text, tokenizer,
                  FLOW | {"shift": 6.0}, pixels=32)


def made(kind: str) -> Any:
    """Random weights in the shapes of a family, with its prediction and schedule."""
    if kind in FLOWS:
        return FLOWS[kind]()
    tokenizer = nano.tokenizer(["a photo of an ankle boot", "a coat"], tiny.TEACHER.tokens)
    encoder = nano.text_encoder(tiny.TEACHER, tokenizer)
    if kind == "sd15":
        return StableDiffusion(unet(), autoencoder(), encoder, tokenizer, nano.SCHEDULER)
    if kind == "sd21-v":  # linear projections, heads by block, v-prediction
        net = unet(use_linear_projection=True, attention_head_dim=(2, 4))
        return StableDiffusion(net, autoencoder(), encoder, tokenizer,
                               {**nano.SCHEDULER, "prediction_type": "v_prediction"})
    second = clip_with_projection(tokenizer)
    net = unet(down_block_types=DOWN[::-1], up_block_types=UP[::-1], transformer_layers_per_block=(1, 2),
               cross_attention_dim=tiny.TEACHER.text_width + WIDTH, addition_embed_type="text_time",
               addition_time_embed_dim=8, projection_class_embeddings_input_dim=12 + 6 * 8, use_linear_projection=True)
    return StableDiffusionXL(net, autoencoder(), encoder, tokenizer, nano.SCHEDULER, None, None, second, tokenizer)


FLOWS = {"sd3": sd3, "sd35": lambda: sd3(qk_norm="rms_norm", dual_attention_layers=(0, 1)),
         "z-image": z_image}
