"""What a control is: a measurement h of a picture, and how likely a control is given a picture."""

from __future__ import annotations

import torch
from torch import Tensor


class Control:
    """c = h(images): subclass, give `h`, and JDM can train it; `my_controls.py:Posterize` names it.

    `h` is what the generator sees and what consistency compares. Where it has a useful gradient the default
    `log_prob` suffices; where it has none (hard edges, thresholds), override `log_prob` with a surrogate.

    Attributes:
        name: one word for tables and file names.
        channels: of c; one channel is shown to the ControlNet as three equal ones.
        temperature: standard deviation of the Gaussian likelihood, in units of c.
    """

    name: str = "control"
    channels: int = 1
    temperature: float = 0.1

    def h(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> c [B, channels, H, W] in [0, 1]."""
        raise TypeError(f"{type(self).__name__} must define h(images)")

    def log_prob(self, images: Tensor, c: Tensor, reference: Tensor | None = None) -> Tensor:
        """log p(c | images) up to a constant: [B], nats, differentiable in images.

        Args:
            images: [B, 3, H, W], nominally in [0, 1] (a decoder may overshoot).
            c: [B, channels, H, W], the control the generator was given.
            reference: the picture c came from, where there is one; [B, 3, H, W] in [0, 1].
        """
        error = (self.h(images) - c).square().flatten(1).mean(1)
        return -error / (2 * self.temperature**2)

    def image(self, c: Tensor) -> Tensor:
        """c as the ControlNet takes it: [B, 3, H, W] in [0, 1]."""
        return c.expand(-1, 3, -1, -1) if c.shape[1] == 1 else c


def _probe(control: Control, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, size, size, generator=generator)
