"""Draws the 24 hand-made sketches of docs/drawings with a model: python examples/hand_drawings.py MODEL OUT.png.

MODEL has a ControlNet for `strokes`, such as that of `jdm train emoji-strokes`. The sheet has a row of sketches above
each row of pictures. `strokes` in the file are mouse paths: lists of points on a square canvas.
"""

import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from jdm.controls import Strokes
from jdm.data.pictures import grid
from jdm.evaluation.sampling import Sampler
from jdm.generator import starting_noise
from jdm.library import load_model
from jdm.size import height_width
from jdm.space import to_bytes

DRAWINGS = Path(__file__).parents[1] / "docs" / "drawings" / "drawings.json"
SEED, COLUMNS, FINE = 0, 8, 8


def drawn(drawing: dict[str, Any], canvas: float, side: int, pen: float = Strokes().width) -> Tensor:
    """One drawing's control map [1, side, side] in [0, 1], white on black; `pen` in 64ths of the side."""
    sheet = np.zeros((side * FINE, side * FINE), np.uint8)
    for stroke in drawing["strokes"]:
        points = (np.array(stroke) * side * FINE / canvas).round().astype(np.int32)
        cv2.polylines(sheet, [points.reshape(-1, 1, 2)], False, 255, round(pen * side * FINE / 64), cv2.LINE_AA)
    small = cv2.resize(sheet, (side, side), interpolation=cv2.INTER_AREA)
    return torch.from_numpy(small)[None].float() / 255


def main(name: str, out: Path) -> None:
    read = json.loads(DRAWINGS.read_text())
    model = load_model(name)
    side = height_width(model.size)[0]
    maps = torch.stack([drawn(one, read["canvas"], side) for one in read["drawings"]])
    shown = Strokes().image(maps)
    prompts = [one["prompt"] for one in read["drawings"]]
    made = Sampler(model)(starting_noise(model.latent_shape(len(maps), model.size), SEED), prompts, shown, seed=SEED)
    rows = [part for pair in zip(to_bytes(shown * 2 - 1).split(COLUMNS), made.split(COLUMNS), strict=True)
            for part in pair]
    grid(torch.cat(rows), COLUMNS, scale=2).save(out)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
