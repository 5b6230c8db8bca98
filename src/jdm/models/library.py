"""Models by name: the shipped ones, a diffusers folder, or a hub id."""

from __future__ import annotations

import json
from pathlib import Path

from jdm.models.stable_diffusion import CARD, StableDiffusion

ASSETS = Path(__file__).parents[1] / "assets"
SHIPPED = {
    "nano-sd": ("nano-sd", None),
    "nano-controlnet": ("nano-sd", "nano-controlnet"),
    "nano-canny": ("nano-canny", None),
}


def load_model(name: str) -> StableDiffusion:
    """A shipped model ("nano-sd", "nano-controlnet", "nano-canny"), a diffusers folder, or a hub id."""
    if name in SHIPPED and not Path(name).is_dir():
        folder, controlnet = SHIPPED[name]
        model = StableDiffusion.load(str(ASSETS / folder), str(ASSETS / controlnet) if controlnet else None)
        card = ASSETS / (controlnet or folder) / CARD
        return model.with_parts(card=json.loads(card.read_text())) if card.is_file() else model
    return StableDiffusion.load(name)
