"""Small Stable-Diffusion-format models made from nothing: nano-sd, of about 3M parameters, by default."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from jdm.errors import UsageError, in_short, plural
from jdm.files import ASSETS
from jdm.models.folder import whole_network
from jdm.models.stable_diffusion import StableDiffusion
from jdm.ranges import Count, Whole
from jdm.size import Size, height_width, sized, spelled

if TYPE_CHECKING:
    from jdm.models.nano_flow import FlowConfig  # which reads this module

POOLING_HEADS = 64  # diffusers' ControlNet takes no other number
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


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of an autoencoder.

    Attributes:
        latent_channels: Channels of the latents.
        widths: Channels of each level, multiples of 8; every level but the last halves the side.
        layers: Residual blocks per level of the encoder; the decoder has one more.
    """

    latent_channels: Count = 8
    widths: tuple[Count, ...] = (16, 32, 64)
    layers: Count = 1

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """Channels, height and width of the latents of pictures of that size.

        Raises:
            UsageError: a side is no multiple of the downsampling.
        """
        factor = 2 ** (len(self.widths) - 1)
        height, width = height_width(size)
        if height % factor or width % factor:
            raise UsageError(f"size must be a multiple of {factor} for an autoencoder of "
                             f"{plural(len(self.widths), 'level')}, got {spelled(size)}; change --data.size or "
                             "--method.network.widths")
        return self.latent_channels, height // factor, width // factor


@dataclass(frozen=True)
class TeacherConfig:
    """Sizes of a UNet and its text encoder.

    Attributes:
        widths: Channels of each level of the UNet, multiples of 16; every level but the last halves the side. Text
            enters at every level but the first.
        layers: Residual blocks per level of the UNet's way down; the way up has one more.
        text_width: Channels of the text encoder, a multiple of 4.
        text_layers: Transformer layers of the text encoder.
        tokens: Longest prompt in tokens, start and end included.
        merges: Byte-pair merges of the tokenizer at most; without a bound, every word of the captions is one token.
        pooled: Whether the whole text, pooled by attention, is added to the time too, which every block of the UNet
            reads; the text encoder's width must then be a multiple of 64.
        prediction: What the UNet predicts: epsilon, or v_prediction, whose loss weighs the error of x0 at the noisiest
            levels, where the text decides, 1 + 1 / SNR times as much.
    """

    widths: tuple[Count, ...] = (96, 96)
    layers: Count = 1
    text_width: Count = 96
    text_layers: Count = 2
    tokens: Count = 16
    merges: Whole | None = None
    pooled: bool = False
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"

    def networks(self, latent: Sequence[int], tokens: CLIPTokenizer) -> dict[str, nn.Module]:
        """New networks by part, for latents of that shape [C, h, w]."""
        return {"unet": unet(self, latent), "text_encoder": text_encoder(self, tokens)}

    def model(self, networks: Mapping[str, Any], vae: AutoencoderKL, tokens: CLIPTokenizer) -> StableDiffusion:
        """The model of these networks, on SD1.5's levels."""
        scheduler = {**SCHEDULER, "prediction_type": self.prediction}
        return StableDiffusion(networks["unet"], vae, networks["text_encoder"], tokens, scheduler)


def vae(config: VAEConfig, size: Size) -> AutoencoderKL:
    """An autoencoder; see docs/results for nano-sd's sizes in comparison with others."""
    config.latent_shape(size)
    count = len(config.widths)
    blocks: dict[str, Any] = {  # diffusers declares them as tuples of one
        "down_block_types": ("DownEncoderBlock2D",) * count, "up_block_types": ("UpDecoderBlock2D",) * count,
        "block_out_channels": config.widths, "sample_size": sized(height_width(size))}
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=config.latent_channels, layers_per_block=config.layers,
        norm_num_groups=8, mid_block_add_attention=False, **blocks)


