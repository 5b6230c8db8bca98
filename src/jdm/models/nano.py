"""nano-sd: a Stable-Diffusion-format model of about 3M parameters for 32 px pictures."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from jdm.errors import UsageError, in_short
from jdm.models.folder import whole_network
from jdm.models.schedulers import alphas_cumprod
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
    levels: dict[str, Any] = {  # diffusers declares them as tuples of one
        "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (16, 32, 64)}
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=LATENT_CHANNELS, sample_size=SIZE, layers_per_block=1,
        norm_num_groups=8, mid_block_add_attention=False, **levels)


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
    """A CLIP byte-pair tokenizer whose merges make every word of `captions` one token; any text still works.

    The same captions give the same vocabulary, in any process: a resumed run must find its tokens again.
    """
    alphabet = sorted(ByteLevel.alphabet())
    merges = _merges(Counter(word for c in captions for word in re.findall(r"\w+|[^\w\s]+", c.lower())))
    vocab = [*alphabet, *[a + "</w>" for a in alphabet], *["".join(pair) for pair in merges]]
    vocab = [*dict.fromkeys(vocab), START, END]
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        files[0].write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
        files[1].write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")
        return CLIPTokenizer(vocab=str(files[0]), merges=str(files[1]), bos_token=START, eos_token=END,
                             unk_token=END, pad_token=END, model_max_length=TOKENS)


def _merges(words: Counter[str]) -> list[tuple[str, str]]:
    """Byte-pair merges until every word is one token; ties go to the first pair in the alphabet.

    Not the trainer of `tokenizers`: it breaks ties by the order of a hash table, another one in every process.
    """
    spelled = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, tokens in spelled.items():
            for pair in pairwise(tokens):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = {word: _merged(tokens, best) for word, tokens in spelled.items()}


def _merged(tokens: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for token in tokens:
        if out and (out[-1], token) == pair:
            out[-1] += token
        else:
            out.append(token)
    return out


def text_encoder(tokens: CLIPTokenizer) -> CLIPTextModel:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    special: dict[str, Any] = {name: getattr(tokens, name) for name in names}
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=TEXT_WIDTH, intermediate_size=2 * TEXT_WIDTH, projection_dim=TEXT_WIDTH,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=TOKENS, **special))


def schedule() -> NoiseSchedule:
    """SD1.5's levels."""
    return NoiseSchedule(alphas_cumprod(SCHEDULER))


def load_vae(folder: str) -> AutoencoderKL:
    """The trained autoencoder, frozen."""
    if not Path(folder, "config.json").is_file():
        raise UsageError(f"{folder}: no autoencoder there; train one with: jdm train nano-vae")
    try:
        return whole_network(AutoencoderKL, folder).float().eval().requires_grad_(False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"{folder} is not a whole autoencoder ({in_short(error)}); train one with: "
                         "jdm train nano-vae") from None
