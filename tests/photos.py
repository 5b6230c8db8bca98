"""A folder of pictures with captions, as a person would have it."""

import numpy as np
from PIL import Image


def folder_of(place, count: int = 3, captions: bool = True):
    """`count` pictures of 40 x 24, the i-th of grey value 5 i."""
    place.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(np.full((24, 40, 3), 5 * i, np.uint8)).save(place / f"{i}.png")
        if captions:
            (place / f"{i}.txt").write_text(f"caption {i}\n")
    return place
