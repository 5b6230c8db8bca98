"""Draws a figure: a row of pictures for each model, all of the same prompts, controls and noise, with its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from jdm.controls import checked, load_control
from jdm.data.pictures import grid
from jdm.data.sources import load_pictures
from jdm.evaluation.questions import Questions, answers
from jdm.evaluation.sampling import Sampler
from jdm.library import load_model
from jdm.reproduce.cells import ASKED, Cell, stored
from jdm.reproduce.models import finished
from jdm.reproduce.page import NAMES, number
from jdm.reproduce.results import Page
from jdm.reproduce.setups import Setup
from jdm.space import to_bytes

PICTURES, HEIGHT, LABEL, TEXT = 12, 64, 380, 15  # pictures in a row, and pixels: of a picture, a label, its letters


def figure(found: Sequence[Cell], setup: Setup, page: Page) -> Image.Image:
    """The pictures asked about, their controls, then a row for each cell; one without a model has its label alone."""
    model = load_model(setup.teacher)
    control = checked(load_control(found[0].control), model.size, likelihood=False) if found[0].control else None
    pictures = load_pictures(setup.source, setup.split, model.size)
    questions = Questions.of(pictures, control, min(PICTURES, len(pictures)), ASKED, setup.device)
    rows: list[tuple[str, Tensor | None]] = [("real pictures", to_bytes(questions.images * 2 - 1))]
    if control is not None and questions.c is not None:
        rows.append((f"their control: {found[0].control}", to_bytes(control.image(questions.c) * 2 - 1)))
    for cell in (c for c in found if c.seed == 0):
        result, record = page.result(cell.row.key, cell.column), stored(cell, setup)
        numbers = ", ".join(f"{NAMES[k]} {number(result.values, k)}" for k in page.measures if k in result.values)
        drawn = None
        if record and finished(cell.model):  # a known page has numbers and no model
            guidance = record.measured["guidance"]
            drawn_by = load_model(cell.model.path).to(setup.device)
            drawn = answers(Sampler(drawn_by, cell.row.steps, 1.0 if guidance is None else guidance), questions,
                            control)
        rows.append((f"{cell.row.title}\n{numbers or result.state}", drawn))
    return sheet(rows)


def sheet(rows: Sequence[tuple[str, Tensor | None]]) -> Image.Image:
    """Labels on the left, a row of uint8 pictures [N, 3, H, W] beside each; None leaves the row empty."""
    made = [None if p is None else grid(p, len(p), scale=max(1, HEIGHT // p.shape[-1])) for _, p in rows]
    height = max((strip.height for strip in made if strip), default=HEIGHT)
    width = max((strip.width for strip in made if strip), default=HEIGHT)
    whole = Image.new("RGB", (LABEL + width, len(rows) * height), "white")
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(TEXT)
    for place, ((label, _), strip) in enumerate(zip(rows, made, strict=True)):
        text = "\n".join(part for line in label.splitlines() for part in _wrapped(line, draw, font))
        draw.multiline_text((8, place * height + height // 2), text, "black", font, anchor="lm", spacing=2)
        if strip:
            whole.paste(strip, (LABEL, place * height))
    return whole


def _wrapped(line: str, draw: ImageDraw.ImageDraw, font: Any) -> list[str]:
    """The line in pieces that fit beside the pictures."""
    pieces = [""]
    for word in line.split():
        longer = f"{pieces[-1]} {word}".strip()
        if draw.textlength(longer, font) > LABEL - 16 and pieces[-1]:
            pieces.append(word)
        else:
            pieces[-1] = longer
    return pieces
