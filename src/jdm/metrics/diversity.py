"""Diversity: how far apart the pictures of one prompt and one control are when only z changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jdm.errors import UsageError


@dataclass(frozen=True)
class Diversity:
    """Mean pairwise feature distance over z; give it as a ratio to the multi-step ControlNet's.

    Attributes:
        mean: over groups, in the features' units.
        per_group: [groups].
    """

    mean: float
    per_group: Tensor


def diversity(features: Tensor) -> Diversity:
    """Mean |f_i - f_j| over the pairs i < j of each group.

    Args:
        features: [groups, k, D], one (y, c) a group, k >= 2 draws of z in each.
    """
    if features.ndim != 3 or features.shape[1] < 2 or features.shape[0] < 1:
        raise UsageError(f"features must be [groups, k >= 2, D], got {list(features.shape)}")
    # No matrix-multiply shortcut: it loses the small distances of a collapsed generator to rounding.
    distances = torch.cdist(features.float(), features.float(), compute_mode="donot_use_mm_for_euclid_dist")
    k = features.shape[1]
    per_group = distances.sum((1, 2)) / (k * (k - 1))
    return Diversity(float(per_group.mean()), per_group)
