"""The multi-step ControlNet (arXiv 2302.05543): a control learnt by denoising real pictures, UNet frozen."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from jdm.data import cache as prepared
from jdm.data.batches import Batches
from jdm.data.noise import Noise
from jdm.data.sources import load_pictures
from jdm.library import load_model
from jdm.methods.denoising import Batch, denoising_batch, denoising_loss, encoded
from jdm.methods.networks import loaded_control
from jdm.models.family import placed
from jdm.models.folder import save_pipeline
from jdm.run import Optimiser, Phase, Run, Task
from jdm.space import from_bytes, unit


@dataclass(frozen=True)
class ControlNet:
    """E || eps(x_t, t, y, c) - eps ||^2 over the ControlNet alone; prompts dropped at random for guidance."""

    control: str = "canny"
    dropout: float = 0.1
    optimiser: Optimiser = field(default_factory=lambda: Optimiser(lr=1e-3, betas=(0.9, 0.95)))

    def task(self, run: Run) -> Task:
        control = loaded_control(self.control, run.data.size)
        teacher = load_model(run.model).at(run.data.size).to(run.device)
        pictures = prepared.pictures(run, load_pictures(run.data.source, run.data.split, run.data.size))
        held_out = load_pictures(run.data.source, run.data.validation, run.data.size)
        latents = encoded(teacher.space, pictures)
        net = placed(teacher.new_controlnet(), run.device)
        text = prepared.text(run, teacher.text(one_by_one=True))
        score = teacher.score_of(text, teacher.denoiser(controlnet=net))

        batches = Batches(pictures, run.batch, run.seed)

        def shown(images: Tensor) -> Tensor:
            return control.image(control.h(unit(from_bytes(images)).to(run.device)))

        def begin(step: int) -> tuple[Batch, Tensor]:
            (rows, images), noise = batches(step), Noise(run.seed, step, run.device)
            batch = denoising_batch(latents[rows].to(run.device), pictures, rows, noise, score, self.dropout)
            return batch, shown(images)

        def loss(state: tuple[Batch, Tensor], _: int) -> tuple[Tensor, dict]:
            return denoising_loss(score, *state), {}

        def probe(_: dict[str, nn.Module]) -> dict[str, float]:
            rows = torch.arange(min(512, len(held_out)))
            x = teacher.space.encode(from_bytes(held_out.batch(rows)).to(run.device))
            with torch.no_grad():
                batch = denoising_batch(x, held_out, rows, Noise(0, 0, run.device), score, 0.0)
                return {"loss": denoising_loss(score, batch, shown(held_out.batch(rows))).item()}

        def export(folder: Path, averages: dict[str, nn.Module]) -> None:
            card = {"kind": "many-step", "method": "controlnet", "control": self.control}
            save_pipeline(teacher.with_networks(controlnet=averages["controlnet"]), folder, card=card)

        return Task([Phase("controlnet", [(list(net.parameters()), self.optimiser)], loss)], begin,
                    {"controlnet": net}, export, averaged=("controlnet",), probe=probe, frozen=[score.net])
