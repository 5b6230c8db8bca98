"""The page that `jdm doctor` writes: what was found, what to do about it, and a sheet of pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from jdm.data.pictures import grid
from jdm.doctor.data import Findings, Picture
from jdm.evaluation import html

SIDE = 180  # pixels of a picture's longer side on the page


def page_of(found: Findings, title: str) -> str:
    """The whole page as HTML; it needs no other file."""
    what = html.listing([line.strip() for line in found.lines()]) or html.paragraph("Nothing to do.")
    figures = [html.picture(shown(picture), _caption(picture)) for picture in found.sheet]
    mapped = any(picture.drawn is not None for picture in found.sheet)
    sheet = [html.heading(f"{len(figures)} training pictures" + ", as training sees them" +
                          ", with their control maps below" * mapped), html.columns(*figures, narrow=True)]
    return html.page(title, html.table(["", *found.splits], found.rows), html.heading("What to do"), what,
                     *(sheet if figures else []))


def shown(picture: Picture) -> Image.Image:
    """A picture with its control map below it."""
    parts = [picture.image] if picture.drawn is None else [picture.image, picture.drawn]
    longer = max(picture.image.shape[-2:])
    return grid(_shrunk(torch.stack(parts), longer), 1, max(1, SIDE // longer), pad=0 if len(parts) == 1 else 2)


def _shrunk(images: Tensor, longer: int) -> Tensor:
    if longer <= SIDE:
        return images
    smaller = torch.nn.functional.interpolate(images.float(), scale_factor=SIDE / longer, mode="area")
    return smaller.round().clamp(0, 255).to(torch.uint8)


def _caption(picture: Picture) -> str:
    more = f" (and {len(picture.captions) - 1} more captions)" if len(picture.captions) > 1 else ""
    return f"{next(iter(picture.captions))}{more} \u2014 {Path(picture.name).name}"
