"""Pictures of a run in progress: the same prompts, controls and noise whenever they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor, nn

from jdm.controls import Control
from jdm.data.sources import Pictures
from jdm.evaluation.questions import Questions
from jdm.run import Shown
from jdm.space import to_bytes

COLUMNS, STEPS = 8, 25  # pictures of a row; steps of a multi-step model in a preview

Row = Callable[[Questions], Tensor]  # questions -> uint8 pictures [N, 3, H, W]


def preview(pictures: Pictures, control: Control | None, trained: Mapping[str, Row], others: Mapping[str, Row],
            device: str | torch.device) -> Callable[[dict[str, nn.Module]], Shown] | None:
    """Returns a function that draws the rows: the control's map, the trained row, then the others.

    The control's map and the others are drawn once. The global random state is as before afterwards, so that training
    goes on as if nothing had been drawn. None where there are fewer than two pictures to ask about.

    Args:
        pictures: the source of the prompts and controls; the first ones are asked.
        trained: the one row that training changes, by its name; called while the modules hold their averages.
        others: rows that training leaves alone, by name.
    """
    ((name, draw),) = trained.items()
    n = min(COLUMNS, len(pictures))
    if n < 2:
        return None

    @cache
    def questions() -> Questions:
        return Questions.of(pictures, control, n, 0, device)

    @cache
    def still() -> dict[str, Tensor]:
        return {title: row(questions()) for title, row in others.items()}

    def shown(_: dict[str, nn.Module]) -> Shown:
        devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
        # Eagerly: a compiled network that saw another batch size could compute training's steps in another way.
        with torch.random.fork_rng(devices), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            asked = questions()
            above = {} if control is None or asked.c is None else \
                {"control": to_bytes(control.image(asked.c) * 2 - 1)}
            return Shown(asked.y, {**above, name: draw(asked), **still()}, name)

    return shown
