"""Captioned pictures: the packaged Fashion-MNIST, a folder, tar shards, or a dataset of the Hugging Face hub.

A split is written as in `datasets`: "train", "validation", "test", "test[:5000]". The order of pictures and the choice
of captions are pure functions of (seed, step), so that they do not depend on resuming or on the world size.
"""

from __future__ import annotations

import gzip
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from jdm.data.emoji.classes import classes_of, fully_named
from jdm.data.folder import folder_pictures
from jdm.data.hub_set import HELD_OUT, TEMPLATES, hub_pictures, phrase
from jdm.data.shards import shard_pictures
from jdm.data.split import Pictures, fingerprint
from jdm.errors import UsageError, in_short
from jdm.files import ASSETS
from jdm.run import Data
from jdm.size import Size, height_width, spelled

__all__ = ["TEMPLATES", "Pictures", "fingerprint", "load_pictures"]

PACKAGED = ASSETS / "fashion-mnist"
PACKAGED_EMOJI = ASSETS / "emoji"
TRAINING_SET_PLACES = (Path("/usr/share/datasets/fashion-mnist"),)

FASHION_CLASSES: tuple[tuple[str, ...], ...] = (
    ("t-shirt", "top", "tee shirt"),
    ("trouser", "pair of trousers", "pair of pants"),
    ("pullover", "sweater", "jumper"),
    ("dress", "frock"),
    ("coat", "overcoat"),
    ("sandal", "open shoe"),
    ("shirt", "button shirt"),
    ("sneaker", "running shoe", "trainer"),
    ("bag", "handbag", "purse"),
    ("ankle boot", "boot"),
)
AS_USUAL = Data()  # reads a source without any flag that says how


def load_pictures(source: str, split: str, size: Size, how: Data = AS_USUAL, needed: bool = True,
                  strict: bool = True) -> Pictures:
    """Loads a split of a source: "fashion-mnist", "emoji", a folder of captioned pictures, .tar shards or a folder of
    them, or a hub dataset id.

    Args:
        how: its fields say what are pictures, captions and control maps, where that is ambiguous (docs/data.md).
        needed: a split without pictures is an error.
        strict: raises what training refuses; where False it is set aside and left in the report (`Report.refused`).

    Raises:
        UsageError: there is no such source or split, or something in it is ambiguous or cannot be read as it was meant.
    """
    match = re.fullmatch(r"(\w+)(\[[-\d]*:[-\d]*\])?", split)
    if match is None or match[1] not in ("train", "validation", "test"):
        raise UsageError(f"split must be train, validation or test, with or without [a:b]; got {split!r}")
    pictures = _read(source, match[1], size, how)
    if strict:
        pictures.report.settle()
    pictures = pictures.part(match[2]) if match[2] else pictures
    if needed and len(pictures) == 0:
        said = "; ".join(pictures.report.lines())
        raise UsageError(f"{source}, split {split}: no pictures{f' ({said})' if said else ''}; give a wider slice or "
                         "more pictures")
    return pictures


def _read(source: str, split: str, size: Size, how: Data) -> Pictures:
    if source in ("fashion-mnist", "emoji"):
        _refuse_layout(source, how)
    if source == "fashion-mnist":
        return _fashion_mnist(split, size)
    if source == "emoji":
        return _emoji(split, size, how)
    folder = Path(source)
    try:
        there = folder.is_dir()
    except (OSError, ValueError) as error:
        raise UsageError(f"{source[:100]}: no folder can have this name ({in_short(error)[:80]}); give a folder of "
                         "pictures") from None
    if there and any(file for file in folder.glob("*.tar") if not file.name.startswith(".")):
        return _split_shards(folder, split, size, how)
    if there:
        return folder_pictures(folder, split, size, how)
    if source.endswith(".tar"):
        return shard_pictures(source, split, size, how)
    return hub_pictures(source, split, size, how)


def _refuse_layout(source: str, how: Data) -> None:
    """UsageError where a flag says how to read a packaged source, which is read in one way alone."""
    for name in ("pictures", "captions", "controls", "table", "encoding", "splits"):
        if getattr(how, name):
            raise UsageError(f"--data.{name} is for a source of your own, and {source} is packaged; leave it out, or "
                             "name your source with --data.source")
    if how.recut:
        flag = f"--data.buckets {how.buckets}" if how.buckets else f"--data.crop {how.crop}"
        raise UsageError(f"{flag} is for pictures that are cropped, and those of {source} are square and shown whole; "
                         "leave it out, or name your source with --data.source")


