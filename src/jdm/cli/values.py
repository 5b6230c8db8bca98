"""Types of flags: what argparse calls on a word of the command line, with a refusal in one line."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence


def hint(word: str, known: Iterable[str]) -> str:
    """"did you mean NAME? " for the known name nearest to a word; empty where none is near."""
    import difflib

    tails: dict[str, str] = {}
    for name in known:
        tails.setdefault(name.split(".")[-1].lstrip("-"), name)
        tails.setdefault(name, name)
    near = difflib.get_close_matches(word, tails, n=1) or difflib.get_close_matches(
        word.lstrip("-").split(".")[-1], tails, n=1)
    return f"did you mean {tails[near[0]]}? " if near else ""


class Among:
    """An argparse type that accepts these names and suggests the nearest to any other."""

    def __init__(self, names: Sequence[str]):
        self.names = names

    def __call__(self, text: str) -> str:
        if text in self.names:
            return text
        raise argparse.ArgumentTypeError(f"there is no {text!r}; {hint(text, self.names) or ', '.join(self.names)}")


class Whole:
    """An argparse type of whole numbers from low to high."""

    def __init__(self, low: int, high: int, within: str = ""):
        self.low, self.high, self.within = low, high, within or f"in [{low}, {high}]"

    def __call__(self, text: str) -> int:
        if not text.isdecimal() or len(text) > 15 or not self.low <= int(text) <= self.high:
            raise argparse.ArgumentTypeError(f"must be a whole number {self.within}, got {text[:40]!r}")
        return int(text)


side = Whole(1, 4096)  # of a picture, in pixels
pictures = Whole(1, 10_000)
seeds = Whole(1, 100)
drawings = Whole(1, 100)
port = Whole(0, 65535)
seed = Whole(0, 2**40 - 1, "in 0..2^40")


def positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 15 or int(text) < 1:
        most = " and below 10^15" * (len(text) > 15)
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1{most}, got {text[:40]!r}")
    return int(text)


def factor(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 100:  # so that NaN is refused
        raise argparse.ArgumentTypeError(f"must be a number in [0, 100], got {text[:40]!r}")
    return value


def share(text: str) -> float:
    if not (value := factor(text)) <= 1:
        raise argparse.ArgumentTypeError(f"must be a number in [0, 1], got {text[:40]!r}")
    return value


def text(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"must be text in UTF-8, got {ascii(text)[:60]}") from None
    return text


def token(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{8,200}", text):
        raise argparse.ArgumentTypeError("must be 8 to 200 letters, digits, - and _")
    return text
