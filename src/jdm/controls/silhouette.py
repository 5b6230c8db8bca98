"""Silhouettes: the foreground of pictures on a dark background, such as Fashion-MNIST."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from jdm.controls.base import Control
from jdm.controls.filters import filtered, gaussian
from jdm.errors import UsageError
from jdm.schedule import precise


@dataclass(frozen=True)
class Silhouette(Control):
    """c = s(images) = sigmoid((b - threshold) / temperature), b the mean of R, G and B, lightly smoothed.

    log p(c | images) = sum c log s + (1 - c) log(1 - s) + entropy of c (Bernoulli), which is -KL(c || s), 0
    where both masks agree. The derivative by the logit is c - s; a Gaussian's has the factor s (1 - s), which
    is 0 to machine precision at a bright pixel that should be black.

    Attributes:
        threshold: brightness of the mask's border, in [0, 1]; black is drawn as sigmoid(-threshold / temperature).
        temperature: softness of the threshold, in units of brightness.
        smoothing: standard deviation of the Gaussian, in pixels; it closes pinholes and widens the border.
    """

    threshold: float = 0.1
    temperature: float = 0.02
    smoothing: float = 0.7

    name = "silhouette"
    channels = 1

    def __post_init__(self):
        if not 0 < self.threshold < 1:
            raise UsageError(f"silhouette's threshold must be in (0, 1), got {self.threshold:g}")
        for field in ("temperature", "smoothing"):
            if not 0 < getattr(self, field) < math.inf:
                raise UsageError(f"silhouette's {field} must be above 0 and finite, got {getattr(self, field):g}")

    def h(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> c [B, 1, H, W] in [0, 1], float32 or wider, differentiable."""
        return torch.sigmoid(self._logits(images))

    def log_prob(self, images: Tensor, c: Tensor, reference: Tensor | None = None) -> Tensor:
        """log p(c | images), summed over pixels: [B], nats. c: [B, 1, H, W] in [0, 1], soft or hard."""
        logits = self._logits(images)
        c = c.to(logits).detach().clamp(0, 1)
        entropy = torch.special.entr(c) + torch.special.entr(1 - c)
        agreement = c * functional.logsigmoid(logits) + (1 - c) * functional.logsigmoid(-logits)
        return (agreement + entropy).flatten(1).sum(1)

    def _logits(self, images: Tensor) -> Tensor:
        brightness = precise(images).mean(1, keepdim=True)
        _, smooth = gaussian(self.smoothing, brightness)
        return (filtered(brightness, smooth, smooth) - self.threshold) / self.temperature
