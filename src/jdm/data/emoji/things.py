"""Names, groups and things of the emoji, and the split of the things into training, validation and test."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

SKIN = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
DROPPED = SKIN | {"fe0f", "200d", "2640", "2642", "27a1"}  # skin tones, joiners, genders, the side that is faced
# One thing drawn as a woman, a man, or of another age; the key stands for all of them.
SAME = {"1f9d1": ("1f468", "1f469"), "1f9d2": ("1f466", "1f467"), "1f9d3": ("1f474", "1f475"),
        "1fac5": ("1f934", "1f478"), "1f483": ("1f57a",), "1f385": ("1f936",), "1f930": ("1fac3", "1fac4"),
        "1f46a": ("1f46b", "1f46c", "1f46d"), "1f470": ("1f935",), "1f332": ("1f384",)}
# The same for two people, of whom each may have a skin tone: the points left when the people are dropped.
TWO = {("1f430",): "1f46f", ("1faef",): "1f93c", ("1faf1", "1faf2"): "1f91d", ("2764",): "1f491",
       ("1f48b", "2764"): "1f48f"}
STANDS_FOR = {each: key for key, others in SAME.items() for each in others}
HAIR = {"1f9b0", "1f9b1", "1f9b2", "1f9b3"}
PEOPLE = {"1f9d1", "1f9d2", "1f46a", "1f91d"}
COLOURS = "red|orange|yellow|green|light blue|blue|purple|pink|brown|black|white|grey|large|small|medium-small|medium"
SERIES = {r"o.clock|-thirty": "clock", r"moon( face)?$": "moon", r"^keycap": "keycap", r" heart$|^heart ": "heart",
          r"(?<!bow and )arrows?\b": "arrow", r"(circle|square|diamond)$": "shape", r"\bbutton\b": "button"}
MOST = 120  # one thing in six styles, three genders and six skin tones has 108


@dataclass(frozen=True)
class Emoji:
    """One emoji.

    Attributes:
        code: its code points in hexadecimal, joined by "-", without variation selectors.
        name: CLDR's name in words.
        group: Unicode's group, such as "animals & nature".
        kind: Unicode's subgroup in words, such as "animal mammal".
        thing: the thing it shows, whatever its style, skin tone, gender, age, colour or direction.
    """

    code: str
    name: str
    group: str
    kind: str
    thing: str

    @property
    def has_skin_tone(self) -> bool:
        return not SKIN.isdisjoint(self.code.split("-"))


def normalised(code: str) -> str:
    """A code as `Emoji.code` spells it: "0031-FE0F-20E3" -> "31-20e3"."""
    points = [f"{int(part, 16):x}" for part in re.split("[-_]", code)]
    return "-".join(p for p in points if p != "fe0f")


def all_emoji(data: str, messages: str) -> dict[str, Emoji]:
    """Every emoji with a group, by code, from emojibase's data.json and messages.json."""
    said = json.loads(messages)
    groups = {g["order"]: g["message"] for g in said["groups"]}
    kinds = {g["order"]: g["key"].replace("-", " ") for g in said["subgroups"]}
    found: dict[str, Emoji] = {}
    for base in json.loads(data):
        if "group" not in base or groups[base["group"]] == "components":
            continue
        for each in (base, *base.get("skins", ())):
            code = normalised(each["hexcode"])
            found[code] = Emoji(code, _name(each["label"]), groups[base["group"]], kinds[base["subgroup"]],
                                _thing(code, base["label"], groups[base["group"]]))
    return found


def _name(label: str) -> str:
    label = label.replace("“", "").replace("”", "").replace("’", "'")
    return re.sub(r"^flag: ", "flag of ", label).replace(": ", ", ")


def _thing(code: str, label: str, group: str) -> str:
    """The thing of a base emoji (one without skin tone) of that label."""
    if group == "flags":
        return code
    for pattern, series in SERIES.items():
        if group != "people & body" and re.search(pattern, label):
            return series
    points = [STANDS_FOR.get(p, p) for p in code.split("-") if p not in DROPPED]
    if set(points) - HAIR <= PEOPLE:
        return "family" if len(points) > 1 and not set(points) & HAIR else "person"
    if group == "people & body":
        own = tuple(sorted(set(points) - {"1f9d1"}))
        return TWO.get(own) or "-".join(own)
    words = re.sub(rf"\b({COLOURS})\b ", "", label.lower())
    return re.sub(r" (face|cat)$", "", words) if group == "animals & nature" else words


def joined(things: Iterable[str], pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """thing -> the first, in the alphabet, of all that `pairs` join it with, directly or through others."""
    parent = {thing: thing for thing in things}

    def root(thing: str) -> str:
        while parent[thing] != thing:
            thing = parent[thing]
        return thing

    for a, b in pairs:
        first, second = sorted((root(a), root(b)))
        parent[second] = first
    return {thing: root(thing) for thing in parent}


def split_of(thing: str, pictures: int) -> str:
    """The split of a thing with that many pictures: by a hash, 1 of 20 things for validation, 2 for test.

    Things of more than MOST pictures (plain people, hearts, clocks) are for training: held out, one alone would fill
    its split.
    """
    number = int(hashlib.sha256(thing.encode()).hexdigest(), 16) % 20
    return "train" if pictures > MOST else {0: "validation", 1: "test", 2: "test"}.get(number, "train")
