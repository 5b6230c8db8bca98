"""A text-to-image diffusion model trained from nothing by denoising (nano-sd's second stage)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn

from jdm.data import cache as prepared
from jdm.data.noise import Noise, rows_at
from jdm.data.sources import Pictures, load_pictures
from jdm.models import nano
from jdm.models.family import placed
from jdm.models.folder import save_pipeline
from jdm.models.stable_diffusion import StableDiffusion, UNetDenoiser
from jdm.models.text import TextEncoder
from jdm.run import Optimiser, Phase, Run, Task
from jdm.score import ScoreModel
from jdm.size import height_width
from jdm.space import Space, from_bytes


@dataclass(frozen=True)
class Batch:
    """Clean latents, prompts with dropout, and the noise of one step."""

    x: Tensor
    y: list[str]
    t: Tensor
    eps: Tensor


@dataclass(frozen=True)
class Denoising:
    """E || eps_phi(x_t, t, y) - eps ||^2 over uniform t: UNet and text encoder together (JDM Sec. 2).

    Attributes:
        vae: folder of the trained autoencoder.
        dropout: share of prompts replaced by "", which classifier-free guidance needs.
    """

    vae: str = "runs/nano-vae/model"
    dropout: float = 0.1
    optimiser: Optimiser = field(default_factory=lambda: Optimiser(lr=1e-3, warmup=300))

    def task(self, run: Run) -> Task:
        pictures = prepared.pictures(run, load_pictures(run.data.source, run.data.split, run.data.size))
        held_out = load_pictures(run.data.source, run.data.validation, run.data.size)
        vae = placed(nano.load_vae(self.vae), run.device)
        latents = encoded(Space(vae), pictures)
        tokenizer = nano.tokenizer([c for row in pictures.captions for c in row])
        unet, encoder = placed(nano.unet(), run.device), placed(nano.text_encoder(tokenizer), run.device)
        score = self._score(unet, encoder, tokenizer)

        def begin(step: int) -> Batch:
            noise = Noise(run.seed, step, run.device)
            rows = rows_at(len(pictures), run.batch, run.seed, step)
            return denoising_batch(latents[rows].to(run.device), pictures, rows, noise, score, self.dropout)

        def loss(batch: Batch, _: int) -> tuple[Tensor, dict]:
            return denoising_loss(score, batch), {}

        def assembled(averages: dict[str, nn.Module]) -> StableDiffusion:
            return StableDiffusion(averages["unet"], vae, averages["text_encoder"], tokenizer,  # type: ignore[arg-type]
                                   nano.SCHEDULER)

        def probe(averages: dict[str, nn.Module]) -> dict[str, float]:
            model = self._score(averages["unet"], averages["text_encoder"], tokenizer)
            rows = torch.arange(min(512, len(held_out)))
            x = Space(vae).encode(from_bytes(held_out.batch(rows)).to(run.device))
            with torch.no_grad():
                batch = denoising_batch(x, held_out, rows, Noise(0, 0, run.device), model, 0.0)
                return {"loss": denoising_loss(model, batch).item()}

        return Task(
            phases=[Phase("teacher", [([*unet.parameters(), *encoder.parameters()], self.optimiser)], loss)],
            begin=begin, modules={"unet": unet, "text_encoder": encoder}, averaged=("unet", "text_encoder"),
            export=lambda folder, averages: save_pipeline(assembled(averages).at(run.data.size), folder), probe=probe,
            frozen=[score.net],
        )

    @staticmethod
    def _score(unet: nn.Module, encoder: nn.Module, tokenizer) -> ScoreModel:
        text = TextEncoder(encoder, tokenizer)
        return ScoreModel(UNetDenoiser(unet), nano.schedule(), text=text.encode)


def encoded(space: Space, pictures: Pictures) -> Tensor:
    """Latents of a whole split [N, C, h, w]; they must fit in memory where they are not prepared on disk."""
    return pictures.latents(space) if pictures.latents else torch.cat([*encoded_parts(space, pictures)])


def encoded_parts(space: Space, pictures: Pictures) -> Iterator[Tensor]:
    """The same piece by piece: 500 pictures, or as many as have 4 million pixels; laid out as on disk, for the bits."""
    device = next(space.vae.parameters()).device if space.vae is not None else "cpu"
    for rows in torch.arange(len(pictures)).split(max(1, min(500, 2**22 // prod(height_width(pictures.size))))):
        yield space.encode(from_bytes(pictures.batch(rows)).to(device)).cpu().contiguous()


def denoising_batch(x: Tensor, pictures: Pictures, rows: Tensor, noise: Noise, score: ScoreModel,
                    dropout: float) -> Batch:
    """x_t's ingredients for latents x of `rows`: t uniform on the grid, prompts dropped at random."""
    y = pictures.prompts(rows, noise.uniform("caption", len(rows)).cpu())
    dropped = noise.uniform("dropout", len(rows)) < dropout
    y = ["" if d else caption for caption, d in zip(y, dropped.tolist(), strict=True)]
    t = score.schedule.grid(noise.uniform("t", len(rows)), 0.0, 1.0)
    return Batch(x, y, t, noise.normal("eps", x.shape))


def denoising_loss(score: ScoreModel, batch: Batch, control: Tensor | None = None) -> Tensor:
    """Mean squared error in eps (JDM Sec. 2); scalar."""
    x_t = score.schedule.noised(batch.x, batch.t, batch.eps)
    return (score(x_t, batch.t, batch.y, control).eps - batch.eps).square().mean()
