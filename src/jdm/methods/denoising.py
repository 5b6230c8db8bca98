"""A text-to-image diffusion model trained from nothing by denoising (nano-sd's second stage)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jdm.data.noise import Noise, rows_at
from jdm.data.sources import Pictures
from jdm.errors import UsageError
from jdm.evaluation.preview import STEPS, preview
from jdm.loading import Loaded
from jdm.methods.previews import GUIDANCE, asked_pictures, many_steps
from jdm.models import nano
from jdm.models.execution import DTYPES, computing
from jdm.models.family import Family, placed
from jdm.models.folder import save_pipeline
from jdm.models.nano import TeacherConfig, VAEConfig
from jdm.models.nano_flow import FlowConfig
from jdm.models.stable_diffusion import StableDiffusion
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
        vae: folder of the trained autoencoder, or of a model with one; or a packaged one, such as emoji-vae.
        network: the trained network and its sizes: a UNet, or a transformer of SD3's format.
        start: folder of a Stable-Diffusion-format model whose UNet, text encoder and tokenizer the training goes on
            from, in place of new ones of `network`.
        dropout: share of prompts replaced by "", which classifier-free guidance needs; in [0, 1].
        optimiser: trains both networks.
        clip: bound on the norm of their gradient.
    """

    vae: str = "runs/nano-vae/model"
    network: TeacherConfig | FlowConfig = field(default_factory=TeacherConfig)
    start: str = ""
    dropout: Share = 0.1
    optimiser: Optimiser = field(default_factory=lambda: Optimiser(lr=1e-3, warmup=300))
    clip: Positive = 1.0

    def needs(self, run: Run) -> Needs:
        start = {"start": self.start} if self.start else {}
        return Needs(start, latents=True, autoencoder=self.vae)

    def product(self, loaded: Loaded) -> Product:
        return self._product(loaded, *self._networks(loaded))

    def _product(self, loaded: Loaded, made: dict[str, nn.Module], model: Callable[..., Family]) -> Product:
        run, vae = loaded.run, loaded.space.vae

        def write(folder: Path, averages: dict[str, nn.Module]) -> None:
            save_pipeline(model(averages, vae).at(run.data.size), folder)

        return Product({name: placed(network, run.device) for name, network in made.items()}, write)

    def _networks(self, loaded: Loaded) -> tuple[dict[str, nn.Module], Callable[..., Family]]:
        """The networks to train, and (networks, autoencoder) -> the model of such networks."""
        if self.start:
            start = loaded.model("start")
            if type(start) is not StableDiffusion:
                raise UsageError(f"{self.start} is not in Stable Diffusion's format, which --method.start takes; leave "
                                 "it out to train from nothing")
            made = {name: copy.deepcopy(getattr(start, name)).requires_grad_() for name in ("unet", "text_encoder")}
            return made, lambda networks, vae: start.with_parts(**networks, vae=vae, controlnet=None)
        vae: Any = loaded.space.vae
        latents = VAEConfig(vae.config.latent_channels, tuple(vae.config.block_out_channels))
        captions = (caption for row in loaded.pictures.captions for caption in row)
        tokenizer = nano.tokenizer(captions, self.network.tokens, self.network.merges)
        made = self.network.networks(latents.latent_shape(loaded.run.data.size), tokenizer)
        return made, lambda networks, vae: self.network.model(networks, vae, tokenizer)

    def task(self, loaded: Loaded) -> Task:
        run, pictures, held_out = loaded.run, loaded.pictures, loaded.held_out
        space, latents, vae = loaded.space, loaded.latents(), loaded.space.vae
        made, model_of = self._networks(loaded)
        product = self._product(loaded, made, model_of)

        def score_of(networks: dict[str, nn.Module]) -> ScoreModel:
            model = model_of(networks, vae)
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