# Sources


def _fashion_mnist(split: str, size: Size) -> Pictures:
    sides = height_width(size)
    if min(sides) < 28:
        raise UsageError(f"Fashion-MNIST pictures are 28 px and are padded with black; size must be at least "
                         f"28, got {spelled(size)}")
    folder, stem = (PACKAGED, "t10k") if split == "test" else (_training_folder(), "train")
    files = [folder / f"{stem}-images-idx3-ubyte.gz", folder / f"{stem}-labels-idx1-ubyte.gz"]
    images, labels = _idx(files[0], 16).reshape(-1, 28, 28), _idx(files[1], 8)
    padded = np.pad(images, ((0, 0), *[((side - 28) // 2, (side - 27) // 2) for side in sides]))
    grey = torch.from_numpy(padded)[:, None]
    cut = len(grey) - HELD_OUT
    bounds = {"train": (0, cut), "validation": (cut, len(grey)), "test": (0, len(grey))}[split]
    captions = tuple(tuple(phrase(t, n) for n in names for t in TEMPLATES) for names in FASHION_CLASSES)
    return Pictures(
        images=lambda rows, frames=None: grey[rows].expand(-1, 3, -1, -1),
        captions=captions,
        labels=torch.from_numpy(labels.astype(np.int64)),
        indices=torch.arange(*bounds),
        size=size,
        source=f"fashion-mnist/{split}",
        files=lambda rows: files,
        sides=lambda rows: [(28, 28)] * len(rows),
    )


def _training_folder() -> Path:
    places = [Path(p) for p in [os.environ.get("FASHION_MNIST", "")] if p] + list(TRAINING_SET_PLACES)
    for place in places:
        if (place / "train-images-idx3-ubyte.gz").is_file():
            return place
    raise UsageError(
        "the Fashion-MNIST training set (60,000 pictures: splits train and validation) was not found; install "
        "Debian's package dataset-fashion-mnist, set FASHION_MNIST to a folder with train-images-idx3-ubyte.gz and "
        "train-labels-idx1-ubyte.gz, give --data.source zalando-datasets/fashion_mnist, or train on the packaged test "
        "pictures: --data.split 'test[:5000]' --data.validation 'test[5000:]'"
    )


def _idx(path: Path, header: int) -> np.ndarray:
    if not path.is_file():
        raise UsageError(f"{path} is missing, or not a regular file; fetch it again")
    try:
        return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header).copy()
    except (OSError, EOFError, ValueError) as error:
        raise UsageError(f"{path} is not a readable IDX file ({error}); fetch it again") from None


def _emoji(split: str, size: Size, how: Data) -> Pictures:
    """Emoji with their classes; training draws any caption, held-out pictures are asked for by name and style."""
    found = _split_shards(_emoji_folder(split), split, size, how)
    captions = found.captions if split == "train" else fully_named(found.captions)
    return replace(found, captions=captions, classes=classes_of(found.captions))


def _emoji_folder(split: str) -> Path:
    """The folder with that split of the emoji: the package's own for test."""
    if split == "test" and any(PACKAGED_EMOJI.glob("*.tar")):
        return PACKAGED_EMOJI
    folder = Path(os.environ.get("EMOJI") or "data/emoji")
    if not any(folder.glob(f"{split}*.tar")):
        raise UsageError(f"the emoji's {split} pictures are not in {folder}; make them there with: jdm data emoji "
                         f"{folder}; or set EMOJI to the folder that has them")
    return folder


def _split_shards(folder: Path, split: str, size: Size, how: Data) -> Pictures:
    """A folder with the shards of each split: train*.tar, validation*.tar, test*.tar."""
    if not any(folder.glob(f"{split}*.tar")):
        raise UsageError(f"{folder} holds .tar shards, but none named {split}*.tar; name them by their split, or give "
                         f"'{folder}/*.tar' to have 1 of 20 pictures each kept for validation and test")
    pictures = shard_pictures(f"{folder}/{split}*.tar", split, size, how, own=True)
    return replace(pictures, source=f"{folder.name}/{split}")
