"""Classes of emoji, style by group, for a classifier that tells whether a picture is what its prompt asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jdm.data.emoji.captions import NAMED

STYLES = ("3d", "flat", "glossy", "noto", "blob", "twemoji")
# Unicode's groups, and the subgroups of each that emoji are in.
GROUPS = {
    "smileys & emotion": "face hand, face unwell, cat face, face concerned, face affection, face hat, face negative, "
    "face neutral skeptical, face sleepy, face smiling, emotion, face tongue, heart, face costume, face glasses, "
    "monkey face",
    "people & body": "person sport, person role, body parts, hand prop, person activity, person gesture, family, "
    "person, hand fingers closed, person fantasy, hands, hand single finger, person resting, hand fingers partial, "
    "hand fingers open, person symbol",
    "animals & nature": "animal bird, animal mammal, plant other, animal marine, plant flower, animal bug, "
    "animal reptile, animal amphibian",
    "food & drink": "food prepared, food vegetable, food asian, food fruit, food sweet, drink, dishware",
    "travel & places": "transport water, transport air, transport ground, place building, time, place geographic, "
    "place other, sky weather, place map, place religious, hotel",
    "activities": "sport, arts crafts, award medal, game, event",
    "objects": "medical, mail, clothing, tool, lock, office, book paper, household, other object, writing, science, "
    "music, musical instrument, money, sound, light video, computer, phone",
    "symbols": "alphanum, math, religion, warning, zodiac, other symbol, geometric, transport sign, punctuation, "
    "keycap, av symbol, arrow, gender, currency",
    "flags": "country flag, flag, subdivision flag",
}
CLASSES = len(STYLES) * len(GROUPS)
_GROUP_OF = {kind: number for number, kinds in enumerate(GROUPS.values()) for kind in kinds.split(", ")}


def classes_of(captions: Sequence[Sequence[str]]) -> Tensor | None:
    """Style times 9 plus group of each emoji [N], from its last two captions, which name its subgroup and its style.

    None where a caption names neither, such as for a subgroup that a later Unicode has.
    """
    found = []
    for row in captions:
        style = row[-1].removesuffix(" style")
        kind = row[-2].removesuffix(f", {row[-1]}") if len(row) > 1 else ""
        if style not in STYLES or kind not in _GROUP_OF:
            return None
        found.append(STYLES.index(style) * len(GROUPS) + _GROUP_OF[kind])
    return torch.tensor(found, dtype=torch.long)


def fully_named(captions: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    """The captions with both name and style of each emoji."""
    return tuple(tuple(row[: len(NAMED)]) for row in captions)
