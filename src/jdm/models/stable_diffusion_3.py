"""Stable Diffusion 3 and 3.5: a flow-matching transformer of two streams (MMDiT), two CLIP text models and a T5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from diffusers import AutoencoderKL, SD3ControlNetModel, SD3Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from jdm.errors import UsageError
from jdm.models.adapters import Adapter, without_adapters
from jdm.models.flow import FlowModel, TransformerDenoiser, told_size
from jdm.models.folder import tokenizer
from jdm.models.stock import Part
from jdm.models.text import TOKENIZERS, TextEncoder, refuse_foreign_tokenizer, whole_tokenizer
from jdm.score import Prompts, Text
from jdm.size import Size, spelled

SHARE = 4  # a new ControlNet has one block for so many of the transformer's
TOKENS = 256  # of T5, by default in the stock pipeline


class SD3Denoiser(TransformerDenoiser):
    """An SD3Transformer2DModel and SD3ControlNetModels as one denoiser; its output is the velocity eps - x0."""

    def _denoised(self, x_t: Tensor, timestep: Tensor, text: Text, control: Tensor | None) -> Tensor:
        assert isinstance(text, tuple)
        states, pooled = text[0], text[1]["pooled"]
        told: dict[str, Any] = {"timestep": timestep, "return_dict": False}
        residuals: list[Tensor] = []
        for net, raw, strength in zip(self.controlnets, self.latents_of(control) if control is not None else [],
                                      self.strengths, strict=False):
            found = self._residuals(cast(SD3ControlNetModel, net), x_t, raw.to(x_t), strength, states, pooled, told)
            residuals = [a + b for a, b in zip(residuals, found, strict=True)] if residuals else found
        return self.backbone(hidden_states=x_t, encoder_hidden_states=states, pooled_projections=pooled,
                             block_controlnet_hidden_states=residuals or None, **told)[0]

    def _residuals(self, net: SD3ControlNetModel, x_t: Tensor, raw: Tensor, strength: float, states: Tensor,
                   pooled: Tensor, told: dict[str, Any]) -> list[Tensor]:
        """A ControlNet's residuals, given what the stock pipeline gives ControlNets of its kind."""
        blind = net.config["force_zeros_for_pooled_projection"]  # such ones know neither pooled states nor the shift
        shown = (raw - (0.0 if blind else self.shift)) * self.scale
        hidden = x_t if net.pos_embed is not None else cast(Any, self.backbone).pos_embed(x_t)
        return net(hidden_states=hidden, controlnet_cond=shown, conditioning_scale=strength,
                   encoder_hidden_states=cast(Tensor, None if net.context_embedder is None else states),
                   pooled_projections=torch.zeros_like(pooled) if blind else pooled, **told)[0]

    def feature_layers(self) -> list[nn.Module]:
        return self.spread(cast(Any, self.backbone).transformer_blocks)

    def blocks(self, net: nn.Module) -> list[nn.Module]:
        return [*cast(Any, net).transformer_blocks]


