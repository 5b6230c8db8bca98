"""Every picture of a source, read once through the data layer of training, and what was seen of it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from jdm.controls import Control
from jdm.data.pictures import UnreadableError
from jdm.data.sources import Pictures
from jdm.loading import Loaded
from jdm.run import Needs, Run

AT_ONCE = 128  # pictures in memory
ASPECTS = {f"{a}:{b}": a / b for a, b in ((1, 1), (5, 4), (4, 5), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16),
                                          (2, 1), (1, 2), (3, 1), (1, 3))}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Looking:
    """No method: what `jdm doctor` looks at a source with where no recipe is named.

    Attributes:
        control: Control to show beside the pictures, by name or import path; empty for none.
    """

    control: str = ""

    def needs(self, run: Run) -> Needs:
        return Needs({}, self.control or (f"{__name__}:AsItIs" if run.data.controls else ""), prompts=())


class AsItIs(Control):
    """Control maps of one's own, whatever they show."""

    name = "map"
    channels = 3

    def h(self, images: Tensor) -> Tensor:
        return images


class Reader(Loaded):
    """A run's data as training reads it; what training refuses is set aside, so that all of it is found."""

    strict = False


@dataclass
class Seen:
    """Everything that was seen of a split.

    Attributes:
        sides: (width, height) of the pictures that can be read.
        unreadable: index -> why that picture cannot be read.
        contents: digest of a picture's pixels at the run's size -> the indices that have it.
        plain: indices of pictures of one colour all over.
    """

    pictures: Pictures
    sides: list[tuple[int, int]] = field(default_factory=list)
    unreadable: dict[int, str] = field(default_factory=dict)
    contents: dict[bytes, list[int]] = field(default_factory=dict)
    plain: list[int] = field(default_factory=list)

    @property
    def sound(self) -> list[int]:
        """The rows that can be read."""
        return [row for row, index in enumerate(self.pictures.indices.tolist()) if index not in self.unreadable]

    @property
    def doubled(self) -> list[list[int]]:
        """Groups of indices whose pictures are the same."""
        return [indices for indices in self.contents.values() if len(indices) > 1]

    @property
    def captions(self) -> Counter[str]:
        """Caption -> how many pictures, or classes of them, have it."""
        keys = self.pictures.keys().unique().tolist()
        return Counter(caption for key in keys for caption in self.pictures.captions[key])

    def aspects(self) -> Counter[str]:
        """The nearest usual aspect, width to height -> how many pictures have it."""
        return Counter(min(ASPECTS, key=lambda name: abs(ASPECTS[name] * height / width - 1))
                       for width, height in self.sides)


def seen(pictures: Pictures, title: str, progress: Progress) -> Seen:
    """Reads a split once.

    Args:
        progress: called with the title, how many pictures are read, and how many there are.

    Raises:
        UsageError: something else than a picture cannot be read, such as the disk.
    """
    found, n = Seen(pictures), len(pictures)
    for rows in torch.arange(n).split(AT_ONCE) if n else ():
        _read(found, rows)
        progress(title, int(rows[-1]) + 1, n)
    return found


def _read(found: Seen, rows: Tensor) -> None:
    pictures = found.pictures
    while len(rows):
        try:
            images, _ = pictures.batch(rows), pictures.maps(rows)
            break
        except UnreadableError as error:
            indices = pictures.indices[rows].tolist()
            found.unreadable |= {indices[place]: why for place, why in error.at.items()}
            rows = torch.tensor([int(row) for place, row in enumerate(rows) if place not in error.at], dtype=torch.long)
    else:
        return
    indices = pictures.indices[rows]
    if pictures.sides:
        found.sides += pictures.sides(indices)
    flat = images.flatten(1)
    plain = flat.amin(1) == flat.amax(1)
    for index, image, one_colour in zip(indices.tolist(), images.contiguous().numpy(), plain.tolist(), strict=True):
        found.contents.setdefault(hashlib.blake2b(image.data, digest_size=16).digest(), []).append(index)
        if one_colour:
            found.plain.append(index)
