"""A text-to-image diffusion model trained from nothing by denoising (nano-sd's second stage)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from jdm.data.noise import Noise, rows_at
from jdm.data.sources import Pictures
from jdm.evaluation.preview import STEPS, preview
from jdm.loading import Loaded
from jdm.methods.previews import GUIDANCE, asked_pictures, many_steps
from jdm.models import nano
from jdm.models.execution import DTYPES, computing
from jdm.models.family import Family, placed
from jdm.models.folder import save_pipeline
from jdm.models.nano import TeacherConfig, VAEConfig
from jdm.models.nano_flow import FlowConfig
from jdm.ranges import Positive, Share
from jdm.run import Needs, Optimiser, Phase, Product, Run, Task
from jdm.score import ScoreModel, Text
from jdm.space import from_bytes


@dataclass(frozen=True)
class Batch:
    """Clean latents, prompts with dropout, and the noise of one step."""

    x: Tensor
    y: list[str]
    t: Tensor
    eps: Tensor


@dataclass(frozen=True)
class Denoising:
    """E || eps_phi(x_t, t, y) - eps ||^2 over uniform t: backbone and text encoders together (JDM Sec. 2).

    A flow-matching transformer predicts the velocity eps - x in place of eps.

    Attributes:
        vae: folder of the trained autoencoder, or "emoji-vae", which is in the package.
        network: the trained network and its sizes: a UNet, or a transformer of SD3's format.
        dropout: share of prompts replaced by "", which classifier-free guidance needs; in [0, 1].
        optimiser: how both networks move.
        clip: bound on the norm of their gradient.
    """

    vae: str = "runs/nano-vae/model"
    network: TeacherConfig | FlowConfig = field(default_factory=TeacherConfig)
    dropout: Share = 0.1
    optimiser: Optimiser = field(default_factory=lambda: Optimiser(lr=1e-3, warmup=300))
    clip: Positive = 1.0

    def needs(self, run: Run) -> Needs:
        return Needs(latents=True, autoencoder=self.vae)

    def product(self, loaded: Loaded) -> Product:
        run, pictures = loaded.run, loaded.pictures
        vae: Any = loaded.space.vae
        tokenizer = self._tokenizer(pictures)
        latents = VAEConfig(vae.config.latent_channels, tuple(vae.config.block_out_channels))
        made = self.network.networks(latents.latent_shape(run.data.size), tokenizer)

        def write(folder: Path, averages: dict[str, nn.Module]) -> None:
            save_pipeline(self.network.model(averages, vae, tokenizer).at(run.data.size), folder)

        return Product({name: placed(network, run.device) for name, network in made.items()}, write)

    def _tokenizer(self, pictures: Pictures) -> CLIPTokenizer:
        captions = (caption for row in pictures.captions for caption in row)
        return nano.tokenizer(captions, self.network.tokens, self.network.merges)

    def task(self, loaded: Loaded) -> Task:
        run, pictures, held_out = loaded.run, loaded.pictures, loaded.held_out
        space, latents, product = loaded.space, loaded.latents(), self.product(loaded)
        tokenizer, vae = self._tokenizer(pictures), cast(Any, space.vae)

        def score_of(networks: dict[str, nn.Module]) -> ScoreModel:
            model: Family = self.network.model(networks, vae, tokenizer)
            encode = model.text().batch

            def text(prompts: Sequence[str]) -> Text:
                with computing(torch.device(run.device), DTYPES[run.precision]):
                    return encode(prompts)

            return ScoreModel(model.denoiser(), model.schedule, model.prediction, text)

        score = score_of(product.modules)

        def begin(step: int) -> Batch:
            noise = Noise(run.seed, step, run.device)
            rows = pictures.replaced(rows_at(len(pictures), run.batch, run.seed, step))
            return denoising_batch(latents[rows].to(run.device), pictures, rows, noise, score, self.dropout)

        def loss(batch: Batch, _: int) -> tuple[Tensor, dict]:
            return denoising_loss(score, batch), {}

        def probe(averages: dict[str, nn.Module]) -> dict[str, float]:
            model = score_of(averages)
            rows, images, _ = held_out.sound(torch.arange(min(512, len(held_out))))
            x = space.encode(from_bytes(images).to(run.device))
            with torch.no_grad():
                batch = denoising_batch(x, held_out, rows, Noise(0, 0, run.device), model, 0.0)
                return {"loss": denoising_loss(model, batch).item()}

        trained = [p for network in product.modules.values() for p in network.parameters()]
        phase = Phase("teacher", [(trained, self.optimiser)], loss, clip=self.clip)
        drawn = ScoreModel(score.net, score.schedule, text=score.text, guidance=GUIDANCE)
        row = many_steps(drawn, space, lambda n, size: (n, *latents.shape[1:]), run.device)
        return Task([phase], begin, dict(product.modules), product, probe, [score.net],
                    preview(asked_pictures(loaded), None, {f"model, {STEPS} steps": row}, {}, run.device))


def denoising_batch(x: Tensor, pictures: Pictures, rows: Tensor, noise: Noise, score: ScoreModel,
                    dropout: float) -> Batch:
    """x_t's ingredients for latents x of `rows`: t uniform on the grid, prompts dropped at random."""
    y = pictures.prompts(rows, noise.uniform("caption", len(rows)).cpu())
    dropped = noise.uniform("dropout", len(rows)) < dropout
    y = ["" if d else caption for caption, d in zip(y, dropped.tolist(), strict=True)]
    t = score.schedule.grid(noise.uniform("t", len(rows)), 0.0, 1.0)
    return Batch(x, y, t, noise.normal("eps", x.shape))


def denoising_loss(score: ScoreModel, batch: Batch, control: Tensor | None = None) -> Tensor:
    """Mean squared error of what the network puts out: eps (JDM Sec. 2), v, or a flow's velocity; scalar."""
    x_t = score.schedule.noised(batch.x, batch.t, batch.eps)
    return score(x_t, batch.t, batch.y, control).error(batch.x, batch.eps, "own").square().mean()
