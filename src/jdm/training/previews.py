"""A run's previews as files in OUT/previews: step-0000500.png and its like, and film.png of how they changed."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional

from jdm.data.pictures import grid, is_ours, save_picture
from jdm.errors import RunError, UsageError
from jdm.files import parsed
from jdm.run import Run, Task
from jdm.training import distributed

FOLDER, FILM = "previews", "film.png"
MARGIN, SMALLEST, LARGEST = 120, 96, 256  # pixels: of the rows' names, and bounds on the shorter side of a picture
FRAMES = 12  # of a film at most


def refuse_unseen(run: Run, task: Task) -> None:
    """UsageError where previews are asked of a run that draws no pictures."""
    if run.preview_every and task.preview is None:
        raise UsageError("this run draws no pictures, or its data has fewer than two to ask about; leave out "
                         "--preview-every")


class Previews:
    """Draws a run's previews; previews of steps after the one it goes on from are deleted."""

    def __init__(self, run: Run, task: Task, start: int):
        self.run, self.task = run, task
        if distributed.first():
            for step, file in kept(run.out).items():
                if step > start:
                    file.unlink()

    def draw(self, done: int, averages: dict[str, nn.Module]) -> Image.Image | None:
        """Draws the preview after `done` steps, in every process, and writes it in the first.

        Returns the sheet; None where nothing was written, because a picture is not finite or another process writes.

        Raises:
            RunError: the disk cannot be written.
        """
        assert self.task.preview is not None
        try:
            shown = self.task.preview(averages)
        except RunError as error:  # what training itself makes of it, its own checks say
            if distributed.first():
                print(f"warning: step {done}: no preview ({error})", file=sys.stderr, flush=True)
            return None
        if not distributed.first():
            return None
        drawn = sheet(shown.rows)
        said = About(list(shown.rows), list(shown.prompts), shown.trained)
        folder = self.run.out / FOLDER
        save_picture(drawn, folder / f"step-{done:07}.png", {"jdm": json.dumps(vars(said))})
        if strip := film(self.run.out):
            save_picture(strip, folder / FILM)
        return drawn


@dataclass(frozen=True)
class About:
    """A preview file's own description: the names of its rows, its columns' prompts, and the row that changes."""

    rows: list[str]
    prompts: list[str]
    trained: str


def about(file: Path) -> About | None:
    """Reads a preview's description; None if the file is damaged or was not written by a run."""
    if not is_ours(file):
        return None
    try:
        with Image.open(file) as image:
            image.load()
            found = parsed(str(image.info.get("jdm", "")), str(file), About, "delete it")
    except (OSError, SyntaxError, ValueError, UsageError):
        return None
    return found if found.trained in found.rows else None


def kept(out: Path) -> dict[int, Path]:
    """The previews in a run's folder by step, in order."""
    found = {int(match[1]): file for file in (out / FOLDER).glob("step-*.png")
             if (match := re.fullmatch(r"step-(\d{7,15})\.png", file.name))}
    return dict(sorted(found.items()))


def film(out: Path) -> Image.Image | None:
    """The trained row of at most FRAMES previews in a run's folder, between the rows that stay the same.

    None where there are no two previews of the same questions as the last.
    """
    previews = {step: (file, said) for step, file in kept(out).items() if (said := about(file))}
    if len(previews) < 2:
        return None
    _, latest = list(previews.values())[-1]
    previews = {step: file for step, (file, said) in previews.items() if said == latest}
    steps = list(previews)
    if len(steps) < 2:
        return None
    n = min(FRAMES, len(steps))
    chosen = [steps[round(k * (len(steps) - 1) / (n - 1))] for k in range(n)]
    strips = {step: _strips(previews[step], latest) for step in chosen}
    last, place = strips[chosen[-1]], latest.rows.index(latest.trained)
    rows = {name: last[k] for k, name in enumerate(latest.rows) if k < place}
    rows |= {f"step {step}": strips[step][place] for step in chosen}
    rows |= {name: last[k] for k, name in enumerate(latest.rows) if k > place}
    return _stacked(rows)


def sheet(rows: Mapping[str, Tensor]) -> Image.Image:
    """Rows of uint8 pictures [N, 3, H, W] of one size under each other, their names at the left.

    Small pictures are drawn larger, large ones smaller.
    """
    return _stacked({name: _strip(images) for name, images in rows.items()})


def _strip(images: Tensor) -> Image.Image:
    side = min(images.shape[-2:])
    if side > LARGEST:
        size = [round(n * LARGEST / side) for n in images.shape[-2:]]
        smaller = functional.interpolate(images.float(), size, mode="bilinear", antialias=True)
        images = smaller.round().clamp(0, 255).to(torch.uint8)
    return grid(images, len(images), max(1, -(-SMALLEST // side)))


def _stacked(strips: Mapping[str, Image.Image]) -> Image.Image:
    """Strips of equal size under each other, with room for their names at the left."""
    width, height = next(iter(strips.values())).size
    whole = Image.new("RGB", (MARGIN + width, height * len(strips)), "white")
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(13)
    for k, (name, strip) in enumerate(strips.items()):
        whole.paste(strip, (MARGIN, k * height))
        pen.multiline_text((MARGIN - 8, k * height + height // 2), name.replace(", ", ",\n"), "black", font, "rm",
                           align="right")
    return whole


def _strips(file: Path, said: About) -> Sequence[Image.Image]:
    """The rows of a preview without their names."""
    with Image.open(file) as image:
        width, height = image.width, image.height // len(said.rows)
        return [image.crop((MARGIN, k * height, width, (k + 1) * height)) for k in range(len(said.rows))]
