"""The student of strokes beside the package: what it draws has the lines of the sketch it was given."""

import json
import sys
from pathlib import Path

import pytest
import torch

from jdm.controls import Strokes
from jdm.evaluation.questions import controls_of
from jdm.evaluation.sampling import Sampler
from jdm.generator import starting_noise
from jdm.library import load_model
from jdm.space import from_bytes, unit

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
from hand_drawings import DRAWINGS, drawn  # noqa: E402


@pytest.mark.skipif(not (ROOT / "weights").is_dir(), reason="these weights lie in the repository, not in the package")
def test_a_sketchs_lines_are_in_its_picture():
    read, control = json.loads(DRAWINGS.read_text()), Strokes()
    model = load_model(str(ROOT / "weights" / "emoji-strokes"))
    assert set(model.card["page"]["styles"]) == {"3d", "flat", "glossy", "noto", "blob", "twemoji"}
    maps = torch.stack([drawn(one, read["canvas"], 64) for one in read["drawings"]])
    words = [one["prompt"] for one in read["drawings"]]
    made = Sampler(model)(starting_noise(model.latent_shape(len(maps), 64), 0), words, control.image(maps), seed=0)
    seen = controls_of(control, unit(from_bytes(made)), "cpu")
    apart = (seen[:, None] - maps[None]).abs().mean((2, 3, 4))  # [picture, sketch]
    assert (apart.argmin(1) == torch.arange(len(maps))).float().mean() > 0.75
