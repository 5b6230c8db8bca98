"""HTML for a page that needs no other file: text, pictures and tables, each as a string; chart.py has curves."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .7rem;border-bottom:1px solid #ccc;text-align:right}
td:first-child,th:first-child{text-align:left}td{overflow-wrap:anywhere}.scroll{overflow-x:auto}
img{image-rendering:pixelated;max-width:100%}figure{margin:1rem 0}.note{color:#555}
code,pre{background:#f4f4f4;padding:.15rem .3rem}pre{padding:.7rem;overflow-x:auto}
.columns{display:flex;flex-wrap:wrap;gap:0 1.5rem}.columns figure{margin:.5rem 0}
.sheet figure{width:12rem}.sheet figcaption{overflow-wrap:anywhere;font-size:.85rem;line-height:1.3}
.chart{max-width:100%;height:auto;font:11px system-ui,sans-serif}.chart .title{font-weight:600;font-size:13px}
summary{cursor:pointer;font-weight:600;margin:1rem 0}"""
SIGNED = "<meta name=generator content=jdm>"  # by which this program knows its own pages


def page(title: str, *parts: str, reload: int = 0) -> str:
    """A complete HTML document with its title as the first heading, then the parts in order.

    Args:
        reload: seconds after which a browser reads the file again; 0 for never.
    """
    again = f'<meta http-equiv=refresh content="{reload}">' if reload else ""
    return (f"<!doctype html><html lang=en><meta charset=utf-8>{SIGNED}{again}"
            '<meta name=viewport content="width=device-width,initial-scale=1">'
            f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>"
            f"{''.join(parts)}</html>\n")


def is_ours(path: Path) -> bool:
    """True for a page that `page` made."""
    try:
        with path.open(encoding="utf-8") as file:
            return SIGNED in file.read(500)
    except (OSError, ValueError):
        return False


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
    """A table of text cells: its column heads, then its rows. It scrolls where it is wider than the window."""
    cells = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<div class=scroll><table><tr>{cells}</tr>{body}</table></div>"


def listing(items: Sequence[str]) -> str:
    """A list of lines of plain text; empty for none."""
    return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>" if items else ""


def folded(title: str, *parts: str) -> str:
    """Parts that are shown when their title is clicked."""
    return f"<details><summary>{html.escape(title)}</summary>{''.join(parts)}</details>"


def columns(*parts: str, narrow: bool = False) -> str:
    """Parts side by side, as many as the window has room for.

    Args:
        narrow: pictures of one width, with their captions broken to it.
    """
    return f"<div class=\"columns{' sheet' * narrow}\">{''.join(parts)}</div>"
