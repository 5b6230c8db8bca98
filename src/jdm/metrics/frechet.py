"""The Frechet distance between Gaussians fitted to features, and the statistics it is computed from."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from jdm.errors import UsageError
from jdm.files import parsed

ABOUT: dict[str, Any] = {"n": int, "extractor": str, "extra": dict[str, str]}  # the types of a file's metadata


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of features, with their provenance.

    Attributes:
        mean: [D], float64.
        covariance: [D, D], float64, unbiased (divided by n - 1). Singular if n <= D.
        n: number of pictures.
        extractor: name of the extractor; a distance between different extractors is refused.
        extra: provenance as strings: prompts, steps, guidance, seed, hash of the pictures.
    """

    mean: Tensor
    covariance: Tensor
    n: int
    extractor: str
    extra: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, features: Tensor, extractor: str, extra: dict[str, str] | None = None) -> Statistics:
        """Computes the statistics of features [N, D], N >= 2."""
        if features.ndim != 2:
            raise UsageError(f"features must be [N, D], got {list(features.shape)}")
        if len(features) < 2:
            raise UsageError(f"a covariance needs at least 2 pictures, got {len(features)}")
        x = features.detach().cpu().double()
        if not x.isfinite().all():
            raise UsageError(f"features of {extractor} are not finite; check the pictures")
        mean = x.mean(0)
        covariance = (x - mean).T @ (x - mean) / (len(x) - 1)
        return cls(mean, covariance, len(x), extractor, dict(extra or {}))

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file: tensors in float32, everything else as JSON strings in its metadata."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"mean": self.mean.float(), "covariance": self.covariance.float().contiguous()}
        about = {"n": self.n, "extractor": self.extractor, "extra": self.extra}
        save_file(tensors, path, metadata={key: json.dumps(value) for key, value in about.items()})

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Reads a file written by `save`: float64 tensors with float32 precision."""
        if not Path(path).is_file():
            raise UsageError(f"no statistics at {path}; make them with Statistics.of(...).save(path)")
        try:
            with safe_open(path, framework="pt") as file:
                about = {key: parsed(value, f"{path}: {key}", ABOUT.get(key, Any), "delete that file and run again")
                         for key, value in (file.metadata() or {}).items()}
                mean, covariance = (file.get_tensor(name).double() for name in ("mean", "covariance"))
            return cls(mean, covariance, int(about["n"]), about["extractor"], about["extra"])
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise UsageError(f"{path} is not a statistics file: {error}") from error


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2): squared 2-Wasserstein of two Gaussians.

    Symmetric and at least 0. Estimated from samples it is biased upward, by about 1/n: compare only at equal n,
    and report the floor (the distance between two disjoint subsets of the reference) beside it.
    """
    if a.extractor != b.extractor:
        raise UsageError(f"statistics of different extractors, {a.extractor} and {b.extractor}; recompute one of them")
    if a.mean.shape != b.mean.shape:
        raise UsageError(f"statistics of {a.mean.numel()} and {b.mean.numel()} dimensions cannot be compared; "
                         "recompute one of them")
    for statistics in (a, b):
        if statistics.n < 2:
            raise UsageError(f"the Frechet distance needs n >= 2 on both sides, got {statistics.n}")
    mean_a, mean_b = a.mean.double(), b.mean.double()
    covariance_a, covariance_b = a.covariance.double(), b.covariance.double()
    root = _root(covariance_a)
    overlap = _root_trace(root @ covariance_b @ root)
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * overlap
    return max(0.0, float(distance))


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _root_trace(product: Tensor) -> Tensor:
    """tr(product^1/2) of a symmetric matrix; eigenvalues at rounding level count as 0."""
    values = torch.linalg.eigvalsh((product + product.T) / 2)
    threshold = values.abs().max() * len(values) * torch.finfo(values.dtype).eps
    return torch.where(values > threshold, values, 0.0).clamp(min=0).sqrt().sum()