def unet(config: TeacherConfig, latent: Sequence[int]) -> UNet2DConditionModel:
    """A UNet for latents of that shape [C, h, w]; text enters at every level but the first, or at the only one."""
    reads = [level > 0 or len(config.widths) == 1 for level in range(len(config.widths))]
    blocks: dict[str, Any] = {
        "down_block_types": tuple("CrossAttnDownBlock2D" if text else "DownBlock2D" for text in reads),
        "up_block_types": tuple("CrossAttnUpBlock2D" if text else "UpBlock2D" for text in reversed(reads)),
        "sample_size": sized(latent[1:])}
    if config.pooled:
        if config.text_width % POOLING_HEADS:
            raise UsageError(f"pooled text needs a width that is a multiple of {POOLING_HEADS}, got "
                             f"{config.text_width}; change --method.network.text-width")
        blocks["addition_embed_type"] = "text"
    return UNet2DConditionModel(
        in_channels=latent[0], out_channels=latent[0], block_out_channels=config.widths,
        layers_per_block=config.layers, norm_num_groups=16, cross_attention_dim=config.text_width,
        attention_head_dim=4, **blocks)


def tokenizer(captions: Iterable[str], tokens: int, merges: int | None = None) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer whose merges make every word of `captions` one token; any text still works.

    The same captions give the same vocabulary, in any process: a resumed run must find its tokens again.

    Args:
        tokens: longest prompt, start and end included.
        merges: at most so many, the most frequent first; rare words are then several tokens.
    """
    alphabet = sorted(ByteLevel.alphabet())
    # CLIP pairs the letters that stand for a word's bytes, which for plain English are the word's own.
    letters = ByteLevel(add_prefix_space=False, use_regex=False)
    said = Counter(letters.pre_tokenize_str(word)[0][0] for c in captions
                   for word in re.findall(r"\w+|[^\w\s]+", c.lower()))
    learnt = _merges(said, merges)
    vocab = [*alphabet, *[a + "</w>" for a in alphabet], *["".join(pair) for pair in learnt]]
    vocab = [*dict.fromkeys(vocab), START, END]
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        files[0].write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
        files[1].write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in learnt)]) + "\n")
        return CLIPTokenizer(vocab=str(files[0]), merges=str(files[1]), bos_token=START, eos_token=END,
                             unk_token=END, pad_token=END, model_max_length=tokens)


def _merges(words: Counter[str], bound: int | None) -> list[tuple[str, str]]:
    """Byte-pair merges until every word is one token, or `bound`; ties go to the first pair in the alphabet.

    Not the trainer of `tokenizers`: it breaks ties by the order of a hash table, another one in every process.
    """
    spelled = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    pairs: Counter[tuple[str, str]] = Counter()
    holders: defaultdict[tuple[str, str], set[str]] = defaultdict(set)  # the words in which a pair has been seen

    def count(word: str, sign: int) -> None:
        for pair in pairwise(spelled[word]):
            pairs[pair] += sign * words[word]
            holders[pair].add(word)

    for word in spelled:
        count(word, 1)
    merges: list[tuple[str, str]] = []
    while (bound is None or len(merges) < bound) and (most := max(pairs.values(), default=0)) > 0:
        best = min(pair for pair, seen in pairs.items() if seen == most)
        merges.append(best)
        for word in holders.pop(best):
            count(word, -1)
            spelled[word] = _merged(spelled[word], best)
            count(word, 1)
        del pairs[best]
    return merges


def _merged(tokens: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for token in tokens:
        if out and (out[-1], token) == pair:
            out[-1] += token
        else:
            out.append(token)
    return out


def text_encoder(config: TeacherConfig | FlowConfig, tokens: CLIPTokenizer,
                 kind: Callable[[CLIPTextConfig], nn.Module] = CLIPTextModel) -> nn.Module:
    """A text encoder of that class, CLIPTextModel or one with a projection, of the config's sizes."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    special: dict[str, Any] = {name: getattr(tokens, name) for name in names}
    width = config.text_width
    return kind(CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=width, intermediate_size=2 * width, projection_dim=width,
        num_hidden_layers=config.text_layers, num_attention_heads=4, max_position_embeddings=config.tokens, **special))


def load_vae(folder: str) -> AutoencoderKL:
    """The trained autoencoder of a folder, of a model's folder, or of the package ("emoji-vae", "nano-sd"), frozen."""
    if not Path(folder).exists() and "/" not in folder and (ASSETS / folder).is_dir():
        folder = str(ASSETS / folder)
    if Path(folder, "vae", "config.json").is_file():
        folder = str(Path(folder, "vae"))
    if not Path(folder, "config.json").is_file():
        raise UsageError(f"{folder}: no autoencoder there; train one with: jdm train nano-vae")
    try:
        return whole_network(AutoencoderKL, folder).float().eval().requires_grad_(False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"{folder} is not a complete autoencoder ({in_short(error)}); train one with: jdm train "
                         "nano-vae") from None
