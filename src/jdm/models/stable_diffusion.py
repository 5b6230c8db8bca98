"""Stable Diffusion 1 and 2, and every model in their format: a UNet, an autoencoder and one CLIP text model.

No branch on a model's size or name.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, cast

import diffusers
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from jdm.errors import UsageError, in_short, plural
from jdm.generator import Generator
from jdm.models import schedulers
from jdm.models.adapters import Adapter, without_adapters
from jdm.models.configs import REMEDY
from jdm.models.family import Denoiser
from jdm.models.folder import CARD, folder_json, folder_scheduler, model_index, tokenizer, whole_network
from jdm.models.text import TOKENIZERS, TextEncoder, refuse_foreign_tokenizer
from jdm.schedule import NoiseSchedule
from jdm.score import Prediction, ScoreModel, Text
from jdm.size import Size, height_width, sized, spelled
from jdm.space import Space

ENCODER = ("conv_in.", "time_embedding.", "add_embedding.", "class_embedding.", "down_blocks.", "mid_block.")


class UNetDenoiser(Denoiser):
    """A UNet2DConditionModel and ControlNetModels as one denoiser."""

    def _denoised(self, x_t: Tensor, timestep: Tensor, text: Text, control: Tensor | None) -> Tensor:
        states, added = (text, None) if isinstance(text, Tensor) else text
        told: dict[str, Any] = {"encoder_hidden_states": states, "added_cond_kwargs": added, "return_dict": False}
        if self.controlnet is None or control is None:
            return self.backbone(x_t, timestep, **told)[0]
        images = control.split(3, dim=1) if self.also else [control]
        sums: list[Tensor] = []
        for net, image, strength in zip(self.controlnets, images, self.strengths, strict=True):
            down, mid = net(x_t, timestep, controlnet_cond=image, conditioning_scale=strength, **told)
            sums = [a + b for a, b in zip(sums, [*down, mid], strict=True)] if sums else [*down, mid]
        return self.backbone(x_t, timestep, down_block_additional_residuals=tuple(sums[:-1]),
                             mid_block_additional_residual=sums[-1], **told)[0]

    def feature_layers(self) -> list[nn.Module]:
        backbone = cast(UNet2DConditionModel, self.backbone)
        return [*backbone.down_blocks, cast(nn.Module, backbone.mid_block)]

    def shard_units(self) -> list[nn.Module]:
        units: list[Any] = []
        for net in cast(list[Any], [self.backbone, *self.controlnets]):  # a ControlNet has no up_blocks
            units += [*net.down_blocks, net.mid_block, *getattr(net, "up_blocks", []), net]
        return units


@dataclass(frozen=True)
class StableDiffusion:
    """The parts of a Stable-Diffusion-format folder, in float32, frozen and in eval mode; a `Family`."""

    NAME: ClassVar[str] = "Stable-Diffusion-format"
    PARTS: ClassVar[tuple[str, ...]] = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    # The classes that model_index.json may name for each part.
    CLASSES: ClassVar[dict[str, tuple[str, ...]]] = {
        "unet": ("UNet2DConditionModel",), "vae": ("AutoencoderKL",), "text_encoder": ("CLIPTextModel",),
        "tokenizer": TOKENIZERS, "scheduler": schedulers.KINDS, "controlnet": ("ControlNetModel",)}
    # Without and with a ControlNet.
    PIPELINES: ClassVar[tuple[str, str]] = ("StableDiffusionPipeline", "StableDiffusionControlNetPipeline")
    # Attention, feed-forward and convolutions, as LCM-LoRA chooses them.
    lora_targets: ClassVar[tuple[str, ...]] = (
        "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
        "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: dict
    controlnet: ControlNetModel | None = None
    card: dict | None = None

    @classmethod
    def load(cls, path: str, controlnet: str | None = None) -> Self:
        """From a diffusers folder or hub id; `controlnet` adds one from its own folder.

        Raises:
            UsageError: the folder does not hold a model in Stable Diffusion's format.
        """
        index = model_index(path)
        missing = [p for p in cls.PARTS if p not in index]
        if missing:
            raise UsageError(f"{path} is not a {cls.NAME} model: it lacks {', '.join(missing)}; its model_index.json "
                             f"must name {'them' if len(missing) > 1 else 'it'}")
        cls._refuse_others(path, index)
        has_own = "controlnet" in index
        scheduler = folder_scheduler(path, index)
        try:
            control = (whole_network(ControlNetModel, controlnet) if controlnet else
                       whole_network(ControlNetModel, path, "controlnet") if has_own else None)
            model = cls(
                whole_network(UNet2DConditionModel, path, "unet"),
                whole_network(AutoencoderKL, path, "vae"),
                whole_network(CLIPTextModel, path, "text_encoder"),
                tokenizer(path, "tokenizer"),
                scheduler,
                control,
                folder_json(path, CARD),
                **cls._more(path, index),
            )
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} could not be loaded as a {cls.NAME} model: "
                             f"{(str(error).splitlines() or [type(error).__name__])[0][:200]}") from None
        for part in model.modules().values():
            part.float().eval().requires_grad_(False)
        model._refuse_misfits(path)
        return model

    @classmethod
    def _refuse_others(cls, path: str, index: dict) -> None:
        """UsageError where model_index.json names no class for a part, or one that is not this family's."""
        for part, kinds in cls.CLASSES.items():
            if part not in index and part not in cls.PARTS:
                continue
            entry = index[part]
            named = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
            if named is None:
                raise UsageError(f"{path}/model_index.json names no class for {part} ({json.dumps(entry)[:60]}); put "
                                 f"back its own, one of {', '.join(kinds)}")
            if named not in kinds:
                raise UsageError(f"{path}/model_index.json: {part} is a {named}; a {cls.NAME} model has "
                                 f"{' or '.join(kinds)}")

    def _refuse_misfits(self, path: str) -> None:
        """UsageError where the parts were made for different models: their shapes, levels or words would be wrong."""
        try:
            n = self.schedule.n
        except Exception as error:  # diffusers' own checks raise several
            raise UsageError(f"{path}/scheduler/scheduler_config.json gives no noise levels ({in_short(error)}); "
                             f"{REMEDY}") from None
        if max(levels := self.levels or (0,)) >= n:
            raise UsageError(f"{path}/{CARD}: levels: must be below {n}, the scheduler's, got {max(levels)}; {REMEDY}")
        read, written = self.unet.config["cross_attention_dim"], self._text_width
        if read != written:
            raise UsageError(f"{path}: the UNet reads text states of width {read}, its text encoder writes {written}; "
                             "put back the text encoder it was trained with")
        taken, latents = self.unet.config["in_channels"], self.vae.config["latent_channels"]
        if taken != latents:
            raise UsageError(f"{path}: the UNet takes {plural(taken, 'channel')}, its autoencoder writes latents "
                             f"of {latents}; put back its own autoencoder (UNets for inpainting and editing cannot be "
                             "teachers)")
        for network, own in self.text().networks:
            refuse_foreign_tokenizer(own, cast(Any, network).config, path)
        if (self.card or {}).get("kind") == "one-step" and not self.levels:
            raise UsageError(f"{path}: its {CARD} says one-step and names no levels; add \"levels\": "
                             f"[{n - 1}] there")
        if self.prediction == "epsilon" and not self.schedule.alphas_cumprod[-1]:
            raise UsageError(f"{path}: its schedule ends without signal (zero terminal SNR) and it predicts epsilon, "
                             "from which no x0 can be read there; use a model that predicts v, or drop "
                             "rescale_betas_zero_snr")

    @property
    def _text_width(self) -> int:
        """Width of the hidden states that the UNet reads."""
        return self.text_encoder.config.hidden_size

    @classmethod
    def _more(cls, path: str, index: dict) -> dict[str, Any]:
        """Further fields of another family's folder."""
        return {}

    def modules(self) -> dict[str, nn.Module]:
        parts = {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder,
                 "controlnet": self.controlnet}
        return {k: v for k, v in parts.items() if v is not None}

    def to(self, device: torch.device | str) -> Self:
        for part in self.modules().values():
            part.to(device)
        return self

    @property
    def schedule(self) -> NoiseSchedule:
        """The scheduler's levels: its trained_betas or its beta ramp, rescaled to zero terminal SNR if it says so."""
        return NoiseSchedule(schedulers.alphas_cumprod(self.scheduler))

    @property
    def prediction(self) -> Prediction:
        return schedulers.complete(self.scheduler)["prediction_type"]

    @property
    def levels(self) -> tuple[int, ...] | None:
        """The level indices that a student of this project runs at; None for a multi-step model."""
        levels = (self.card or {}).get("levels")
        return None if levels is None else tuple(levels)

    @property
    def backbone(self) -> UNet2DConditionModel:
        return self.unet

    @property
    def space(self) -> Space:
        return Space(self.vae)

    @property
    def downscale(self) -> int:
        """Pixels per latent, along one side."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    def latent_shape(self, n: int, size: Size) -> tuple[int, int, int, int]:
        height, width = height_width(size)
        if min(height, width) < 1 or height % self.downscale or width % self.downscale:
            raise UsageError(f"both sides of a picture must be multiples of {self.downscale}, got {spelled(size)}")
        return n, self.unet.config["in_channels"], height // self.downscale, width // self.downscale

    @property
    def size(self) -> Size:
        """Side of the pictures the model was trained on, in pixels."""
        return sized([side * self.downscale for side in height_width(self.unet.config["sample_size"])])

    def at(self, size: Size) -> Self:
        """The same weights, saying another picture size: what pipelines draw where none is asked for."""
        unet = copy.copy(self.unet)  # the weights are shared, the config is not
        unet.register_to_config(sample_size=sized(self.latent_shape(1, size)[2:]))
        return self if size == self.size else self.with_parts(unet=unet)

    def text(self, one_by_one: bool = False) -> TextEncoder:
        """A new encoder of prompts, which remembers them. SDXL's also tells the UNet the picture size."""
        return TextEncoder(self.text_encoder, self.tokenizer, one_by_one=one_by_one)

    def pipeline(self, scheduler: Any) -> diffusers.DiffusionPipeline:
        """The stock pipeline of these parts."""
        kind = getattr(diffusers, self.PIPELINES[self.controlnet is not None])
        parts: dict[str, Any] = {**self.modules(), "safety_checker": None, "feature_extractor": None}
        return kind(**parts, tokenizer=self.tokenizer, scheduler=scheduler, requires_safety_checker=False)

    def denoiser(self, backbone: nn.Module | None = None, controlnet: nn.Module | None = None,
                 adapters: Sequence[Adapter] = (), also: Sequence[nn.Module] = ()) -> UNetDenoiser:
        return UNetDenoiser(backbone or self.unet, controlnet, also, adapters)

    def new_controlnet(self, backbone: nn.Module | None = None) -> ControlNetModel:
        """A ControlNet that starts as the UNet's encoder, with zero convolutions (JDM Eq. 10).

        Its hint encoder halves a full-size control map until it meets the latent side.
        """
        unet = cast(UNet2DConditionModel, backbone or self.unet)
        halvings = self.downscale.bit_length() - 1
        widths = (16, 32, 96, 256)[: halvings + 1]
        if unet.config["block_out_channels"][0] < 256:  # a small UNet has a small hint encoder
            widths = (8, 16, 32, 64)[: halvings + 1]
        net = ControlNetModel.from_unet(unet, conditioning_channels=3, conditioning_embedding_out_channels=widths,
                                        load_weights_from_unet=False)
        plain = without_adapters(unet.state_dict())
        missing, _ = net.load_state_dict({k: v for k, v in plain.items() if k.startswith(ENCODER)}, strict=False)
        assert all(key.startswith("controlnet_") for key in missing), missing  # zero convolutions and hint encoder
        return net.float()

    def score_of(self, text: TextEncoder, net: Denoiser, guidance: float = 1.0) -> ScoreModel[Denoiser]:
        return ScoreModel(net, self.schedule, self.prediction, text, guidance)

    def generator(self, text: TextEncoder, net: Denoiser, levels: Sequence[int] | None = None) -> Generator:
        own = self.levels or (self.schedule.n - 1,)
        return Generator(net, self.schedule, own if levels is None else levels, text, self.prediction)

    def step_scheduler(self, levels: Sequence[int]) -> dict:
        return schedulers.step_scheduler(self.scheduler, levels)

    def with_networks(self, **networks: nn.Module | None) -> Self:
        """With another `backbone` or `controlnet`; controlnet=None drops the model's own."""
        return replace(self, **{"unet" if name == "backbone" else name: net for name, net in networks.items()})

    def with_parts(self, **parts: Any) -> Self:
        return replace(self, **parts)
