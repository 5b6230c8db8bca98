"""Canny edges: cv2.Canny is the measurement, a differentiable soft edge map gives the likelihood."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import cv2
import torch
from torch import Tensor
from torch.nn import functional

from jdm.controls.base import Control
from jdm.controls.filters import luma
from jdm.errors import UsageError
from jdm.schedule import precise


@dataclass(frozen=True)
class Canny(Control):
    """c = cv2.Canny(rgb, low, high) / 255; log p(c | images) = sum q log s + (1 - q) log(1 - s), Bernoulli.

    The soft edges are s = sigmoid((|gx| + |gy| - (low + high) / 2) / temperature), where (gx, gy) is the Sobel
    gradient that cv2.Canny thresholds, in the same units: at each pixel that of the channel where |gx| + |gy| is
    largest. The derivative by the logit is q - s, which vanishes neither at a missing edge nor at a spurious one,
    however strong. The entropy of q is added, so that `reference` is -KL(q || s), 0 where both maps agree.

    The picture is given to OpenCV in colour, as ControlNet's annotators and diffusers' examples do.

    Attributes:
        low, high: hysteresis thresholds on |gx| + |gy| of 8-bit values.
        grey: take the edges of the picture's luma, as `canny-grey` does; of a grey picture both are the same.
        likelihood: the target q.
            `reference`: the soft edges of the picture c was measured on, pixel by pixel.
            `blurred`: c itself, blurred and multiplied by `width`, for control maps that come without a
            picture; log s then uses the blurred s. In photographs a shift by one pixel costs a sixth of a
            missing edge; a lone step from black to white costs nothing one way and twice a missing edge the other.
            `auto`: `reference` if a reference is given, else `blurred`.
        temperature: softness of the threshold, in the units of low and high; lower is closer to the hard
            map and has a gradient at fewer pixels.
        blur: standard deviation, in pixels, of the Gaussian that `blurred` uses.
        width: width in pixels of the soft edge that `blurred` targets for a one-pixel line of c. Soft edges
            of photographs measure 2; at 1.5 gradient ascent draws hard edges nearer to c. Blur 1 and
            width 2.5 tolerate larger shifts and draw less exactly.
    """

    low: float = 100.0
    high: float = 200.0
    likelihood: Literal["auto", "reference", "blurred"] = "auto"
    temperature: float = 40.0
    blur: float = 0.7
    width: float = 1.5
    grey: bool = False

    # Without annotations, so that they are class attributes and not dataclass fields.
    name = "canny"
    channels = 1

    def __post_init__(self):
        if not 0 <= self.low <= self.high:
            raise UsageError(f"canny needs 0 <= low <= high, got low {self.low:g} and high {self.high:g}")
        if self.likelihood not in ("auto", "reference", "blurred"):
            raise UsageError("canny's likelihood must be auto, reference or blurred, "
                             f"got {self.likelihood!r}")
        for field in ("temperature", "blur", "width"):
            if not 0 < getattr(self, field) < math.inf:
                raise UsageError(f"canny's {field} must be above 0 and finite, got {getattr(self, field):g}")

    @property
    def preprocessor(self) -> dict:
        return {"function": "cv2.Canny", "picture": "grey, 8 bits" if self.grey else "RGB, 8 bits",
                "low_threshold": self.low, "high_threshold": self.high}

    @torch.no_grad()
    def h(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], clamped and rounded to 8 bits -> c [B, 1, H, W] in {0, 1}."""
        rgb = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
        pictures = rgb.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        if self.grey:
            pictures = [cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in pictures]
        edges = [torch.from_numpy(cv2.Canny(picture, self.low, self.high)) for picture in pictures]
        return torch.stack(edges).unsqueeze(1).to(images.device).to(images.dtype) / 255

    def log_prob(self, images: Tensor, c: Tensor, reference: Tensor | None = None) -> Tensor:
        """log p(c | images), summed over pixels: [B], nats, float32 (float64 for float64 images).

        Args:
            images: [B, 3, H, W], nominally in [0, 1]; not clamped, so that an overshoot keeps its gradient.
            c: [B, 1, H, W] in {0, 1}; used by `blurred` only.
            reference: [B, 3, H, W] in [0, 1], or None; used by `reference` only, without a gradient.
        """
        logits = self._logits(images)
        if self.likelihood == "reference" and reference is None:
            raise UsageError("canny's likelihood 'reference' needs the pictures c came from, got only c; "
                             "choose 'auto' or 'blurred' to train from control maps alone")
        if self.likelihood == "blurred" or reference is None:
            # Above the threshold 1 - s falls as 1 / (2 + logit), not as exp(-logit). Otherwise the cost of the
            # second pixel of a strong true edge grows with the edge's strength and washes it out.
            logits = torch.where(logits > 0, logits.clamp(min=0).log1p(), logits)
            target = (self.width * _log_blurred(c.to(logits).log(), self.blur).exp()).clamp(max=1)
            # Any soft edge near an edge of c may match it. 1 - s is not blurred: averaged with its neighbours,
            # the small 1 - s of a strong spurious edge would have almost no gradient.
            log_edge = _log_blurred(functional.logsigmoid(logits), self.blur)
        else:
            target = self.soft_edges(reference).to(logits)
            log_edge = functional.logsigmoid(logits)
        target, log_none = target.detach(), functional.logsigmoid(-logits)
        entropy = torch.special.entr(target) + torch.special.entr(1 - target)
        return (target * log_edge + (1 - target) * log_none + entropy).flatten(1).sum(1)

    def soft_edges(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> soft edge map [B, 1, H, W] in (0, 1), differentiable."""
        return torch.sigmoid(self._logits(images))

    def _logits(self, images: Tensor) -> Tensor:
        seen = luma(precise(images)) if self.grey else images
        return (edge_magnitude(seen) - (self.low + self.high) / 2) / self.temperature


@dataclass(frozen=True)
class GreyCanny(Canny):
    """Canny edges of the picture's luma: what models trained by version 0.1 on colour pictures were shown."""

    grey: bool = True

    name = "canny-grey"


def edge_magnitude(images: Tensor) -> Tensor:
    """|gx| + |gy|, 3x3 Sobel of values in 0..255 with replicated borders: the value that cv2.Canny thresholds.

    Images [B, C, H, W] in [0, 1] -> [B, 1, H, W], float32 or wider: at each pixel the largest of the channels, as
    OpenCV takes it. Channels that are equal there share the gradient. Not rounded to 8 bits, so it is differentiable
    except where gx or gy is exactly 0.
    """
    values = 255 * precise(images)
    gx = values.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    kernels = torch.stack([gx, gx.T]).unsqueeze(1)
    padded = functional.pad(values, (1, 1, 1, 1), mode="replicate").flatten(0, 1).unsqueeze(1)
    sums = functional.conv2d(padded, kernels).abs().sum(1)
    return sums.unflatten(0, images.shape[:2]).amax(1, keepdim=True)


def _log_blurred(logs: Tensor, std: float) -> Tensor:
    """Logarithm of the Gaussian blur of exp(logs), [B, 1, H, W], borders replicated; no underflow."""
    radius = math.ceil(3 * std)
    x = torch.arange(-radius, radius + 1, device=logs.device, dtype=logs.dtype)
    kernel = torch.log_softmax(-(x**2) / (2 * std**2), dim=0)
    logs = functional.pad(logs, (radius,) * 4, mode="replicate")
    for dim in (2, 3):
        logs = torch.logsumexp(logs.unfold(dim, len(x), 1) + kernel, dim=-1)
    return logs
