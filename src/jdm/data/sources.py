"""Captioned pictures: the packaged Fashion-MNIST, a folder, tar shards, or a dataset of the Hugging Face hub.

A split is written as in `datasets`: "train", "validation", "test", "test[:5000]". The order of pictures and the choice
of captions are pure functions of (seed, step), so that they do not depend on resuming or on the world size.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from jdm.data.pictures import SUFFIXES, decoded, load_picture, read_all, read_picture
from jdm.data.shards import Shards
from jdm.errors import UsageError, in_short, remedy
from jdm.files import ASSETS, parsed
from jdm.models import hub
from jdm.size import Size, height_width, spelled

if TYPE_CHECKING:
    from jdm.space import Space

PACKAGED = ASSETS / "fashion-mnist"
PACKAGED_EMOJI = ASSETS / "emoji"
TRAINING_SET_PLACES = (Path("/usr/share/datasets/fashion-mnist"),)
HELD_OUT = 5000  # training pictures kept for validation

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
TEMPLATES = ("{}", "a {}", "a photo of a {}", "a picture of a {}", "a grey photo of a {}",
             "a product photo of a {}", "a {} on a black background", "one {}")


@dataclass(frozen=True)
class Pictures:
    """A split: uint8 pictures by index, their captions, and class labels if the source has them.

    Attributes:
        images: indices [B] -> uint8 [B, 3, H, W].
        captions: for each picture, or each label, the tuple of captions to draw from.
        labels: class of each picture, by index, or None if unknown. With labels, `captions` is indexed by label.
        indices: [N] indices of the pictures in this split.
        size: side, or (height, width), in pixels.
        source: name for reports.
        files: indices [B] -> files these pictures are read from: one for each, or the files that hold all of them.
        latents: space -> latents [N, C, h, w] of the split, or None if they are not prepared (cache.py).
        slow: True if a picture is opened and decoded on access, so that a run should read ahead (batches.py).
    """

    images: Callable[[Tensor], Tensor]
    captions: tuple[tuple[str, ...], ...]
    labels: Tensor | None
    indices: Tensor
    size: Size
    source: str
    files: Callable[[Tensor], list[Path]] | None = None
    latents: Callable[[Space], Tensor] | None = None
    slow: bool = False

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, rows: Tensor) -> Tensor:
        """Pictures of rows [B] of this split: uint8 [B, 3, H, W]."""
        return self.images(self.indices[rows])

    def label(self, rows: Tensor) -> Tensor | None:
        return None if self.labels is None else self.labels[self.indices[rows]]

    def prompts(self, rows: Tensor, uniform: Tensor) -> list[str]:
        """One caption per row, chosen by `uniform` [B] in [0, 1)."""
        picture = self.indices[rows]
        keys = picture if self.labels is None else self.labels[picture]
        choices = [self.captions[k] for k in keys.tolist()]
        return [c[int(u * len(c))] for c, u in zip(choices, uniform.tolist(), strict=True)]

    def part(self, expression: str) -> Pictures:
        """The slice "[a:b]" of this split."""
        return replace(self, indices=self.indices[_slice(expression)])


def load_pictures(source: str, split: str, size: Size) -> Pictures:
    """Loads a split of a source: "fashion-mnist", "emoji", a folder of captioned pictures, .tar shards or a folder of
    them, or a hub dataset id.
    """
    match = re.fullmatch(r"(\w+)(\[[-\d]*:[-\d]*\])?", split)
    if match is None or match[1] not in ("train", "validation", "test"):
        raise UsageError(f"split must be train, validation or test, with or without [a:b]; got {split!r}")
    if source == "fashion-mnist":
        pictures = _fashion_mnist(match[1], size)
    elif source == "emoji":
        pictures = _split_shards(_emoji_folder(match[1]), match[1], size)
    elif Path(source).is_dir() and any(Path(source).glob("*.tar")):
        pictures = _split_shards(Path(source), match[1], size)
    elif Path(source).is_dir():
        pictures = _folder(Path(source), match[1], size)
    elif source.endswith(".tar"):
        pictures = _shards(source, match[1], size)
    else:
        pictures = _hub(source, match[1], size)
    pictures = pictures.part(match[2]) if match[2] else pictures
    if len(pictures) == 0:
        raise UsageError(f"{source}, split {split}: no pictures; give a wider slice or more pictures")
    return pictures


def fingerprint(pictures: Pictures, count: int = 1000) -> str:
    """SHA-256 of a split's length and of its first `count` pictures and captions; recorded with every run."""
    rows = torch.arange(min(count, len(pictures)))
    digest = hashlib.sha256(pictures.batch(rows).numpy().tobytes())
    digest.update(json.dumps([len(pictures), pictures.prompts(rows, torch.zeros(len(rows)))]).encode())
    return digest.hexdigest()


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
    captions = tuple(tuple(_phrase(t, n) for n in names for t in TEMPLATES) for names in FASHION_CLASSES)
    return Pictures(
        images=lambda rows: grey[rows].expand(-1, 3, -1, -1),
        captions=captions,
        labels=torch.from_numpy(labels.astype(np.int64)),
        indices=torch.arange(*bounds),
        size=size,
        source=f"fashion-mnist/{split}",
        files=lambda rows: files,
    )


