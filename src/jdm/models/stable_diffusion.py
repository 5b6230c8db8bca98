"""Stable Diffusion 1 and 2, and every model in their format: a UNet, an autoencoder and one CLIP text model.

No branch on a model's size or name.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from jdm.errors import UsageError
from jdm.models import schedulers
from jdm.models.adapters import Adapter, without_adapters
from jdm.models.family import Denoiser, ManySteps
from jdm.models.folder import tokenizer
from jdm.models.stock import Part, StockModel
from jdm.models.text import TOKENIZERS, TextEncoder
from jdm.schedule import NoiseSchedule
from jdm.score import Prediction, Text
from jdm.size import Size, height_width, sized
from jdm.space import channels_last

ENCODER = ("conv_in.", "time_embedding.", "add_embedding.", "class_embedding.", "down_blocks.", "mid_block.")


class UNetDenoiser(Denoiser):
    """A UNet2DConditionModel and ControlNetModels as one denoiser."""

    def _denoised(self, x_t: Tensor, timestep: Tensor, text: Text, control: Tensor | None) -> Tensor:
        x_t = channels_last(x_t)
        if self.controlnet is None or control is None:
            return self.with_residuals(x_t, timestep, text)
        images = channels_last(control).split(3, dim=1) if self.also else [channels_last(control)]
        sums: list[Tensor] = []
        for net, image, strength in zip(self.controlnets, images, self.strengths, strict=True):
            more = self.residuals(net, x_t, timestep, text, image, strength)
            sums = [a + b for a, b in zip(sums, more, strict=True)] if sums else more
        return self.with_residuals(x_t, timestep, text, sums)

    def residuals(self, net: nn.Module, x_t: Tensor, timestep: Tensor, text: Text, image: Tensor,
                  strength: float | Tensor) -> list[Tensor]:
        """The tensors that one ControlNet adds to the UNet's skips, and last to its middle, each times the strength."""
        down, mid = net(x_t, timestep, controlnet_cond=image, conditioning_scale=strength, **self.told(x_t, text))
        return [*down, mid]

    def with_residuals(self, x_t: Tensor, timestep: Tensor, text: Text, residuals: Sequence[Tensor] = ()) -> Tensor:
        """The UNet's output like x_t, with these added where `residuals` says; nothing is added if there are none."""
        added: dict[str, Any] = {} if not residuals else {"down_block_additional_residuals": tuple(residuals[:-1]),
                                                          "mid_block_additional_residual": residuals[-1]}
        return self.backbone(x_t, timestep, **added, **self.told(x_t, text))[0]

    def told(self, x_t: Tensor, text: Text) -> dict[str, Any]:
        """The text, and what else it must know of x_t, as arguments of a UNet or ControlNet."""
        states, added = (text, None) if isinstance(text, Tensor) else text
        return {"encoder_hidden_states": states, "added_cond_kwargs": added, "return_dict": False}

    def feature_layers(self) -> list[nn.Module]:
        backbone = cast(UNet2DConditionModel, self.backbone)
        return [*backbone.down_blocks, cast(nn.Module, backbone.mid_block)]

    def compressible(self) -> list[nn.Module]:
        """Linear layers of its transformer blocks and convolutions of its residual blocks: nearly all its weights."""
        inside = ((nn.Linear, BasicTransformerBlock), (nn.Conv2d, ResnetBlock2D))
        return [layer for kind, block in inside for part in self.backbone.modules() if isinstance(part, block)
                for key, layer in part.named_modules() if isinstance(layer, kind) and "lora_" not in key]

    def shard_units(self) -> list[nn.Module]:
        units: list[Any] = []
        for net in cast(list[Any], [self.backbone, *self.controlnets]):  # a ControlNet has no up_blocks
            units += [*net.down_blocks, net.mid_block, *getattr(net, "up_blocks", []), net]
        return units


@dataclass(frozen=True)
class StableDiffusion(StockModel):
    """The parts of a Stable-Diffusion-format folder, in float32, frozen and in eval mode; a `Family`."""

    NAME: ClassVar[str] = "Stable-Diffusion-format"
    NETWORK: ClassVar[str] = "UNet"
    BACKBONE: ClassVar[str] = "unet"
    PARTS: ClassVar[dict[str, Part]] = {
        "unet": Part.of(UNet2DConditionModel), "vae": Part.of(AutoencoderKL), "text_encoder": Part.of(CLIPTextModel),
        "tokenizer": Part(TOKENIZERS, tokenizer), "controlnet": Part.of(ControlNetModel, needed=False)}
    SCHEDULERS: ClassVar[tuple[str, ...]] = schedulers.KINDS
    CONTROL: ClassVar[str] = "image"
    PIPELINES: ClassVar[tuple[str, str]] = ("StableDiffusionPipeline", "StableDiffusionControlNetPipeline")
    SHARED: ClassVar[tuple[str, ...]] = ("in_channels", "block_out_channels", "cross_attention_dim")
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

    def _refuse_widths(self, path: str) -> None:
        read, written = self.unet.config["cross_attention_dim"], self._text_width
        if read != written:
            raise UsageError(f"{path}: the UNet reads text states of width {read}, its text encoder writes {written}; "
                             "put back the text encoder it was trained with")

    def _refuse_misfits(self, path: str) -> None:
        super()._refuse_misfits(path)
        if self.prediction == "epsilon" and not self.schedule.alphas_cumprod[-1]:
            raise UsageError(f"{path}: its schedule ends without signal (zero terminal SNR) and it predicts epsilon, "
                             "from which no x0 can be read there; use a model that predicts v, or drop "
                             "rescale_betas_zero_snr")

    @property
    def _text_width(self) -> int:
        """Width of the hidden states that the UNet reads."""
        return self.text_encoder.config.hidden_size

    @property
    def schedule(self) -> NoiseSchedule:
        """The scheduler's levels: its trained_betas or its beta ramp, rescaled to zero terminal SNR if it says so."""
        return NoiseSchedule(schedulers.alphas_cumprod(self.scheduler))

    @property
    def prediction(self) -> Prediction:
        return schedulers.complete(self.scheduler)["prediction_type"]

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

    def _of_pipeline(self) -> dict[str, Any]:
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

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

    def step_scheduler(self, levels: Sequence[int]) -> dict:
        return schedulers.step_scheduler(self.scheduler, levels)

    def many_steps(self, steps: int) -> ManySteps:
        return schedulers.DDIMSteps(self.scheduler, steps)

    @property
    def clip(self) -> float:
        return schedulers.clip(self.scheduler)

    @staticmethod
    def asked(levels: Sequence[int] | None, guidance: float, n: int, controlled: bool = False,
              size: Size | None = None) -> dict[str, Any]:
        if levels is not None and len(levels) > 1 and not schedulers.evenly_spaced(levels):
            return {"timesteps": list(levels), "guidance_scale": guidance}  # the scheduler finds no others by number
        return {"num_inference_steps": len(levels) if levels else 50, "guidance_scale": guidance}
