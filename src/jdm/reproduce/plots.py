"""Plots of a page's numbers, drawn with Pillow: lines over training steps or alpha, bars over rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import floor, log10

from PIL import Image, ImageDraw, ImageFont

from jdm.reproduce.form import Plot
from jdm.reproduce.page import NAMES
from jdm.reproduce.results import Page, Value

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 360, 80, 230, 34, 46  # pixels; the legend is in the right margin
COLOURS = ("#3366cc", "#dc3912", "#109618", "#ff9900", "#990099", "#0099c6")
UNITS = {"fd": "distance (Frechet, no unit)", "std_x": "std(x) (latent units)"}
AXES = {"course": "training step", "alpha": "alpha (guidance, no unit)"}
Points = Sequence[tuple[float, Value]]


def plots(wanted: Sequence[Plot], page: Page) -> Image.Image | None:
    """The plots that have numbers, one below the other; None where none has."""
    drawn = [panel for plot in wanted if (panel := _panel(plot, page))]
    if not drawn:
        return None
    whole = Image.new("RGB", (WIDTH, HEIGHT * len(drawn)), "white")
    for place, panel in enumerate(drawn):
        whole.paste(panel, (0, place * HEIGHT))
    return whole


def series(plot: Plot, page: Page) -> dict[str, Points]:
    """The data of a plot: (x, value) of each line by its title; of bars, one point each at its place."""
    titles = {line.row: line.title for line in page.rows}
    column = next(iter(page.columns))
    found: dict[str, Points] = {}
    for place, row in enumerate(plot.rows):
        result = page.result(row, column)
        if plot.kind == "course":
            course = next((r.course for r in result.records if r.seed == 0), ())
            points = [(at["step"], Value(at[plot.key], at.get(f"{plot.key}_spread"))) for at in course
                      if plot.key in at]
            found |= {titles[row]: points} if points else {}
        elif plot.key in result.values:
            at, value = (plot.at[place] if plot.at else float(place)), result.values[plot.key]
            if plot.kind == "alpha":
                found.setdefault("hybrid", []).append((at, value))  # type: ignore[union-attr]
            else:
                found[titles[row]] = [(at, value)]
    return found


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from at most `low` to at least `high`, four to eight of them."""
    span = max(high - low, 1e-9)
    step = 10 ** floor(log10(span))
    step = next(s for s in (step / 5, step / 2, step, 2 * step) if span / s <= 6)
    first = floor(low / step)
    found = [step * first]
    while len(found) < 2 or found[-1] < high - 1e-9 * span:
        found.append(step * (first + len(found)))
    return found


def _panel(plot: Plot, page: Page) -> Image.Image | None:
    lines = series(plot, page)
    if not lines:
        return None
    bars = plot.kind == "bars"
    points = [p for line in lines.values() for p in line]
    edges = [v.mean + sign * (v.spread or 0) for _, v in points for sign in (-1, 1)]
    ys = ticks(min(0.0, *edges) if bars else min(edges), max(edges))
    xs = [-0.5, len(plot.rows) - 0.5] if bars else ticks(min(x for x, _ in points), max(x for x, _ in points))
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, right, bottom = ImageDraw.Draw(image), WIDTH - RIGHT, HEIGHT - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return (LEFT + (x - xs[0]) / (xs[-1] - xs[0] or 1) * (right - LEFT),
                bottom - (y - ys[0]) / (ys[-1] - ys[0]) * (bottom - TOP))

    _axes(draw, plot, [] if bars else xs, ys, at)
    for place, (title, line) in enumerate(lines.items()):
        colour = COLOURS[place % len(COLOURS)]
        if bars:
            x, value = line[0]
            (left, y), (until, zero) = at(x - 0.35, value.mean), at(x + 0.35, 0.0)
            draw.rectangle((left, min(y, zero), until, max(y, zero)), colour)
        else:
            draw.line([at(x, v.mean) for x, v in line], colour, 2)
        for x, value in line:
            if value.spread is not None:  # one error up and down
                draw.line([at(x, value.mean + sign * value.spread) for sign in (-1, 1)], "black", 1)
        draw.rectangle((right + 12, TOP + 20 * place + 4, right + 22, TOP + 20 * place + 14), colour)
        draw.text((right + 28, TOP + 20 * place), title, "black", ImageFont.load_default(12))
    return image


def _axes(draw: ImageDraw.ImageDraw, plot: Plot, xs: Sequence[float], ys: Sequence[float],
          at: Callable[[float, float], tuple[float, float]]) -> None:
    font, right, bottom = ImageFont.load_default(12), WIDTH - RIGHT, HEIGHT - BOTTOM
    title = f"{plot.title}; y: {UNITS.get(plot.key, NAMES[plot.key])}"
    draw.text((LEFT, 8), title, "black", ImageFont.load_default(13))
    for y in ys:
        height = at(0, y)[1]
        draw.line([(LEFT, height), (right, height)], "#dddddd")
        draw.text((LEFT - 6, height), f"{y:g}", "black", font, anchor="rm")
    for x in xs:
        draw.text((at(x, 0)[0], bottom + 6), f"{x:g}", "black", font, anchor="mt")
    draw.rectangle((LEFT, TOP, right, bottom), outline="#888888")
    draw.text(((LEFT + right) / 2, HEIGHT - 8), AXES.get(plot.kind, "bands of t, as in the legend"), "black", font,
              anchor="mb")
