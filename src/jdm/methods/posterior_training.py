"""p(x | x_t) of the data itself, trained once and then frozen: a posterior that does not move with the student."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from jdm.data import cache as prepared
from jdm.data.noise import Noise, rows_at
from jdm.data.sources import load_pictures
from jdm.library import load_model
from jdm.methods.denoising import Batch, denoising_batch, encoded
from jdm.models.family import copied
from jdm.models.folder import save_pipeline
from jdm.posterior import Posterior
from jdm.run import Optimiser, Phase, Run, Task


@dataclass(frozen=True)
class PosteriorTraining:
    """Consistency training (JDM Eq. 8) on real pictures, from the teacher's weights; for `JDM.frozen_posterior`.

    Paper: the posterior learns from the student's samples and moves with it; here: from pictures, because the exact
    joint KL asks for the teacher's p(c | x_t).

    Attributes:
        levels: K of Eq. 8. t_range: of those levels.
    """

    levels: int = 18
    t_range: tuple[float, float] = (0.02, 0.98)
    optimiser: Optimiser = field(default_factory=lambda: Optimiser(lr=1e-5, betas=(0.9, 0.95)))

    def task(self, run: Run) -> Task:
        teacher = load_model(run.model).at(run.data.size).to(run.device)
        pictures = prepared.pictures(run, load_pictures(run.data.source, run.data.split, run.data.size))
        latents = encoded(teacher.space, pictures)
        unet = copied(teacher.backbone)
        text = prepared.text(run, teacher.text(one_by_one=True))
        low, high = self.t_range
        score = teacher.score_of(text, teacher.denoiser(unet))
        posterior = Posterior(score, teacher.schedule, self.levels, low, high)

        def begin(step: int) -> tuple[Batch, Tensor]:
            rows, noise = rows_at(len(pictures), run.batch, run.seed, step), Noise(run.seed, step, run.device)
            batch = denoising_batch(latents[rows].to(run.device), pictures, rows, noise, score, 0.0)
            return batch, noise.uniform("k", len(rows))

        def loss(state: tuple[Batch, Tensor], _: int) -> tuple[Tensor, dict]:
            batch, uniform = state
            return posterior.consistency_loss(batch.x, batch.y, uniform, batch.eps), {}

        def export(folder: Path, averages: dict[str, nn.Module]) -> None:
            card = {"kind": "posterior", "method": "consistency training", "control": None}
            save_pipeline(teacher.with_networks(backbone=averages["unet"], controlnet=None), folder, card=card)

        return Task([Phase("posterior", [(list(unet.parameters()), self.optimiser)], loss)], begin,
                    {"unet": unet}, export, averaged=("unet",), frozen=[score.net])
