"""HTML for a page that needs no other file: text, pictures, tables and curves, each as a string."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .7rem;border-bottom:1px solid #ccc;text-align:right}
td:first-child,th:first-child{text-align:left}img{image-rendering:pixelated;max-width:100%}
code,pre{background:#f4f4f4;padding:.15rem .3rem}pre{padding:.7rem;overflow-x:auto}.note{color:#555}"""


def page(title: str, *parts: str) -> str:
    """A complete HTML document with its title as the first heading, then the parts in order."""
    return (f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
            f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>{''.join(parts)}</html>\n")


def heading(text: str) -> str:
    """A heading below the page's title."""
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def code(text: str) -> str:
    """Lines of code or commands, in a box."""
    return f"<pre>{html.escape(text)}</pre>"


def picture(image: Image.Image, caption: str) -> str:
    """An image with its caption; the page contains it as a PNG in base64."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return (f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
            f"<figcaption class=note>{html.escape(caption)}</figcaption></figure>")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text cells: its column heads, then its rows."""
    cells = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{body}</table>"


def curve(name: str, points: Sequence[tuple[float, float]], width: int = 420, height: int = 140) -> str:
    """A line chart as SVG; its caption gives the first, last, smallest and largest y. Empty for fewer than 2 points.

    Args:
        points: (training step, value) pairs, in order of steps.
        width: of the drawing, in CSS pixels; so is `height`.
    """
    if len(points) < 2:
        return ""
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    low, high = min(ys), max(ys)
    span_x, span_y = (max(xs) - min(xs)) or 1, (high - low) or 1
    path = " ".join(f"{(x - min(xs)) / span_x * width:.1f},{height - (y - low) / span_y * height:.1f}"
                    for x, y in points)
    label = html.escape(f"{name}: {ys[0]:.4g} at step {xs[0]:g}, {ys[-1]:.4g} at step {xs[-1]:g} "
                        f"(from {low:.4g} to {high:.4g})")
    return (f'<figure><svg viewBox="-4 -4 {width + 8} {height + 8}" width="{width}" height="{height}">'
            f'<rect width="{width}" height="{height}" fill="none" stroke="#ccc"/>'
            f'<polyline points="{path}" fill="none" stroke="#36c" stroke-width="1.5"/></svg>'
            f"<figcaption class=note>{label}</figcaption></figure>")
