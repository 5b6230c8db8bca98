"""The classifier that prompt agreement and the Frechet distance read (trained on real training pictures only)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from jdm.data.noise import Noise, rows_at
from jdm.errors import UsageError
from jdm.loading import Loaded
from jdm.models.classifier import Classifier, ClassifierConfig
from jdm.ranges import Decay, Positive, Whole
from jdm.run import Needs, Optimiser, Phase, Product, Run, Task
from jdm.sharing import processes
from jdm.space import from_bytes


@dataclass(frozen=True)
class Classification:
    """Cross-entropy with flips and shifts.

    Attributes:
        config: the classifier's shape.
        shift: how far a picture is moved at most, in pixels.
        smoothing: label smoothing, in [0, 1).
        optimiser: trains the classifier.
        clip: bound on the norm of its gradient.
    """

    config: ClassifierConfig = field(default_factory=lambda: ClassifierConfig(name="nano-classifier"))
    shift: Whole = 2
    smoothing: Decay = 0.05
    optimiser: Optimiser = field(default_factory=lambda: Optimiser(lr=3e-3, weight_decay=1e-2))
    clip: Positive = 1.0

    def needs(self, run: Run) -> Needs:
        return Needs(whole="a classifier reads pictures of one size, and moves and mirrors them itself")

    def product(self, loaded: Loaded) -> Product:
        model = Classifier(self.config).to(loaded.run.device)
        return Product({"classifier": model}, lambda folder, averages: averages["classifier"].save(folder))  # type: ignore[operator]

    def task(self, loaded: Loaded) -> Task:
        run, pictures, held_out = loaded.run, loaded.pictures, loaded.held_out
        if pictures.label(torch.arange(1)) is None:
            raise UsageError(f"{run.data.source} has no class labels; a classifier needs them")
        if run.accumulate * processes() > 1:
            raise UsageError("a classifier is normalised over its whole batch, which cannot be computed in parts; "
                             "leave out --accumulate and torchrun, and lower --batch instead")
        product = self.product(loaded)
        model = product.modules["classifier"]

        def begin(step: int) -> tuple[Tensor, Tensor]:
            rows, images, _ = pictures.sound(rows_at(len(pictures), run.batch, run.seed, step))
            pixels = augmented(from_bytes(images), self.shift, Noise(run.seed, step))
            return pixels.to(run.device), pictures.label(rows).to(run.device)  # type: ignore[union-attr]

        def loss(state: tuple[Tensor, Tensor], _: int) -> tuple[Tensor, dict]:
            model.train()
            return cross_entropy(model(state[0]), state[1], label_smoothing=self.smoothing), {}

        def probe(averages: dict[str, nn.Module]) -> dict[str, float]:
            with torch.no_grad():
                parts = [held_out.sound(r)[:2] for r in torch.arange(len(held_out)).split(500)]
                guesses = torch.cat([averages["classifier"](from_bytes(images).to(run.device)).argmax(1)
                                     for _, images in parts])
            labels = held_out.label(torch.cat([rows for rows, _ in parts])).to(run.device)  # type: ignore[union-attr]
            return {"accuracy": (guesses == labels).float().mean().item()}

        phase = Phase("classifier", [(list(model.parameters()), self.optimiser)], loss, clip=self.clip)
        return Task([phase], begin, dict(product.modules), product, probe)


def augmented(pixels: Tensor, shift: int, noise: Noise) -> Tensor:
    """Each picture moved by up to `shift` pixels, black coming in, and half of them flipped."""
    n, side = len(pixels), pixels.shape[-1]
    wide = pad(pixels, [shift] * 4, value=-1.0)
    down, right = ((noise.uniform(k, n) * (2 * shift + 1)).long() for k in ("down", "right"))
    moved = torch.stack([p[:, d : d + side, r : r + side]
                         for p, d, r in zip(wide, down.tolist(), right.tolist(), strict=True)])
    return torch.where((noise.uniform("flip", n) < 0.5).view(-1, 1, 1, 1), moved.flip(-1), moved)
