"""Draws an emoji on white at a small size, as it is and moved about. Imports no PyTorch: it runs in other processes."""

from __future__ import annotations

import io
import json
import math
import random
import re
from collections.abc import Mapping
from typing import Any

from PIL import Image

from jdm.data.emoji.things import Emoji, normalised
from jdm.errors import UsageError

OVERSAMPLED = 2  # drawn larger by this, then averaged
SMALLEST, TURN = 0.72, 8.0  # of moved drawings: the scale, and degrees to either side
MIRRORED = {"animals & nature", "food & drink", "people & body"}  # elsewhere are letters, digits, clocks and arrows
FACES = ("face ", "cat face", "monkey face")
THUMBNAIL = 16


def may_be_mirrored(emoji: Emoji) -> bool:
    """Whether its name fits its mirror image too."""
    return ((emoji.group in MIRRORED or emoji.kind.startswith(FACES))
            and re.search(r"\b(left|right|leftwards|rightwards|globe)\b", emoji.name) is None)


def vectors(files: Mapping[str, bytes], names: Mapping[str, str]) -> dict[str, str]:
    """code -> SVG of an Iconify set.

    Args:
        files: its icons.json and chars.json.
        names: code by icon name, for icons that its chars.json leaves out.
    """
    icons = json.loads(files["icons.json"])
    codes = {**names, **{name: normalised(code) for code, name in json.loads(files["chars.json"]).items()}}
    found: dict[str, str] = {}
    for name in (*icons["icons"], *icons.get("aliases", {})):
        if name in codes and (svg := _svg(icons, name)):
            found.setdefault(codes[name], svg)
    return found


def _svg(icons: dict[str, Any], name: str) -> str:
    """An icon as a document; an alias is its parent, which may be mirrored or turned."""
    move = ""
    width, height = icons.get("width", 16), icons.get("height", 16)
    while name not in icons["icons"]:
        alias = icons["aliases"][name]
        if alias.get("vFlip"):
            move += f"translate(0 {height}) scale(1 -1) "
        if alias.get("hFlip"):
            move += f"translate({width} 0) scale(-1 1) "
        if alias.get("rotate"):
            move += f"rotate({90 * alias['rotate']} {width / 2} {height / 2}) "
        name = alias["parent"]
    icon = icons["icons"][name]
    width, height = icon.get("width", width), icon.get("height", height)
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    return (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}">'
            f'<g transform="{move}">{icon["body"]}</g></svg>')


def drawings(emoji: Emoji, style: str, source: str | bytes, size: int, count: int) -> tuple[list[bytes], bytes]:
    """`count` lossless WebP pictures, the first as it is and the others moved; and a thumbnail's RGB bytes.

    Args:
        source: an SVG document, or a picture file.
    """
    large = _opened(source, size * OVERSAMPLED)
    chance = random.Random(f"{style} {emoji.code}")
    made = [large, *(_moved(large, chance, may_be_mirrored(emoji)) for _ in range(count - 1))]
    small = [each.reduce(OVERSAMPLED) for each in made]
    return [_encoded(each) for each in small], small[0].resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX).tobytes()


def _opened(source: str | bytes, side: int) -> Image.Image:
    if isinstance(source, str):
        try:
            import resvg_py
        except ImportError:
            raise UsageError("drawing emoji needs the package resvg-py; install it with: pip install 'jdm[emoji]'"
                             ) from None
        source = bytes(resvg_py.svg_to_bytes(svg_string=source, width=side, height=side, skip_system_fonts=True))
    image = Image.open(io.BytesIO(source)).convert("RGBA")
    white = Image.new("RGBA", (max(image.size), max(image.size)), "white")
    white.alpha_composite(image, ((white.width - image.width) // 2, (white.height - image.height) // 2))
    return white.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)


def _moved(image: Image.Image, chance: random.Random, mirrored: bool) -> Image.Image:
    """The picture mirrored half of the time where that is allowed, made smaller, turned a little and shifted."""
    if mirrored and chance.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale, angle = chance.uniform(SMALLEST, 1.0), math.radians(chance.uniform(-TURN, TURN))
    room, centre = (1 - scale) / 2 * image.width, image.width / 2
    x, y = (centre + chance.uniform(-room, room) for _ in range(2))
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    matrix = (cos, sin, centre - cos * x - sin * y, -sin, cos, centre + sin * x - cos * y)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor="white")


def _encoded(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "WEBP", lossless=True, quality=20, method=1)  # an eighth of the default's time, 15% more bytes
    return out.getvalue()
