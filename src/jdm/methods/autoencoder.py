"""The VAE of a latent diffusion model, trained from nothing (nano-sd's first stage)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jdm.data.noise import Noise
from jdm.data.sources import Pictures
from jdm.evaluation.preview import preview
from jdm.evaluation.questions import Questions
from jdm.loading import Loaded
from jdm.methods.previews import asked_pictures
from jdm.models import nano
from jdm.models.execution import DTYPES, computing
from jdm.models.family import placed
from jdm.models.nano import VAEConfig
from jdm.ranges import NotNegative, Positive
from jdm.run import Needs, Optimiser, Phase, Product, Run, Task
from jdm.size import size_of
from jdm.space import from_bytes, to_bytes


@dataclass(frozen=True)
class Autoencoder:
    """Reconstruction (squared and absolute error) plus a small KL to N(0, I).

    Attributes:
        network: the autoencoder's sizes.
        absolute: weight of the absolute error, which keeps edges.
        kl: weight of the KL per pixel value, in nats.
        optimiser: trains the autoencoder.
        clip: bound on the norm of its gradient.
    """

    network: VAEConfig = field(default_factory=VAEConfig)
    absolute: NotNegative = 0.1
    kl: NotNegative = 1e-3
    optimiser: Optimiser = field(default_factory=lambda: Optimiser(lr=2e-3, weight_decay=1e-4))
    clip: Positive = 1.0

    def needs(self, run: Run) -> Needs:
        return Needs()

    def product(self, loaded: Loaded) -> Product:
        def write(folder: Path, averages: dict[str, nn.Module]) -> None:
            average = averages["vae"]
            average.register_to_config(scaling_factor=1 / latent_std(average, loaded.pictures))  # type: ignore[operator]
            average.save_pretrained(folder)  # type: ignore[operator]

        return Product({"vae": placed(nano.vae(self.network, loaded.run.data.size), loaded.run.device)}, write)

    def task(self, loaded: Loaded) -> Task:
        run, batches, product = loaded.run, loaded.batches(), self.product(loaded)
        vae: Any = product.modules["vae"]

        def begin(step: int) -> tuple[Tensor, Tensor]:
            rows, images, _ = batches(step)
            pixels, shape = from_bytes(images).to(run.device), self.network.latent_shape(size_of(images))
            eps = Noise(run.seed, step, run.device).normal("latent", (len(rows), *shape))
            return pixels, eps

        def loss(state: tuple[Tensor, Tensor], _: int) -> tuple[Tensor, dict]:
            pixels, eps = state
            with computing(pixels.device, DTYPES[run.precision]):
                code = vae.encode(pixels).latent_dist
            code = type(code)(code.parameters.float())
            with computing(pixels.device, DTYPES[run.precision]):
                decoded = vae.decode(code.mean + code.std * eps).sample
            error = decoded.float() - pixels
            squared, kl = error.square().mean(), code.kl().mean() / pixels[0].numel()
            total = squared + self.absolute * error.abs().mean() + self.kl * kl
            return total, {"squared_error": squared.detach(), "kl": kl.detach()}

        def reconstructed(asked: Questions) -> Tensor:
            pixels = (asked.images * 2 - 1).to(run.device)
            return to_bytes(vae.decode(vae.encode(pixels).latent_dist.mean).sample).cpu()

        return Task([Phase("vae", [(list(vae.parameters()), self.optimiser)], loss, clip=self.clip)], begin,
                    dict(product.modules), product,
                    lambda averages: {"squared_error": reconstruction_error(averages["vae"], loaded.held_out)},
                    preview=preview(asked_pictures(loaded), None, {"reconstruction": reconstructed},
                                    {"picture": lambda asked: to_bytes(asked.images * 2 - 1)}, run.device))


@torch.no_grad()
def latent_std(vae: Any, pictures: Pictures, count: int = 2000) -> float:
    """Standard deviation of the latents of the first `count` pictures: SD's scaling factor is its inverse."""
    rows = torch.arange(min(count, len(pictures))).split(250)
    return torch.cat([vae.encode(from_bytes(pictures.sound(r)[1])).latent_dist.mean for r in rows]).std().item()


@torch.no_grad()
def reconstruction_error(vae: Any, pictures: Pictures, count: int = 1000) -> float:
    """Mean squared error of the round trip, pixels in [-1, 1]."""
    rows = torch.arange(min(count, len(pictures))).split(250)
    errors = []
    for r in rows:
        pixels = from_bytes(pictures.sound(r)[1])
        errors.append((vae.decode(vae.encode(pixels).latent_dist.mean).sample - pixels).square().mean())
    return torch.stack(errors).mean().item()
