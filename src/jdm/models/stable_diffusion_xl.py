"""SDXL: a second text encoder, and a UNet that is told the picture's size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from jdm.models.folder import tokenizer
from jdm.models.stable_diffusion import StableDiffusion
from jdm.models.stock import Part
from jdm.models.text import TOKENIZERS, TextEncoder, TwoTextEncoders
from jdm.size import height_width


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
        return TwoTextEncoders(self.text_encoder, self.tokenizer, self.text_encoder_2, self.tokenizer_2,
                               height_width(self.size), self.zeros, one_by_one=one_by_one)

    def _of_pipeline(self) -> dict[str, Any]:
        return {"force_zeros_for_empty_prompt": self.zeros, "add_watermarker": False}
