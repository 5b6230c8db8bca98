"""nano-sd: a Stable-Diffusion-format model of about 3M parameters for 32 px pictures."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from jdm.errors import UsageError
from jdm.models.stable_diffusion import alphas_cumprod
from jdm.schedule import NoiseSchedule

SIZE = 32
LATENT_CHANNELS = 8
TEXT_WIDTH = 96
TOKENS = 16
START, END = "<|startoftext|>", "<|endoftext|>"

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
}


def vae() -> AutoencoderKL:
    """An autoencoder that quarters the side; see docs/results for the comparison with one that halves it."""
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=LATENT_CHANNELS, sample_size=SIZE,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8,
        mid_block_add_attention=False,
    )


def unet() -> UNet2DConditionModel:
    """Two levels, 8x8 and 4x4; text enters at the lower one."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
        block_out_channels=(96, 96), layers_per_block=1, norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH, attention_head_dim=4,
    )


def tokenizer(captions: Iterable[str]) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer whose merges make every word of `captions` one token; any text still works."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(vocab_size=4096, min_frequency=1, end_of_word_suffix="</w>",
                                  initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([c.lower() for c in captions], trainer)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    pairs = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in merges]
    vocab = [*alphabet, *[a + "</w>" for a in alphabet], *["".join(p) for p in pairs]]
    vocab = [*dict.fromkeys(vocab), START, END]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
        lines = ["#version: 0.2", *(" ".join(p) for p in pairs)]
        Path(folder, "merges.txt").write_text("\n".join(lines) + "\n")
        return CLIPTokenizer(
            vocab=str(Path(folder, "vocab.json")), merges=str(Path(folder, "merges.txt")),
            bos_token=START, eos_token=END, unk_token=END, pad_token=END, model_max_length=TOKENS)


def text_encoder(tokens: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=TEXT_WIDTH, intermediate_size=2 * TEXT_WIDTH, projection_dim=TEXT_WIDTH,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=TOKENS,
        bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id))


def schedule() -> NoiseSchedule:
    """SD1.5's levels."""
    return NoiseSchedule(alphas_cumprod(SCHEDULER))


def load_vae(folder: str) -> AutoencoderKL:
    """The trained autoencoder, frozen."""
    if not Path(folder, "config.json").is_file():
        raise UsageError(f"{folder}: no autoencoder there; train one with: jdm train nano-vae")
    model = AutoencoderKL.from_pretrained(folder)
    return model.to(torch.float32).eval().requires_grad_(False)
