"""Mutated JSON files: what a person's editor, a broken disk or another program could leave in place of a good one."""

import json
import random
from collections.abc import Iterator
from typing import Any

WRONG = (None, True, False, -1, 0, 1, 2.5, 10**30, -(10**30), 1e308, "", "x", "../x", "x.py:X", "\ud800", "\0", [],
         [[]], [None], ["x"], [1, "x"], [-1, 0], {}, {"": 1}, {"type": "Run"})
DEEP = 100_000  # levels of nesting


def mutated(text: str, seed: int, count: int) -> Iterator[tuple[str, str]]:
    """(what was done, the text of the file after it), the same for the same seed."""
    rng = random.Random(seed)
    whole = json.loads(text)
    for _ in range(count):
        if rng.random() < 0.2:
            yield _damaged(text, rng)
            continue
        value = json.loads(text)
        places = list(_places(whole))
        place = rng.choice([p for p in places if len(p) == 1] if rng.random() < 0.5 else places)
        yield _changed(value, place, rng)


def _damaged(text: str, rng: random.Random) -> tuple[str, str]:
    cut = rng.randrange(len(text))
    return rng.choice((
        ("cut off", text[:cut]), ("empty", ""), ("nested", "[" * DEEP), ("nested object", '{"a":' * DEEP),
        ("null", "null"), ("list", f"[{text}]"), ("string", json.dumps(text)), ("number", "7"), ("NaN", "NaN"),
        ("no UTF-8", text[:cut] + "\udcff" + text[cut:]), ("a huge number", text.replace("1", "1" * 5000, 1)),
        ("twice", text + text), ("one character less", text[:cut] + text[cut + 1:]),
    ))


def _places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """The path of every value inside a value."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(min(len(value), 5)):
            yield (*at, key)
            yield from _places(value[key], (*at, key))


def _changed(value: Any, place: tuple, rng: random.Random) -> tuple[str, str]:
    *path, key = place
    parent = value
    for step in path:
        parent = parent[step]
    spelled = ".".join(map(str, place))
    what = rng.randrange(6)
    if what == 0:
        del parent[key]
        return f"without {spelled}", json.dumps(value)
    if what == 1:
        parent[key] = [parent[key]]
        return f"{spelled} in a list", json.dumps(value)
    if what == 2:
        parent[key] = float("nan") if rng.random() < 0.5 else float("inf")
        return f"{spelled} not finite", json.dumps(value)
    parent[key] = rng.choice(WRONG)
    return f"{spelled} = {parent[key]!r}", json.dumps(value)
