"""The published configurations of models by hub id."""

from __future__ import annotations

from typing import Any

# Each part's config.json, without values that are defaults in diffusers or transformers.
SCHEDULER = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
             "num_train_timesteps": 1000, "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True,
             "steps_offset": 1, "prediction_type": "epsilon"}
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512,
       "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
          "projection_dim": 768}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
          "projection_dim": 512, "hidden_act": "gelu"}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
          "projection_dim": 1280, "hidden_act": "gelu"}
SD15 = {"unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}, "vae": VAE,
        "text_encoder": CLIP_L, "scheduler": SCHEDULER}
SD21 = {"unet": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True,
                 "sample_size": 64}, "vae": VAE, "text_encoder": CLIP_H, "scheduler": SCHEDULER}
SD21_V = {**SD21, "unet": {**SD21["unet"], "sample_size": 96, "upcast_attention": True},
          "vae": {**VAE, "sample_size": 768},
          "scheduler": {**SCHEDULER, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}}
SDXL = {
    "unet": {"sample_size": 128, "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20),
             "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
             "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
             "transformer_layers_per_block": (1, 2, 10), "cross_attention_dim": 2048, "use_linear_projection": True,
             "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
             "projection_class_embeddings_input_dim": 2816},
    "vae": {**VAE, "sample_size": 1024, "scaling_factor": 0.13025},
    "text_encoder": CLIP_L, "text_encoder_2": CLIP_G,
    "scheduler": {**SCHEDULER, "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}}
# Latents of 16 channels; SD3's and Z-Image's differ in scale and shift.
VAE_16 = {**VAE, "sample_size": 1024, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
          "feed_forward_proj": "gated-gelu", "vocab_size": 32128}
QWEN3_4B = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
SD3 = {"pipeline": "StableDiffusion3Pipeline", "text_encoder": CLIP_L, "text_encoder_2": CLIP_G,
       "text_encoder_3": T5_XXL, "vae": {**VAE_16, "scaling_factor": 1.5305, "shift_factor": 0.0609}, "scheduler": FLOW,
       "transformer": {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
                       "pos_embed_max_size": 192}}
SD35_MEDIUM = {**SD3, "transformer": {**SD3["transformer"], "pos_embed_max_size": 384, "qk_norm": "rms_norm",
                                      "dual_attention_layers": tuple(range(13))}}
SD35_LARGE = {**SD3, "transformer": {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
                                     "pos_embed_max_size": 192, "qk_norm": "rms_norm"}}
Z_IMAGE = {"pipeline": "ZImagePipeline", "transformer": {"dim": 3840}, "text_encoder": QWEN3_4B, "scheduler": FLOW,
           "vae": {**VAE_16, "scaling_factor": 0.3611, "shift_factor": 0.1159}}

# Configurations by hub id.
PUBLISHED: dict[str, dict[str, Any]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": SD15,
    "runwayml/stable-diffusion-v1-5": SD15,
    "stabilityai/stable-diffusion-2-1-base": SD21,
    "stabilityai/stable-diffusion-2-1": SD21_V,
    "stabilityai/stable-diffusion-xl-base-1.0": SDXL,
    "stabilityai/stable-diffusion-3-medium-diffusers": SD3,
    "stabilityai/stable-diffusion-3.5-medium": SD35_MEDIUM,
    "stabilityai/stable-diffusion-3.5-large": SD35_LARGE,
    "Tongyi-MAI/Z-Image": Z_IMAGE,
    "Tongyi-MAI/Z-Image-Turbo": Z_IMAGE,
}


def of_size(size: str, prediction: str) -> dict[str, dict]:
    """The configurations of a size in `single_file.SIZES`; SD2 with v-prediction is the 768-pixel model."""
    sizes = {"SD1.5": SD15, "SD2": SD21_V if prediction == "v_prediction" else SD21, "SDXL": SDXL}
    return sizes[size]

