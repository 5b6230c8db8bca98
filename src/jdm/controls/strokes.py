"""Strokes: what a hand draws. The lines of a picture, and for training the same lines as different hands draw them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from jdm.controls.base import Control
from jdm.controls.canny import edge_magnitude
from jdm.controls.filters import filtered, gaussian
from jdm.errors import UsageError
from jdm.schedule import precise

UNIT = 64  # lengths are in 64ths of the picture's shorter side


@dataclass(frozen=True)
class Hand:
    """How one drawing differs from the exact lines; lengths in 64ths of the shorter side.

    Attributes:
        smoothing: standard deviation of the blur before lines are found: more leaves fewer, simpler lines.
        contrast: factor of the thresholds: more leaves the strongest lines alone.
        width: width of the pen.
        wobble: largest displacement of a line.
        skipped: share of the lines that are left out; the longest never is.
        gaps: number of breaks.
    """

    smoothing: float
    contrast: float
    width: float
    wobble: float
    skipped: float
    gaps: int

    @classmethod
    def of(cls, rng: np.random.Generator) -> Hand:
        """A hand drawn at random."""
        return cls(rng.uniform(0.8, 2.2), rng.uniform(0.7, 2.0), rng.uniform(1, 4), rng.uniform(0, 2),
                   rng.uniform(0, 0.4), int(rng.integers(0, 5)))


@dataclass(frozen=True)
class Strokes(Control):
    """c = cv2.Canny of the blurred picture, its short lines left out, drawn with a pen; white on black.

    A hand's line is no Canny map: it is thick or thin, wobbles, breaks, and leaves things out. Training therefore
    shows the generator drawings by random hands (`drawn`), while consistency compares the exact lines, h.

    log p(c | images) = sum q log s + (1 - q) log(1 - s) + entropy of q, Bernoulli. s = sigmoid((|gx| + |gy| -
    threshold) / temperature) of the blurred picture, a soft line of two or three pixels; q is s of the picture that
    was drawn, or c itself where there is none. A hand's wobble is then noise in what the generator sees, not in what
    it is asked for.

    Attributes:
        low, high: hysteresis thresholds on |gx| + |gy| of 8-bit values, after the blur, for a side of 64 pixels; the
            same slope of a larger picture is less per pixel, and so are they.
        temperature: softness of the threshold, in the same units.
        smoothing: standard deviation of the blur, in 64ths of the shorter side.
        width: width of the pen, in 64ths of the shorter side.
        shortest: lines of fewer pixels than these 64ths of the shorter side are left out.
    """

    low: float = 120.0
    high: float = 240.0
    temperature: float = 60.0
    smoothing: float = 1.0
    width: float = 2.0
    shortest: float = 5.0

    name = "strokes"
    channels = 1
    by_hand = True

    def __post_init__(self):
        if not 0 <= self.low <= self.high:
            raise UsageError(f"strokes needs 0 <= low <= high, got low {self.low:g} and high {self.high:g}")
        for field in ("temperature", "smoothing", "width", "shortest"):
            if not 0 < getattr(self, field) < math.inf:
                raise UsageError(f"strokes' {field} must be above 0 and finite, got {getattr(self, field):g}")

    @torch.no_grad()
    def h(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> the exact lines, [B, 1, H, W] in [0, 1]."""
        exact = Hand(self.smoothing, 1.0, self.width, 0.0, 0.0, 0)
        return self._maps(images, [(exact, np.random.default_rng(0))] * len(images))

    @torch.no_grad()
    def drawn(self, images: Tensor, luck: Tensor) -> Tensor:
        """The lines of images [B, 3, H, W] as B random hands draw them; `luck` [B] in [0, 1) decides each."""
        rngs = [np.random.default_rng(int(number * 2**31)) for number in luck.double().tolist()]
        return self._maps(images, [(Hand.of(rng), rng) for rng in rngs])

    def log_prob(self, images: Tensor, c: Tensor, reference: Tensor | None = None) -> Tensor:
        """log p(c | images), summed over pixels: [B], nats, float32 or wider.

        Args:
            images: [B, 3, H, W], nominally in [0, 1].
            c: [B, 1, H, W] in [0, 1]; used where there is no reference.
            reference: [B, 3, H, W] in [0, 1], the picture that was drawn.
        """
        logits = self._logits(images)
        q = (c.to(logits).clamp(0, 1) if reference is None else self._logits(reference).sigmoid()).detach()
        entropy = torch.special.entr(q) + torch.special.entr(1 - q)
        agreement = q * functional.logsigmoid(logits) + (1 - q) * functional.logsigmoid(-logits)
        return (agreement + entropy).flatten(1).sum(1)

    def _logits(self, images: Tensor) -> Tensor:
        pixel = min(images.shape[-2:]) / UNIT
        images = precise(images)
        _, smooth = gaussian(self.smoothing * pixel, images)
        blurred = filtered(images.flatten(0, 1).unsqueeze(1), smooth, smooth).view_as(images)
        return (pixel * edge_magnitude(blurred) - (self.low + self.high) / 2) / self.temperature

    def _maps(self, images: Tensor, hands: list[tuple[Hand, np.random.Generator]]) -> Tensor:
        rgb = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        maps = [self._map(np.ascontiguousarray(picture), *hand) for picture, hand in zip(rgb, hands, strict=True)]
        return torch.from_numpy(np.stack(maps)).unsqueeze(1).to(images.device, images.dtype)

    def _map(self, picture: np.ndarray, hand: Hand, rng: np.random.Generator) -> np.ndarray:
        """One drawing [H, W] in [0, 1]."""
        pixel = min(picture.shape[:2]) / UNIT
        blurred = cv2.GaussianBlur(picture, (0, 0), hand.smoothing * pixel, borderType=cv2.BORDER_REPLICATE)
        edges = cv2.Canny(blurred, self.low * hand.contrast / pixel, self.high * hand.contrast / pixel)
        if not edges.any():  # nobody hands in an empty sheet of a picture with lines
            edges = cv2.Canny(blurred, self.low / 2 / pixel, self.high / 2 / pixel)
        lines = _kept(edges, self.shortest * pixel, hand.skipped, rng)
        _break(lines, hand.gaps, pixel, rng)
        # Thickness by distance from the line's middle, with a border one pixel soft.
        away = cv2.distanceTransform(255 - lines, cv2.DIST_L2, 5) if lines.any() else np.full(lines.shape, np.inf)
        stroke = np.clip(hand.width * pixel / 2 + 0.5 - away, 0, 1).astype(np.float32)
        return _wobbled(stroke, hand.wobble * pixel, rng)


