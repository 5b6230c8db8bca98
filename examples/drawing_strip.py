"""A drawing turns into a picture, line by line: python examples/drawing_strip.py MODEL OUT.png.

Takes a few of the sketches of docs/drawings, cut off after a sixth of their lines' length, two sixths and so on, with
what MODEL, a student of `strokes`, draws for each at one prompt and seed.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hand_drawings import DRAWINGS, drawn

from jdm.controls import Strokes
from jdm.data.pictures import grid
from jdm.evaluation.sampling import Sampler
from jdm.generator import starting_noise
from jdm.library import load_model
from jdm.size import height_width
from jdm.space import to_bytes

SHOWN, STAGES, SEED = ("cat face", "umbrella", "mushroom"), 8, 0


def begun(drawing: dict[str, Any], share: float) -> dict[str, Any]:
    """The drawing after this share of its lines' whole length."""
    strokes = [np.array(stroke, float) for stroke in drawing["strokes"]]
    left = share * sum(length(stroke) for stroke in strokes)
    kept = []
    for stroke in strokes:
        whole = length(stroke)
        if left >= whole:
            kept.append(stroke.tolist())
        elif left > 0:
            ends = np.concatenate([[0.0], np.linalg.norm(np.diff(stroke, axis=0), axis=1).cumsum()])
            at = [np.interp(left, ends, stroke[:, axis]) for axis in (0, 1)]
            kept.append([*stroke[ends < left].tolist(), at])
        left -= whole
    return {**drawing, "strokes": kept}


def length(stroke: np.ndarray) -> float:
    return float(np.linalg.norm(np.diff(stroke, axis=0), axis=1).sum())


def main(name: str, out: Path) -> None:
    read = json.loads(DRAWINGS.read_text())
    chosen = [one for name in SHOWN for one in read["drawings"] if one["name"] == name]
    model = load_model(name)
    side = height_width(model.size)[0]
    stages = [begun(one, (k + 1) / STAGES) for one in chosen for k in range(STAGES)]
    shown = Strokes().image(torch.stack([drawn(stage, read["canvas"], side) for stage in stages]))
    z = starting_noise(model.latent_shape(len(chosen), model.size), SEED).repeat_interleave(STAGES, 0)
    made = Sampler(model)(z, [stage["prompt"] for stage in stages], shown, seed=SEED)
    rows = [part for pair in zip(to_bytes(shown * 2 - 1).split(STAGES), made.split(STAGES), strict=True)
            for part in pair]
    grid(torch.cat(rows), STAGES, scale=2).save(out)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