def _phrase(template: str, noun: str) -> str:
    phrase = template.format(noun)
    return re.sub(r"\ba ([aeiou])", r"an \1", phrase)


def _training_folder() -> Path:
    places = [Path(p) for p in [os.environ.get("FASHION_MNIST", "")] if p] + list(TRAINING_SET_PLACES)
    for place in places:
        if (place / "train-images-idx3-ubyte.gz").is_file():
            return place
    raise UsageError(
        "the Fashion-MNIST training set (60,000 pictures) was not found; install Debian's package "
        "dataset-fashion-mnist, set FASHION_MNIST to a folder with train-images-idx3-ubyte.gz and "
        "train-labels-idx1-ubyte.gz, or give --data.source zalando-datasets/fashion_mnist"
    )


def _idx(path: Path, header: int) -> np.ndarray:
    if not path.is_file():
        raise UsageError(f"{path} is missing, or not a regular file; fetch it again")
    try:
        return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header).copy()
    except (OSError, EOFError, ValueError) as error:
        raise UsageError(f"{path} is not a readable IDX file ({error}); fetch it again") from None


def _folder(folder: Path, split: str, size: Size) -> Pictures:
    """A folder with a sub-folder per split, or else one in which 1 of 20 pictures each is for validation and test."""
    root = folder / split if (folder / split).is_dir() else folder
    captions = _table(root)
    files = sorted(p for p in _below(root) if p.suffix.lower() in SUFFIXES)
    if not files:
        raise UsageError(f"{root}: no pictures ({', '.join(sorted(SUFFIXES))}); is this the right folder?")
    texts = [(_caption(p, root, captions),) for p in files]
    keep = [i for i in range(len(files)) if root != folder or _share(i) == split]
    from datasets import Dataset

    table = Dataset.from_dict({"file": [str(p) for p in files]})
    return Pictures(
        images=lambda rows: read_all(lambda file: load_picture(file, size), table[rows.tolist()]["file"]),
        captions=tuple(texts),
        labels=None,
        indices=torch.tensor(keep, dtype=torch.long),
        size=size,
        source=f"{folder.name}/{split}",
        files=lambda rows: [files[i] for i in rows.tolist()],
        slow=True,
    )


def _below(root: Path) -> Iterator[Path]:
    """Every file of a folder and of those in it; a folder that cannot be read is an error, not empty."""

    def refuse(error: OSError) -> None:
        raise UsageError(f"{error.filename}: {error.strerror}; {remedy(error)}") from None

    for folder, _, names in os.walk(root, onerror=refuse):
        yield from (Path(folder) / name for name in names)


def _text(file: Path, errors: str = "strict") -> str:
    """A text file's contents; UsageError if it is no regular file or cannot be read."""
    if not file.is_file():
        raise UsageError(f"{file} is not a regular file; replace it by one, or move it away")
    try:
        return file.read_text(encoding="utf-8", errors=errors)
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}; {remedy(error)}") from None


def _share(i: int) -> str:
    return {0: "validation", 1: "test"}.get(i % 20, "train")


def _table(root: Path) -> dict[str, str]:
    """File name -> caption, from the folder's only .csv or .jsonl file with the columns file_name and text."""
    tables = sorted([*root.glob("*.csv"), *root.glob("*.jsonl")])
    if len(tables) > 1:
        raise UsageError(f"{root} holds {len(tables)} tables ({tables[0].name}, {tables[1].name}, ...); keep one")
    if not tables:
        return {}
    try:
        text = _text(tables[0])
        if tables[0].suffix == ".jsonl":
            rows = [parsed(line, f"{tables[0]}, line {n}", dict, "give one object a line")
                    for n, line in enumerate(text.splitlines(), 1) if line.strip()]
        else:
            rows = list(csv.DictReader(text.splitlines()))
        return {r["file_name"]: str(r.get("text") or r.get("caption") or "") for r in rows}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(f"{tables[0]}: needs the columns file_name and text ({type(error).__name__}: "
                         f"{error})") from None


