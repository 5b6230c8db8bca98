"""The multi-step ControlNet (arXiv 2302.05543): a control learnt by denoising real pictures, UNet frozen."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from jdm.controls.base import control_of
from jdm.data.noise import Noise
from jdm.evaluation.preview import STEPS, preview
from jdm.loading import Loaded
from jdm.methods.denoising import Batch, denoising_batch, denoising_loss
from jdm.methods.previews import TEACHER, asked_pictures, guidance_of, many_steps
from jdm.models.family import placed
from jdm.models.folder import save_pipeline
from jdm.ranges import Positive, Share
from jdm.run import Needs, Optimiser, Phase, Product, Run, Task
from jdm.space import from_bytes, unit


@dataclass(frozen=True)
class ControlNet:
    """E || eps(x_t, t, y, c) - eps ||^2 over the ControlNet alone; prompts dropped at random for guidance.

    Attributes:
        control: a control by name, or an import path, "my_controls.py:Posterize".
        dropout: share of prompts replaced by "", in [0, 1].
        optimiser: trains the ControlNet.
        clip: bound on the norm of its gradient.
    """

    control: str = "canny"
    dropout: Share = 0.1
    optimiser: Optimiser = field(default_factory=lambda: Optimiser(lr=1e-3, betas=(0.9, 0.95)))
    clip: Positive = 1.0

    def needs(self, run: Run) -> Needs:
        return Needs({"teacher": run.model}, self.control, latents=True)

    def product(self, loaded: Loaded) -> Product:
        teacher = loaded.teacher

        def write(folder: Path, averages: dict[str, nn.Module]) -> None:
            card = {"kind": "many-step", "method": "controlnet", "control": self.control,
                    "preprocessor": loaded.preprocessor}
            save_pipeline(teacher.with_networks(controlnet=averages["controlnet"]), folder, card=card)

        with loaded.making():
            net = teacher.new_controlnet(teacher.backbone)
        return Product({"controlnet": placed(net, loaded.run.device)}, write)

    def task(self, loaded: Loaded) -> Task:
        run, control, teacher, pictures = loaded.run, loaded.control, loaded.teacher, loaded.pictures
        assert control is not None
        latents, product = loaded.latents(), self.product(loaded)
        net = product.modules["controlnet"]
        score = teacher.score_of(loaded.text(), teacher.denoiser(teacher.backbone, net))
        batches = loaded.batches()

        def shown(images: Tensor, maps: Tensor | None, luck: Tensor | None = None) -> Tensor:
            return control.image(control_of(control, unit(from_bytes(images)).to(run.device), maps, luck))

        def begin(step: int) -> tuple[Batch, Tensor]:
            (rows, images, maps), noise = batches(step), Noise(run.seed, step, run.device)
            batch = denoising_batch(latents[rows].to(run.device), pictures, rows, noise, score, self.dropout)
            return batch, shown(images, maps, noise.uniform("control", len(rows)).cpu())

        def loss(state: tuple[Batch, Tensor], _: int) -> tuple[Tensor, dict]:
            return denoising_loss(score, *state), {}

        def probe(_: dict[str, nn.Module]) -> dict[str, float]:
            rows, images, maps = loaded.held_out.sound(torch.arange(min(512, len(loaded.held_out))))
            x = teacher.space.encode(from_bytes(images).to(run.device))
            with torch.no_grad():
                batch = denoising_batch(x, loaded.held_out, rows, Noise(0, 0, run.device), score, 0.0)
                return {"loss": denoising_loss(score, batch, shown(images, maps)).item()}

        phase = Phase("controlnet", [(list(net.parameters()), self.optimiser)], loss, clip=self.clip)
        guided = teacher.score_of(loaded.text(), score.net, guidance_of(teacher))
        own, led = (many_steps(guided, teacher.space, teacher.latent_shape, run.device, c) for c in (None, control))
        shows = preview(asked_pictures(loaded), control, {f"model, {STEPS} steps": led}, {TEACHER: own}, run.device)
        return Task([phase], begin, dict(product.modules), product, probe, [score.net], shows)
