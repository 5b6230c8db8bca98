"""Rows of pictures for a run's previews: of a multi-step model, and of a student in training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from jdm.controls import Control
from jdm.data.sources import Pictures
from jdm.evaluation.preview import STEPS, Row
from jdm.evaluation.questions import Questions, at_once
from jdm.generator import starting_noise
from jdm.loading import Loaded
from jdm.methods.references import ddim
from jdm.models.family import Family
from jdm.score import ScoreModel
from jdm.size import Size, size_of
from jdm.space import Space, to_bytes

TEACHER, GUIDANCE = f"teacher, {STEPS} steps", 2.0  # guidance where a model's card says none


def guidance_of(model: Family) -> float:
    """The guidance of a multi-step model's card, or GUIDANCE."""
    return float((model.card or {}).get("guidance", GUIDANCE))


def many_steps(score: ScoreModel, space: Space, shape: Callable[[int, Size], tuple[int, ...]],
               device: str | torch.device, sees_control: Control | None = None) -> Row:
    """Returns a row that a multi-step model draws in STEPS deterministic steps.

    Args:
        shape: (number of pictures, their size) -> the shape of their noise.
        sees_control: the control whose map the model is given; None for a model without one.
    """
    def row(asked: Questions) -> Tensor:
        z = starting_noise(shape(len(asked), size_of(asked.images)), asked.seed)
        shown = None if sees_control is None or asked.c is None else sees_control.image(asked.c)
        pictures = []
        for rows in torch.arange(len(z)).split(at_once(asked.images)):
            part = None if shown is None else shown[rows].to(device)
            x = ddim(score, z[rows].to(device), [asked.y[int(i)] for i in rows], STEPS, control=part)
            pictures.append(to_bytes(space.decode(x)).cpu())
        return torch.cat(pictures)

    return row


def asked_pictures(loaded: Loaded) -> Pictures:
    """The validation pictures; the training pictures where there are fewer than two of them."""
    return loaded.held_out if len(loaded.held_out) > 1 else loaded.pictures