def _kept(edges: np.ndarray, shortest: float, skipped: float, rng: np.random.Generator) -> np.ndarray:
    """The connected lines of at least `shortest` pixels, less a random share of them; the longest stays."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(edges, connectivity=8)
    pixels = stats[:, cv2.CC_STAT_AREA]
    keep = (pixels >= shortest) & (rng.random(count) >= skipped)
    if count > 1:
        keep[1 + int(pixels[1:].argmax())] = True
    keep[0] = False
    return np.where(keep[labels.astype(np.intp)], np.uint8(255), np.uint8(0))


def _break(lines: np.ndarray, gaps: int, pixel: float, rng: np.random.Generator) -> None:
    """Erases `gaps` discs of 1.5 to 4 64ths around random points of the lines, in place."""
    rows, columns = lines.nonzero()
    for _ in range(gaps if len(rows) else 0):
        at = int(rng.integers(len(rows)))
        cv2.circle(lines, (int(columns[at]), int(rows[at])), round(rng.uniform(1.5, 4) * pixel), 0, -1)


def _wobbled(stroke: np.ndarray, most: float, rng: np.random.Generator) -> np.ndarray:
    """The drawing moved by a smooth random field of at most `most` pixels; 4 x 4 numbers, enlarged."""
    if not most:
        return stroke
    height, width = stroke.shape
    field = rng.uniform(-most, most, (4, 4, 2)).astype(np.float32)
    moved = cv2.resize(field, (width, height), interpolation=cv2.INTER_LINEAR)
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    return cv2.remap(stroke, columns + moved[..., 0], rows + moved[..., 1], cv2.INTER_LINEAR)
