"""SDXL: a second text encoder, and a UNet that is told the picture's size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from jdm.models.adapters import Adapter
from jdm.models.folder import tokenizer
from jdm.models.stable_diffusion import StableDiffusion, UNetDenoiser
from jdm.models.stock import Part
from jdm.models.text import TOKENIZERS, TextEncoder, TwoTextEncoders
from jdm.score import Text


class SDXLDenoiser(UNetDenoiser):
    """A UNet that is told the size of the very pictures it denoises, which differs between aspect buckets.

    It is told their original size, the place of their crop and their target size [B, 6]: original and target are the
    size that is drawn, and nothing is cut, as stock pipelines tell it by default.

    Attributes:
        downscale: pixels per latent, along one side.
    """

    downscale: int

    def told(self, x_t: Tensor, text: Text) -> dict[str, Any]:
        assert isinstance(text, tuple)
        hidden, added = text
        height, width = (side * self.downscale for side in x_t.shape[2:])
        sizes = x_t.new_tensor([height, width, 0, 0, height, width]).expand(len(x_t), -1)
        return super().told(x_t, (hidden, {**added, "time_ids": sizes}))


@dataclass(frozen=True)
class StableDiffusionXL(StableDiffusion):
    """The parts of an SDXL folder, in float32, frozen and in eval mode.

    Attributes:
        zeros: the empty prompt is all zeros, as the folder's model_index.json says.
    """

    NAME: ClassVar[str] = "SDXL"
    PARTS: ClassVar[dict[str, Part]] = {
        **StableDiffusion.PARTS, "text_encoder_2": Part.of(CLIPTextModelWithProjection),
        "tokenizer_2": Part(TOKENIZERS, tokenizer)}
    PIPELINES: ClassVar[tuple[str, str]] = ("StableDiffusionXLPipeline", "StableDiffusionXLControlNetPipeline")

    text_encoder_2: CLIPTextModelWithProjection | None = None
    tokenizer_2: CLIPTokenizer | None = None
    zeros: bool = True

    @classmethod
    def _more(cls, path: str, index: dict) -> dict[str, Any]:
        return {"zeros": bool(index.get("force_zeros_for_empty_prompt", True))}

    @property
    def _text_width(self) -> int:
        assert self.text_encoder_2 is not None
        return self.text_encoder.config.hidden_size + self.text_encoder_2.config.hidden_size

    def text(self, one_by_one: bool = False) -> TextEncoder:
        assert self.text_encoder_2 is not None
        assert self.tokenizer_2 is not None
        return TwoTextEncoders(self.text_encoder, self.tokenizer, self.text_encoder_2, self.tokenizer_2, self.zeros,
                               one_by_one=one_by_one)

    def denoiser(self, backbone: nn.Module | None = None, controlnet: nn.Module | None = None,
                 adapters: Sequence[Adapter] = (), also: Sequence[nn.Module] = ()) -> SDXLDenoiser:
        made = SDXLDenoiser(backbone or self.unet, controlnet, also, adapters)
        made.downscale = self.downscale
        return made

    def _of_pipeline(self) -> dict[str, Any]:
        return {"force_zeros_for_empty_prompt": self.zeros, "add_watermarker": False}