class ThreeTextEncoders(TextEncoder):
    """Prompts -> SD3's (hidden states [B, L + T, D], {pooled [B, P]}): CLIP's two side by side, then T5's.

    Args:
        second: the second CLIP text model with projection. third: T5, None where the folder has none; its states are
            then zeros, and prompts that CLIP cannot hold are refused.
        width: D, of the states that the transformer reads.
        tokens: T, of T5's states.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, second: nn.Module, tokenizer_2: Any, third: nn.Module | None,
                 tokenizer_3: Any, width: int, tokens: int, one_by_one: bool = False):
        super().__init__(model, tokenizer, one_by_one=one_by_one)
        self.second, self.tokenizer_2, self.third, self.tokenizer_3 = second, tokenizer_2, third, tokenizer_3
        self.width, self.tokens = width, tokens

    @property
    def networks(self) -> list[tuple[nn.Module, Any]]:
        third = [] if self.third is None else [(self.third, self.tokenizer_3)]
        return [(self.model, self.tokenizer), (self.second, self.tokenizer_2), *third]

    def encode(self, prompts: Prompts) -> list[tuple[Tensor, ...]]:
        """(CLIP's states [L, D1 + D2], pooled [P1 + P2]) for each prompt, and T5's states [T, D] where it is there.

        Raises:
            UsageError: a prompt is longer than CLIP reads, and there is no T5.
        """
        states, pooled, longest = [], [], self.tokenizer.model_max_length
        for model, own in ((self.model, self.tokenizer), (self.second, self.tokenizer_2)):
            output: Any = model(self._ids(own, prompts, longest, model), output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled.append(output[0])
        parts = [torch.cat(states, dim=-1), torch.cat(pooled, dim=-1)]
        if self.third is not None:
            parts.append(self.third(self._ids(self.tokenizer_3, prompts, self.tokens, self.third))[0])
        else:
            self._refuse_long(prompts, longest)
        return list(zip(*parts, strict=True))

    @staticmethod
    def _ids(tokenizer: Any, prompts: Prompts, length: int, model: nn.Module) -> Tensor:
        found = tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt", max_length=length)
        return found.input_ids.to(next(model.parameters()).device)

    def _refuse_long(self, prompts: Prompts, longest: int) -> None:
        for prompt in prompts:
            if (n := len(self.tokenizer([prompt]).input_ids[0])) > longest:
                raise UsageError(f"the prompt {prompt[:40]!r}... has {n} tokens, CLIP reads {longest} and this model "
                                 "has no T5 (text_encoder_3 and tokenizer_3), which reads the rest; put T5 back into "
                                 "the folder, or shorten the captions")

    def stacked(self, rows: list[Any]) -> Text:
        clip, pooled, *third = (torch.stack(part) for part in zip(*rows, strict=True))
        clip = functional.pad(clip, (0, self.width - clip.shape[-1]))
        zeros = clip.new_zeros(len(rows), self.tokens, self.width)
        return torch.cat([clip, third[0] if third else zeros], dim=-2), {"pooled": pooled}


@dataclass(frozen=True)
class StableDiffusion3(FlowModel):
    """The parts of an SD3 or SD3.5 folder, in float32, frozen and in eval mode; a `Family`.

    Attributes:
        pixels: size of the pictures, where it is not what the transformer's config says.
        tokens: length of T5's part of the text states, `max_sequence_length` of the stock pipeline.
    """

    NAME: ClassVar[str] = "SD3"
    PARTS: ClassVar[dict[str, Part]] = {
        "transformer": Part.of(SD3Transformer2DModel), "vae": Part.of(AutoencoderKL),
        "text_encoder": Part.of(CLIPTextModelWithProjection), "tokenizer": Part(TOKENIZERS, tokenizer),
        "text_encoder_2": Part.of(CLIPTextModelWithProjection), "tokenizer_2": Part(TOKENIZERS, tokenizer),
        "text_encoder_3": Part.of(T5EncoderModel, null=True),
        "tokenizer_3": Part(("T5TokenizerFast", "T5Tokenizer"),
                            lambda path, part: whole_tokenizer(path, part, T5Tokenizer), null=True),
        "controlnet": Part.of(SD3ControlNetModel, needed=False)}
    PIPELINES: ClassVar[tuple[str, str]] = ("StableDiffusion3Pipeline", "StableDiffusion3ControlNetPipeline")
    SHARED: ClassVar[tuple[str, ...]] = ("in_channels", "patch_size", "num_attention_heads", "attention_head_dim",
                                         "pooled_projection_dim")
    # Attention and feed-forward of both streams.
    lora_targets: ClassVar[tuple[str, ...]] = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff.net.0.proj",
        "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")

    transformer: SD3Transformer2DModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer
    text_encoder_2: CLIPTextModelWithProjection
    tokenizer_2: CLIPTokenizer
    scheduler: dict
    text_encoder_3: T5EncoderModel | None = None
    tokenizer_3: Any = None
    controlnet: SD3ControlNetModel | None = None
    card: dict | None = None
    pixels: Size | None = None
    tokens: int = TOKENS

    @classmethod
    def _of_card(cls, card: dict) -> dict[str, Any]:
        return super()._of_card(card) | {"tokens": card.get("max_sequence_length", TOKENS)}

    @property
    def noted(self) -> dict[str, Any]:
        return super().noted | ({} if self.tokens == TOKENS else {"max_sequence_length": self.tokens})

    def _refuse_widths(self, path: str) -> None:
        clips = [cast(Any, text).config for text in (self.text_encoder, self.text_encoder_2)]
        read, pooled = (self.transformer.config[key] for key in ("joint_attention_dim", "pooled_projection_dim"))
        third = None if self.text_encoder_3 is None else self.text_encoder_3.config.d_model
        if sum(c.hidden_size for c in clips) > read or third not in (None, read):
            raise UsageError(f"{path}: the transformer reads text states of width {read}, its text encoders write "
                             f"{sum(c.hidden_size for c in clips)} (CLIP) and {third} (T5); put back the text encoders "
                             "it was trained with")
        if (written := sum(c.projection_dim for c in clips)) != pooled:
            raise UsageError(f"{path}: the transformer reads pooled text states of width {pooled}, its text encoders "
                             f"write {written}; put back the text encoders it was trained with")
        if self.vae.config.get("shift_factor") is None:
            raise UsageError(f"{path}: its autoencoder's config names no shift_factor, which SD3's pipelines need; put "
                             "back its own autoencoder, or \"shift_factor\": 0 where its latents have none")

    def _refuse_tokenizers(self, path: str) -> None:
        for network, own in self.text().networks[:2]:
            refuse_foreign_tokenizer(own, cast(Any, network).config, path)

    @property
    def patch(self) -> int:
        return self.transformer.config["patch_size"]

    @property
    def _own_size(self) -> Size:
        return self.transformer.config["sample_size"] * self.downscale

    def latent_shape(self, n: int, size: Size) -> tuple[int, int, int, int]:
        shape, most = super().latent_shape(n, size), self.transformer.config["pos_embed_max_size"]
        if most and max(shape[2:]) > most * self.patch:
            raise UsageError(f"this model draws pictures of at most {most * self.patch * self.downscale} pixels a "
                             f"side, got {spelled(size)}")
        return shape

    def text(self, one_by_one: bool = False) -> TextEncoder:
        return ThreeTextEncoders(self.text_encoder, self.tokenizer, self.text_encoder_2, self.tokenizer_2,
                                 self.text_encoder_3, self.tokenizer_3, self.transformer.config["joint_attention_dim"],
                                 self.tokens, one_by_one=one_by_one)

    def denoiser(self, backbone: nn.Module | None = None, controlnet: nn.Module | None = None,
                 adapters: Sequence[Adapter] = (), also: Sequence[nn.Module] = ()) -> SD3Denoiser:
        return SD3Denoiser(self, backbone, controlnet, also, adapters)

    def new_controlnet(self, backbone: nn.Module | None = None) -> SD3ControlNetModel:
        """A ControlNet of the transformer's first blocks, one in SHARE of them, with zero projections (JDM Eq. 10).

        It is told the pooled text states, and sees the control's latents with the autoencoder's shift.
        """
        net = cast(SD3Transformer2DModel, backbone or self.transformer)
        n = max(1, net.config["num_layers"] // SHARE)
        dual = tuple(k for k in net.config["dual_attention_layers"] if k < n)
        own = {k: v for k, v in net.config.items() if not k.startswith("_")}
        made: Any = SD3ControlNetModel.from_config({**own, "num_layers": n, "dual_attention_layers": dual,
                                                    "force_zeros_for_pooled_projection": False})
        wanted = made.state_dict().keys()
        plain = {k: v for k, v in without_adapters(net.state_dict()).items() if k in wanted}
        missing, _ = made.load_state_dict(plain, strict=False)
        assert all(key.startswith(("controlnet_blocks.", "pos_embed_input.")) for key in missing), missing
        return made.float()

    @staticmethod
    def asked(levels: Sequence[int] | None, guidance: float, n: int, controlled: bool = False,
              size: Size | None = None) -> dict[str, Any]:
        steps: dict[str, Any] = {"num_inference_steps": len(levels) if levels else 28}
        if levels and tuple(levels) != (n - 1,):  # sigmas before the shift
            steps["sigmas"] = [(level + 1) / n for level in levels]
        return {**steps, "guidance_scale": guidance, **told_size(size)}

    def _of_pipeline(self) -> dict[str, Any]:
        return {name: None for name in ("text_encoder_3",) if getattr(self, name) is None}
