"""Spaces: model space x, pixels in [-1, 1], and the unit range [0, 1] that measurements read."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from jdm.schedule import precise


class Space:
    """The VAE's latent space: x = scale (latent - shift); decode is differentiable.

    Args:
        vae: an AutoencoderKL, frozen; None where model space is pixel space. dtype: what it decodes in by autocast.
    """

    def __init__(self, vae: nn.Module | None = None, dtype: torch.dtype | None = None):
        self.vae, self.dtype = vae, dtype
        self.scale = float(vae.config.scaling_factor) if vae is not None else 1.0  # type: ignore[union-attr]
        self.shift = float(getattr(vae.config, "shift_factor", None) or 0.0) if vae is not None else 0.0  # type: ignore[union-attr]

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] -> x, the mean of the encoder's Gaussian."""
        if self.vae is None:
            return pixels
        return (self.vae.encode(pixels).latent_dist.mean.float() - self.shift) * self.scale  # type: ignore[operator]

    def decode(self, x: Tensor) -> Tensor:
        """x -> pixels, nominally in [-1, 1] and not clamped, so that gradients survive."""
        if self.vae is None:
            return x
        with nullcontext() if self.dtype is None else torch.autocast(x.device.type, self.dtype):
            latents = channels_last(x / self.scale + self.shift)
            return precise(self.vae.decode(latents).sample).contiguous()  # type: ignore[operator]


def channels_last(x: Tensor) -> Tensor:
    """x [B, C, H, W] in the memory layout in which a CPU's convolutions are fastest; unchanged on other devices.

    A network's other tensors follow. Weights keep their layout, and a network's output is made contiguous again.
    """
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


def unit(pixels: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1], not clamped."""
    return (pixels + 1) / 2


def to_bytes(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] -> uint8 in 0..255, clamped and rounded as diffusers' image processor does."""
    return (unit(pixels).clamp(0, 1) * 255).round().to(torch.uint8)


def from_bytes(images: Tensor) -> Tensor:
    """uint8 in 0..255 -> pixels in [-1, 1]."""
    return images.float() / 127.5 - 1