def _caption(path: Path, root: Path, table: dict[str, str]) -> str:
    for key in (path.relative_to(root).as_posix(), path.name):
        if table.get(key):
            return table[key]
    beside = path.with_suffix(".txt")
    text = _text(beside, errors="replace").strip() if beside.is_file() else ""
    if not text:
        raise UsageError(f"{path} has no caption; put it into {beside.name} beside it, or into a CSV or JSONL file "
                         "with the columns file_name and text")
    return text


def _emoji_folder(split: str) -> Path:
    """The folder with that split of the emoji: the package's own for test."""
    if split == "test" and any(PACKAGED_EMOJI.glob("*.tar")):
        return PACKAGED_EMOJI
    folder = Path(os.environ.get("EMOJI") or "data/emoji")
    if not any(folder.glob(f"{split}*.tar")):
        raise UsageError(f"the emoji's {split} pictures are not in {folder}; make them there with: jdm data emoji "
                         f"{folder}; or set EMOJI to the folder that has them")
    return folder


def _split_shards(folder: Path, split: str, size: Size) -> Pictures:
    """A folder with the shards of each split: train*.tar, validation*.tar, test*.tar."""
    if not any(folder.glob(f"{split}*.tar")):
        raise UsageError(f"{folder} holds .tar shards, but none named {split}*.tar; name them by their split, or give "
                         f"'{folder}/*.tar' to have 1 of 20 pictures each kept for validation and test")
    pictures = _shards(f"{folder}/{split}*.tar", split, size)
    return replace(pictures, indices=torch.arange(len(pictures.captions)), source=f"{folder.name}/{split}")


def _shards(source: str, split: str, size: Size) -> Pictures:
    shards = Shards(source)
    return Pictures(
        images=lambda rows: shards.images(rows, size),
        captions=tuple(shards.captions),
        labels=None,
        indices=torch.tensor([i for i in range(len(shards)) if _share(i) == split], dtype=torch.long),
        size=size,
        source=f"{source.rsplit('/', 1)[-1]}/{split}",
        files=lambda rows: shards.files(),
        slow=True,
    )


def _hub(name: str, split: str, size: Size) -> Pictures:
    from datasets import Image, load_dataset

    why = hub.unfetched(name)
    try:
        whole = load_dataset(name, split="test" if split == "test" else "train")
    except Exception as error:
        raise UsageError(f"{name!r} is neither fashion-mnist, a folder, nor a dataset that could be loaded "
                         f"({in_short(error)}){f'; {why}' if why else ''}") from None
    features = whole.features
    image = next((k for k in ("image", "img", "picture") if k in features), None)
    text = next((k for k in ("text", "caption", "prompt") if k in features), None)
    if image is None or (text is None and "label" not in features):
        raise UsageError(f"{name}: needs an image column and a text or label column, has {list(features)}")
    column: str = image
    if isinstance(features[column], Image):  # this package opens them: datasets would open any format
        whole = whole.cast_column(column, Image(decode=False))
    if text is None:
        labels, names = torch.tensor(whole["label"]), features["label"].names
        captions = tuple(tuple(_phrase(t, n.lower()) for t in TEMPLATES) for n in names)
    else:
        labels, captions = None, tuple((c,) for c in whole[text])
    cut = len(whole) - min(HELD_OUT, len(whole) // 10)
    bounds = {"train": (0, cut), "validation": (cut, len(whole)), "test": (0, len(whole))}[split]
    return Pictures(
        images=lambda rows: read_all(lambda file: _held(file, name, size), whole[rows.tolist()][column]),
        captions=captions,
        labels=labels,
        indices=torch.arange(*bounds),
        size=size,
        source=f"{name}/{split}",
        files=lambda rows: [Path(part["filename"]) for part in whole.cache_files],
        slow=True,
    )


def _held(file: Any, name: str, size: Size) -> Tensor:
    """A picture of a hub dataset: its bytes, its path, or a picture that is open already."""
    if not isinstance(file, dict):
        return decoded(file, size, name)
    if file["bytes"] is None:
        return load_picture(file["path"], size)
    return read_picture(io.BytesIO(file["bytes"]), f"{name}: {file['path'] or 'a picture'}", len(file["bytes"]), size)


def _slice(expression: str) -> slice:
    low, high = expression.strip("[]").split(":")
    return slice(int(low) if low else None, int(high) if high else None)
