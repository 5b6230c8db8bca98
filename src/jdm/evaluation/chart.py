"""Line charts as SVG, with axes, ticks, units and a legend; a page needs no script to show them."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence

# Okabe and Ito's colours, told apart by most colour-blind readers; a second turn through them is dashed.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DRAWN, MARKED = 400, 40  # points of a line at most; as many as get a dot each at most
WIDE_RANGE = 300.0  # largest over smallest value from which an axis is logarithmic
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 460, 270, 64, 30, 44  # CSS pixels: the whole, and the margins around the plot

Points = Sequence[tuple[float, float]]


def chart(title: str, series: Mapping[str, Points], unit: str, across: str = "training step") -> str:
    """An SVG figure with a line for each series, its axes named; empty where no series has a finite point.

    The vertical axis is logarithmic where every value is above 0 and the largest is over 300 times the smallest. A line
    of more than 400 points is drawn through the smallest and largest of each stretch.

    Args:
        series: (x, y) pairs in order of x, by the name in the legend; one series has no legend.
        unit: name of the vertical axis, with its unit.
        across: name of the horizontal axis.
    """
    known = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    known = {name: points for name, points in known.items() if points}
    if not known:
        return ""
    ys = [y for points in known.values() for _, y in points]
    xs = [x for points in known.values() for x, _ in points]
    logarithmic = min(ys) > 0 and max(ys) > WIDE_RANGE * min(ys)
    legend = 16 * len(known) if len(known) > 1 else 0
    plot = _Plot(_Axis.of(xs, False, whole=True), _Axis.of(ys, logarithmic), HEIGHT + legend)
    lines = [plot.line(points, k) for k, points in enumerate(known.values())]
    keys = [plot.key(name, k) for k, name in enumerate(known)] if legend else []
    named = f"{unit}, log scale" if logarithmic else unit
    return (f'<figure><svg class=chart viewBox="0 0 {WIDTH} {HEIGHT + legend}" width="{WIDTH}" '
            f'height="{HEIGHT + legend}" role=img aria-label="{html.escape(title)}">'
            f'<text class=title x="{LEFT}" y="18">{html.escape(title)}</text>{plot.frame(across, named)}'
            f"{''.join(lines)}{''.join(keys)}</svg></figure>")


class _Axis:
    """Maps values to [0, 1], with ticks at round numbers."""

    def __init__(self, low: float, high: float, ticks: Sequence[float], scale: Callable[[float], float]):
        self.low, self.span, self.ticks, self._scale = scale(low), (scale(high) - scale(low)) or 1.0, ticks, scale

    def __call__(self, value: float) -> float:
        return (self._scale(value) - self.low) / self.span

    @classmethod
    def of(cls, values: Sequence[float], logarithmic: bool, whole: bool = False) -> _Axis:
        low, high = min(values), max(values)
        if logarithmic:
            low, high = low / 1.2, high * 1.2
            powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            ticks = [10.0**p for p in powers if low <= 10.0**p <= high]
            return cls(low, high, ticks[:: max(1, -(-len(ticks) // 6))], math.log10)
        around = abs(low) * 0.1 or 1.0
        low, high = (low - around, high + around) if low == high else (low, high)
        if not whole:  # room above and below
            low, high = low - 0.04 * (high - low), high + 0.04 * (high - low)
        ticks = _round_numbers(low, high)
        return cls(low, high, [t for t in ticks if not whole or t == round(t)], float)


class _Plot:
    """The plot's place in the drawing."""

    def __init__(self, x: _Axis, y: _Axis, height: int):
        self.x, self.y, self.height = x, y, height
        self.right, self.floor = WIDTH - 14, HEIGHT - BOTTOM

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Drawing coordinates of a point."""
        return LEFT + self.x(x) * (self.right - LEFT), self.floor - self.y(y) * (self.floor - TOP)

    def frame(self, across: str, up: str) -> str:
        """Axes, grid lines, ticks and the axes' names."""
        parts = [f'<rect x="{LEFT}" y="{TOP}" width="{self.right - LEFT}" height="{self.floor - TOP}" fill="none" '
                 'stroke="#999"/>']
        for value in self.x.ticks:
            x = LEFT + self.x(value) * (self.right - LEFT)
            parts.append(f'<path d="M{x:.1f} {TOP}V{self.floor + 4}" stroke="#e4e4e4"/>'
                         f'<text x="{x:.1f}" y="{self.floor + 16}" text-anchor="middle">{number(value)}</text>')
        for value in self.y.ticks:
            y = self.floor - self.y(value) * (self.floor - TOP)
            parts.append(f'<path d="M{LEFT - 4} {y:.1f}H{self.right}" stroke="#e4e4e4"/>'
                         f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
        middle = (TOP + self.floor) / 2
        parts.append(f'<text x="{(LEFT + self.right) / 2}" y="{self.floor + 34}" text-anchor="middle">'
                     f'{html.escape(across)}</text><text transform="translate(12 {middle}) rotate(-90)" '
                     f'text-anchor="middle">{html.escape(up)}</text>')
        return "".join(parts)

    def line(self, points: Points, k: int) -> str:
        """Line number k, with a dot on each point where there are few."""
        places = [self.at(*point) for point in _thinned(points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2" fill="{_colour(k)}"/>' for x, y in places) \
            if len(places) <= MARKED else ""
        return f'<polyline points="{path}" fill="none" stroke="{_colour(k)}"{_dashes(k)} stroke-width="1.6"/>{dots}'

    def key(self, name: str, k: int) -> str:
        """Line k's entry in the legend below the plot."""
        y = HEIGHT + 4 + 16 * k
        return (f'<path d="M{LEFT} {y}h22" stroke="{_colour(k)}"{_dashes(k)} stroke-width="2"/>'
                f'<text x="{LEFT + 28}" y="{y + 4}">{html.escape(name)}</text>')


def number(value: float) -> str:
    """A number for a reader: 20,000, 0.00125 or 3.2e-06."""
    if value == round(value) and abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _colour(k: int) -> str:
    return COLOURS[k % len(COLOURS)]


def _dashes(k: int) -> str:
    turn = k // len(COLOURS)
    return f' stroke-dasharray="{6 * turn} 3"' if turn else ""


def _round_numbers(low: float, high: float, about: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten in [low, high], about as many as asked."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    return [round(k * step, 12 - math.floor(math.log10(step))) for k in
            range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _thinned(points: Points) -> Points:
    """At most DRAWN points: of each stretch the one with the smallest and the one with the largest y, in order."""
    if len(points) <= DRAWN:
        return points
    stretch = -(-2 * len(points) // DRAWN)
    kept: list[tuple[float, float]] = []
    for first in range(0, len(points), stretch):
        part = points[first : first + stretch]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept
