"""Diversity: how far apart pictures of one prompt and one control are when only z varies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jdm.errors import UsageError


@dataclass(frozen=True)
class Diversity:
    """Mean pairwise feature distance over z; report it as a ratio to the multi-step ControlNet's.

    Attributes:
        mean: mean over groups, in units of the features.
        per_group: [groups].
    """

    mean: float
    per_group: Tensor


def diversity(features: Tensor) -> Diversity:
    """Mean |f_i - f_j| over the pairs i < j of each group.

    Args:
        features: [groups, k, D]; a group has one (y, c) and k >= 2 draws of z.
    """
    if features.ndim != 3 or features.shape[1] < 2 or features.shape[0] < 1:
        raise UsageError(f"features must be [groups, k >= 2, D], got {list(features.shape)}")
    # Not by matrix multiplication: rounding would swamp the small distances of a collapsed generator.
    distances = torch.cdist(features.float(), features.float(), compute_mode="donot_use_mm_for_euclid_dist")
    k = features.shape[1]
    per_group = distances.sum((1, 2)) / (k * (k - 1))
    return Diversity(float(per_group.mean()), per_group)
