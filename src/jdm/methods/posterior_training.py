"""p(x | x_t) of the data itself, trained once and then frozen: a posterior that does not move with the student."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from torch import Tensor, nn

from jdm.data.noise import Noise, rows_at
from jdm.levels import refuse_empty
from jdm.loading import Loaded
from jdm.methods.denoising import Batch, denoising_batch
from jdm.models.family import copied
from jdm.models.folder import save_pipeline
from jdm.posterior import Posterior
from jdm.ranges import Positive, Range, Share
from jdm.run import Needs, Optimiser, Phase, Product, Run, Task


@dataclass(frozen=True)
class PosteriorTraining:
    """Consistency training (JDM Eq. 8) on real pictures, from the teacher's weights; for a `FrozenPosterior`.

    Paper: the posterior learns from the student's samples and moves with it; here: from pictures, because the exact
    joint KL asks for the teacher's p(c | x_t).

    Attributes:
        levels: K of Eq. 8, the number of noise levels.
        low: smallest of those levels, in [0, 1].
        high: largest of those levels, in [0, 1].
        optimiser: trains the posterior.
        clip: bound on the norm of its gradient.
    """

    levels: Annotated[int, Range(1, 10_000)] = 18
    low: Share = 0.02
    high: Share = 0.98
    optimiser: Optimiser = field(default_factory=lambda: Optimiser(lr=1e-5, betas=(0.9, 0.95)))
    clip: Positive = 1.0

    def __post_init__(self):
        refuse_empty(self.low, self.high)

    def needs(self, run: Run) -> Needs:
        return Needs({"teacher": run.model}, latents=True)

    def product(self, loaded: Loaded) -> Product:
        teacher = loaded.teacher

        def write(folder: Path, averages: dict[str, nn.Module]) -> None:
            card = {"kind": "posterior", "method": "consistency training", "control": None}
            trained = teacher.with_networks(backbone=averages[teacher.BACKBONE], controlnet=None)
            save_pipeline(trained, folder, card=card)

        return Product({teacher.BACKBONE: copied(teacher.backbone)}, write)

    def task(self, loaded: Loaded) -> Task:
        run, teacher, pictures = loaded.run, loaded.teacher, loaded.pictures
        latents, product = loaded.latents(), self.product(loaded)
        backbone = product.modules[teacher.BACKBONE]
        score = teacher.score_of(loaded.text(), teacher.denoiser(backbone))
        posterior = Posterior(score, teacher.schedule, self.levels, self.low, self.high)

        def begin(step: int) -> tuple[Batch, Tensor]:
            rows, noise = rows_at(len(pictures), run.batch, run.seed, step), Noise(run.seed, step, run.device)
            batch = denoising_batch(latents[rows].to(run.device), pictures, rows, noise, score, 0.0)
            return batch, noise.uniform("k", len(rows))

        def loss(state: tuple[Batch, Tensor], _: int) -> tuple[Tensor, dict]:
            batch, uniform = state
            return posterior.consistency_loss(batch.x, batch.y, uniform, batch.eps), {}

        phase = Phase("posterior", [(list(backbone.parameters()), self.optimiser)], loss, clip=self.clip)
        return Task([phase], begin, dict(product.modules), product, frozen=[score.net])
