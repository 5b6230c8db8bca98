"""Charts: points lie where the axes say, and a reader can tell what each axis is."""

import math
import re

import pytest

from jdm.evaluation.chart import DRAWN, chart, number

SERIES = {"a": [(0.0, 1.0), (50.0, 3.0), (100.0, 2.0)]}


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def lines(svg: str) -> list[list[tuple[float, float]]]:
    """The drawing coordinates of each line's points."""
    return [[tuple(map(float, pair.split(","))) for pair in points.split()]
            for points in re.findall(r'<polyline points="([^"]*)"', svg)]


def tick(svg: str, label: str, axis: int) -> float:
    """Where a tick of that label is drawn: axis 0 is across, 1 is up."""
    anchor = ("middle", "end")[axis]
    found = re.search(rf'<text x="([\d.]+)" y="([\d.]+)" text-anchor="{anchor}">{label}</text>', svg)
    assert found, f"no tick {label}"
    return float(found[1 + axis]) - (4 if axis else 0)  # a label's baseline is 4 below its line


def test_axes_have_names_and_units():
    found = texts(chart("Loss <of> it", SERIES, "nats & more"))
    assert found[0] == "Loss &lt;of&gt; it"
    assert {"training step", "nats &amp; more", "0", "100", "2", "3"} <= set(found)


def test_points_lie_at_their_ticks():
    svg = chart("loss", SERIES, "nats")
    (line,) = lines(svg)
    for (x, y), (across, up) in zip(line, [("0", "1"), (None, "3"), ("100", "2")], strict=True):
        if across:
            assert x == pytest.approx(tick(svg, across, 0), abs=0.1)
        assert y == pytest.approx(tick(svg, up, 1), abs=0.1)


def test_a_wide_range_is_logarithmic():
    svg = chart("loss", {"a": [(0, 0.01), (1, 1.0), (2, 100.0)]}, "nats")
    assert "nats, log scale" in texts(svg)
    (line,) = lines(svg)
    assert line[1][1] == pytest.approx((line[0][1] + line[2][1]) / 2, abs=0.1)
    assert line[1][1] == pytest.approx(tick(svg, "1", 1), abs=0.1)
    assert "nats" in texts(chart("loss", {"a": [(0, 0.0), (1, 1000.0)]}, "nats")), "0 has no logarithm"


def test_several_lines_share_axes_and_have_a_legend():
    svg = chart("loss", {"one": [(0, 0.0), (10, 1.0)], "two": [(0, 2.0), (10, 2.0)]}, "nats")
    one, two = lines(svg)
    assert one[0][0] == two[0][0]
    assert one[1][1] > two[1][1]
    assert {"one", "two"} <= set(texts(svg))
    assert "a" not in texts(chart("loss", SERIES, "nats"))


def test_many_lines_are_told_apart():
    svg = chart("loss", {str(k): [(0, k), (1, k)] for k in range(16)}, "nats")
    looks = re.findall(r'fill="none" stroke="(#\w+)"( stroke-dasharray="[^"]*")?', svg.partition("<polyline")[2])
    assert len(set(looks)) == 16


def test_numbers_that_are_not_finite_are_left_out():
    assert chart("loss", {"a": [(0, math.nan), (1, math.inf)]}, "nats") == ""
    assert chart("loss", {"a": []}, "nats") == ""
    (line,) = lines(chart("loss", {"a": [(0, 1.0), (1, math.nan), (2, 2.0)]}, "nats"))
    assert len(line) == 2


def test_one_point_is_shown():
    svg = chart("loss", {"a": [(7, 0.25)]}, "nats")
    assert svg.count("<circle") == 1
    assert "0.25" in texts(svg)


def test_a_long_line_keeps_its_extremes():
    points = [(float(k), 1.0) for k in range(100_000)]
    points[41_234] = (41_234.0, 5.0)
    points[70_001] = (70_001.0, -5.0)
    svg = chart("loss", {"a": points}, "nats")
    (line,) = lines(svg)
    assert len(line) <= DRAWN + 2
    assert [x for x, _ in line] == sorted(x for x, _ in line)
    assert min(y for _, y in line) < tick(svg, "4", 1)
    assert max(y for _, y in line) > tick(svg, "-4", 1)


@pytest.mark.parametrize(("value", "text"), [(20000.0, "20,000"), (0.00125, "0.00125"), (-0.5, "-0.5"), (0.0, "0"),
                                             (1e-7, "1e-07"), (1234.5678, "1235")])
def test_numbers_are_short(value, text):
    assert number(value) == text
