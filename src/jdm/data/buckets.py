"""Aspect buckets: sizes of about one area, the pictures that go to each, and the bucket that a step's batch is of.

Buckets take turns by a rule without chance in the long run: in every N steps, N being the number of pictures, a bucket
has exactly as many steps as it has pictures, so that each picture is seen as often as any other; and in any part of
these its steps are spread evenly. Everything is a function of (pictures, seed, step).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from jdm.data.noise import keyed_generator, rows_at
from jdm.data.split import Pictures
from jdm.errors import UsageError, in_short
from jdm.run import Data
from jdm.size import Size, height_width, sized, spelled

LONGEST = 4  # times its shorter side is a bucket's longer one at most
AT_ONCE = 1024  # pictures whose sides are read in one piece


def bucket_sizes(size: Size, multiple: int) -> list[Size]:
    """The buckets' sizes, from the tallest to the widest: both sides multiples, and an area of at most that of `size`.

    Those from 1:4 to 4:1 of which neither side could be longer; `size` is one of them. Without a multiple (0) `size`
    is the only one.

    Raises:
        UsageError: a side of `size` is no multiple, or there is no other bucket.
    """
    if not multiple:
        return [size]
    height, width = height_width(size)
    if height % multiple or width % multiple:
        near = " ".join(str(max(1, round(side / multiple)) * multiple) for side in dict.fromkeys((height, width)))
        raise UsageError(f"--data.size {spelled(size)} is not made of multiples of --data.buckets {multiple}; give "
                         f"--data.size {near}, or other buckets")
    area, n = height * width, height * width // multiple**2

    def fits(side: int) -> int:
        return area // side // multiple * multiple

    sides = [(fits(across), across) for across in range(multiple, (n + 1) * multiple, multiple)]
    found = [sized((down, across)) for down, across in sides if (down, across) == (height, width) or
             (fits(down) == across and max(down, across) <= LONGEST * min(down, across))]
    if len(found) < 2:
        raise UsageError(f"--data.buckets {multiple} leaves {spelled(size)} alone; give smaller multiples")
    return found


def nearest(sides: Sequence[tuple[int, int]], sizes: Sequence[Size]) -> Tensor:
    """The place in `sizes`, from the tallest to the widest, of the bucket for each picture (width, height): [N].

    Nearest in the ratio of the two proportions; exactly between two, the taller one.
    """
    shapes = [Fraction(width, height) for height, width in map(height_width, sizes)]
    between = [a * b for a, b in pairwise(shapes)]  # squares of the geometric means
    places = {one: bisect_left(between, Fraction(one[0], one[1]) ** 2) for one in set(sides)}
    return torch.tensor([places[one] for one in sides], dtype=torch.long)


class Buckets:
    """The buckets of a split, and the rows of each step's batch.

    Args:
        sides: (width, height) of each picture.

    Attributes:
        sizes: of those that have pictures, from the tallest to the widest.
        of: [N] the bucket of each row, as its place in `sizes`.
        counts: pictures in each.
    """

    def __init__(self, sides: Sequence[tuple[int, int]], size: Size, multiple: int):
        sizes = bucket_sizes(size, multiple)
        used, self.of, self.counts = nearest(sides, sizes).unique(return_inverse=True, return_counts=True)
        self.sizes = [sizes[k] for k in used.tolist()]
        self.rows = [(self.of == k).nonzero().flatten() for k in range(len(used))]
        self._place = torch.empty_like(self.of)  # of each row within its bucket
        for rows in self.rows:
            self._place[rows] = torch.arange(len(rows))
        self._turns: dict[tuple[int, int], Tensor] = {}

    def at(self, step: int, batch: int, seed: int) -> tuple[int, Tensor]:
        """(bucket, this share's rows) of a step: of its bucket, the next piece of permutation after permutation."""
        n = len(self.of)
        row = int(self._turn(seed, step // n)[step % n])
        k = int(self.of[row])
        count = int(self.counts[k])
        visit = step // n * count + int(self._place[row])
        return k, self.rows[k][rows_at(count, batch, seed, visit, spelled(self.sizes[k]))]

    def _turn(self, seed: int, turn: int) -> Tensor:
        """[N] a row for each of N steps, whose bucket the step is of; those of a bucket are spread evenly over them."""
        if (seed, turn) not in self._turns:
            luck = torch.rand(len(self.of), generator=keyed_generator(seed, turn, "buckets"), dtype=torch.float64)
            at = (self._place + luck) / self.counts[self.of]
            self._turns = {(seed, turn): at.argsort(stable=True)}
        return self._turns[seed, turn]

    @cached_property
    def said(self) -> str:
        """The buckets and their pictures in a sentence."""
        each = (f"{spelled(size)}: {count:,}" for size, count in zip(self.sizes, self.counts.tolist(), strict=True))
        return f"pictures in aspect buckets (height x width): {', '.join(each)}"

    def small(self, batch: int) -> str:
        """Warns of buckets with fewer pictures than a batch, in a sentence; empty where there are none."""
        few = {spelled(size): n for size, n in zip(self.sizes, self.counts.tolist(), strict=True) if n < batch}
        if not few:
            return ""
        named = ", ".join(f"{size} ({n:,})" for size, n in few.items())
        return (f"aspect buckets with fewer pictures than a batch of {batch:,}, which show a picture several times in "
                f"one batch and no more often than others in all: {named}; lower --batch, or raise --data.buckets, to "
                "have none")


def buckets_of(pictures: Pictures, data: Data) -> Buckets:
    """The buckets of a split, from the headers of its pictures; one that cannot be read counts as unreadable.

    Raises:
        UsageError: the source cannot say its pictures' sides. UnreadableError: too many pictures cannot be read.
    """
    if pictures.sides is None:
        raise UsageError(f"{pictures.source} does not say the sides of its pictures, which --data.buckets goes by; "
                         "leave it out")
    sides: list[tuple[int, int]] = []
    for indices in pictures.indices.split(AT_ONCE):
        try:
            sides += pictures.sides(indices)
        except UsageError:  # of the store, not of a picture
            raise
        except Exception:  # Pillow's decoders raise anything; which picture it was is found one by one
            sides += [_sides_of(pictures, index) for index in indices]
    return Buckets(sides, pictures.size, data.buckets)


def _sides_of(pictures: Pictures, index: Tensor) -> tuple[int, int]:
    assert pictures.sides is not None
    try:
        return pictures.sides(index[None])[0]
    except UsageError:
        raise
    except Exception as error:
        name = pictures.name_of(int(index))
        why = f"{name}: damaged or incomplete ({in_short(error)}); copy or save it again"
        pictures.unread.note({int(index): why}, len(pictures))
        height, width = height_width(pictures.size)
        return width, height
