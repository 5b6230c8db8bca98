"""SDXL: a second text encoder, and a UNet that is told the picture's size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import diffusers
from torch import nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from jdm.models.folder import tokenizer, whole_network
from jdm.models.stable_diffusion import StableDiffusion
from jdm.models.text import TOKENIZERS, TextEncoder, TwoTextEncoders
from jdm.size import height_width


@dataclass(frozen=True)
class StableDiffusionXL(StableDiffusion):
    """The parts of an SDXL folder, in float32, frozen and in eval mode.

    Attributes:
        zeros: the empty prompt is all zeros, as the folder's model_index.json says.
    """

    NAME: ClassVar[str] = "SDXL"
    PARTS: ClassVar[tuple[str, ...]] = (*StableDiffusion.PARTS, "text_encoder_2", "tokenizer_2")
    CLASSES: ClassVar[dict[str, tuple[str, ...]]] = {
        **StableDiffusion.CLASSES, "text_encoder_2": ("CLIPTextModelWithProjection",), "tokenizer_2": TOKENIZERS}
    PIPELINES: ClassVar[tuple[str, str]] = ("StableDiffusionXLPipeline", "StableDiffusionXLControlNetPipeline")

    text_encoder_2: CLIPTextModelWithProjection | None = None
    tokenizer_2: CLIPTokenizer | None = None
    zeros: bool = True

    @classmethod
    def _more(cls, path: str, index: dict) -> dict[str, Any]:
        return {"text_encoder_2": whole_network(CLIPTextModelWithProjection, path, "text_encoder_2"),
                "tokenizer_2": tokenizer(path, "tokenizer_2"),
                "zeros": bool(index.get("force_zeros_for_empty_prompt", True))}

    @property
    def _text_width(self) -> int:
        assert self.text_encoder_2 is not None
        return self.text_encoder.config.hidden_size + self.text_encoder_2.config.hidden_size

    def modules(self) -> dict[str, nn.Module]:
        assert self.text_encoder_2 is not None
        return super().modules() | {"text_encoder_2": self.text_encoder_2}

    def text(self, one_by_one: bool = False) -> TextEncoder:
        assert self.text_encoder_2 is not None
        assert self.tokenizer_2 is not None
        return TwoTextEncoders(self.text_encoder, self.tokenizer, self.text_encoder_2, self.tokenizer_2,
                               height_width(self.size), self.zeros, one_by_one=one_by_one)

    def pipeline(self, scheduler: Any) -> diffusers.DiffusionPipeline:
        kind = getattr(diffusers, self.PIPELINES[self.controlnet is not None])
        parts: dict[str, Any] = {**self.modules(), "tokenizer_2": self.tokenizer_2}
        return kind(**parts, tokenizer=self.tokenizer, scheduler=scheduler,
                    force_zeros_for_empty_prompt=self.zeros, add_watermarker=False)
