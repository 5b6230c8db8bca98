"""Captions of an emoji: its name and style in varied words, now and then one of the two dropped."""

from __future__ import annotations

import re

from jdm.data.emoji.things import Emoji

NAMED = ("{name}, {style} style", "{style} style {name}", "{a} in {style} style", "a {style} emoji of {a}",
         "{name}, {style}", "{name}, {kind}, {style} style", "{a}, {style} style")
WITHOUT_STYLE = ("{name}", "{a}", "an emoji of {a}")
WITHOUT_NAME = ("{kind}, {style} style", "{style} style")
COUNTABLE = {"animals & nature", "food & drink", "travel & places", "objects", "activities", "people & body"}


def captions(emoji: Emoji, style: str) -> list[str]:
    """Seven captions with name and style, three without the style, two without the name."""
    words = {"name": emoji.name, "style": style, "kind": emoji.kind, "a": _with_article(emoji)}
    return [template.format(**words) for template in (*NAMED, *WITHOUT_STYLE, *WITHOUT_NAME)]


def _with_article(emoji: Emoji) -> str:
    """"a fox", "an owl"; the bare name if it is a plural, a proper name or nothing that is counted."""
    name = emoji.name
    first = name.split(",")[0]
    plural = re.search(r"(?<![su])s$|people|men|women", first) is not None
    if emoji.group not in COUNTABLE or plural or re.search(r"[A-Z\d]|^no ", name):
        return name
    return f"an {name}" if re.match(r"[aeio]|u(?!ni)", name) else f"a {name}"
