"""Pictures with captions, as a person would have them: folders and shards."""

import io
import tarfile

import numpy as np
import torch
from PIL import Image


def folder_of(place, count: int = 3, captions: bool = True):
    """`count` pictures of 40 x 24, the i-th of grey value 5 i."""
    place.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(np.full((24, 40, 3), 5 * i, np.uint8)).save(place / f"{i}.png")
        if captions:
            (place / f"{i}.txt").write_text(f"caption {i}\n")
    return place


SHAPES = [(40, 40), (60, 30), (30, 60), (40, 40), (41, 40)]  # width, height


def of_three_shapes(place, count: int = 20, captions=("a coat",), maps: bool = False):
    """`count` noisy pictures of SHAPES in turn; with `maps` each has itself as its control map."""
    place.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        width, height = SHAPES[i % len(SHAPES)]
        image = Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8))
        image.save(place / f"{i:02}.png")
        (place / f"{i:02}.txt").write_text(captions[i % len(captions)])
        if maps:
            (place / "maps").mkdir(exist_ok=True)
            image.save(place / "maps" / f"{i:02}.png")
    return place


def picture(path, value: int = 100, size=(40, 24), mode: str = "RGB"):
    """A plain picture of one grey value, `size` is width and height; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).convert(mode).save(path)
    return path


def encoded(value: int = 100, size=(40, 24), kind: str = "JPEG") -> bytes:
    """The bytes of a plain picture."""
    out = io.BytesIO()
    Image.new("RGB", size, (value,) * 3).save(out, kind)
    return out.getvalue()


def shard(path, members):
    """A tar file of (name, bytes) pairs; returns its path as text."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


def captions_of(pictures) -> list[str]:
    """The first caption of each picture."""
    rows = torch.arange(len(pictures))
    return pictures.prompts(rows, torch.zeros(len(rows)))
