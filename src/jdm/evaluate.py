"""Measurements of a model: distance, consistency, diversity, prompt agreement, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jdm.controls import Control
from jdm.data import Pictures, load_pictures
from jdm.errors import UsageError
from jdm.generator import starting_noise
from jdm.metrics.classifier import Classifier
from jdm.metrics.consistency import Consistency
from jdm.metrics.diversity import diversity
from jdm.metrics.extractors import ClassifierFeatures, EffLite0, Extractor
from jdm.metrics.frechet import Statistics, frechet_distance
from jdm.metrics.prompts import prompt_agreement
from jdm.metrics.spread import bootstrap, frechet_bootstrap
from jdm.metrics.timing import peak_memory_mb, seconds_per_image
from jdm.models.library import ASSETS
from jdm.run import Run
from jdm.sampling import Sampler
from jdm.space import from_bytes, to_bytes, unit

if TYPE_CHECKING:
    from jdm.methods.networks import Networks

REFERENCE_STEPS, REFERENCE_GUIDANCE = 25, 2.0  # of the uncontrolled teacher samples distances are taken to
DIVERSITY_GROUPS, DIVERSITY_DRAWS = 64, 8


@dataclass(frozen=True)
class Questions:
    """What every model of one comparison is asked: the same prompts, controls, noise and pictures.

    Attributes:
        images: [N, 3, H, W] in [0, 1], where (y, c) come from. c: None for models without a control.
    """

    images: Tensor
    y: list[str]
    c: Tensor | None
    labels: Tensor | None
    seed: int

    @classmethod
    def of(cls, pictures: Pictures, control: Control | None, n: int, seed: int) -> Questions:
        if not 2 <= n <= len(pictures):
            raise UsageError(f"n must be in 2..{len(pictures)} ({pictures.source}), got {n}")
        rows = torch.arange(n)
        generator = torch.Generator().manual_seed(seed)
        images = unit(from_bytes(pictures.batch(rows)))
        c = None if control is None else torch.cat([control.h(part) for part in images.split(250)])
        return cls(images, pictures.prompts(rows, torch.rand(n, generator=generator)), c, pictures.label(rows), seed)

    def __len__(self) -> int:
        return len(self.y)

    def head(self, n: int) -> Questions:
        cut = (self.images[:n], self.y[:n], None if self.c is None else self.c[:n],
               None if self.labels is None else self.labels[:n])
        return Questions(*cut, self.seed)


@cache
def judge() -> Classifier:
    """The shipped classifier, trained on real training pictures only."""
    return Classifier.load(ASSETS / "nano-classifier")


@dataclass(frozen=True)
class Reference:
    """Statistics of uncontrolled teacher samples, and the distance a second set of n of them has: the floor."""

    statistics: Statistics
    floor: float


def answers(sampler: Sampler, questions: Questions, control: Control | None, batch: int = 64) -> Tensor:
    """uint8 pictures [N, 3, H, W] for the questions; picture i has its own noise, whatever the batch."""
    z = starting_noise(sampler.model.latent_shape(len(questions), questions.images.shape[-1]), questions.seed)
    shown = None if control is None or questions.c is None else control.image(questions.c)
    return sampler(z, questions.y, shown, batch)


def measured(
    pictures: Tensor,
    questions: Questions,
    control: Control | None,
    references: dict[str, Reference],
    extractors: list[Extractor],
    sampler: Sampler,
) -> dict[str, Any]:
    """All measurements of `pictures` [N, 3, H, W] uint8; the first extractor gives `fd`, others their own keys."""
    row: dict[str, Any] = {"n": len(pictures)}
    for place, extractor in enumerate(extractors):
        suffix = "" if place == 0 else f"_{extractor.name.split('-')[0]}"
        features = extractor.features(pictures)
        reference = references[extractor.name]
        own = Statistics.of(features, extractor.name)
        row |= {f"fd{suffix}": frechet_distance(own, reference.statistics), f"fd_floor{suffix}": reference.floor,
                f"fd_extractor{suffix}": extractor.name}
        if place == 0:
            row["fd_spread"] = frechet_bootstrap(features, reference.statistics)[1]
    if control is not None and questions.c is not None:
        row |= _obedience(pictures, questions, control, sampler)
    if questions.labels is not None:
        row["prompt_agreement"] = prompt_agreement(judge(), pictures, questions.labels)
    row["diversity"] = spread_over_noise(sampler, questions, control, extractors[0])
    row |= {"nfe": sampler.nfe, "std": float(from_bytes(pictures).std())}
    return row


def cost(sampler: Sampler, questions: Questions, control: Control | None, batches: tuple[int, ...] = (64, 1),
         repeats: int = 3) -> dict[str, float]:
    """Seconds from prompt and control to pixels, per picture, at each batch size; and peak memory in MiB."""
    row: dict[str, float] = {}
    for batch in batches:
        part = questions.head(min(batch, len(questions)))

        def once(part: Questions = part) -> Tensor:
            sampler.text.forget()
            return answers(sampler, part, control)

        key = "seconds_per_image" if batch != 1 else "seconds_per_image_batch1"
        row[key] = seconds_per_image(once, len(part), repeats)
    return row | {"peak_memory_mb": peak_memory_mb(next(sampler.net.parameters()).device)}


def spread_over_noise(sampler: Sampler, questions: Questions, control: Control | None, extractor: Extractor,
                      groups: int = DIVERSITY_GROUPS, draws: int = DIVERSITY_DRAWS) -> float:
    """Diversity over z at fixed (y, c): mean pairwise feature distance."""
    part = questions.head(min(groups, len(questions)))
    z = starting_noise(sampler.model.latent_shape(len(part) * draws, part.images.shape[-1]), part.seed + 1)
    y = [caption for caption in part.y for _ in range(draws)]
    shown = None
    if control is not None and part.c is not None:
        shown = control.image(part.c).repeat_interleave(draws, 0)
    features = extractor.features(sampler(z, y, shown))
    return diversity(features.view(len(part), draws, -1)).mean


def _obedience(pictures: Tensor, questions: Questions, control: Control, sampler: Sampler) -> dict[str, float]:
    parts = unit(from_bytes(pictures)).split(250)
    seen = torch.cat([control.h(part) for part in parts])
    with torch.no_grad():
        device = next(sampler.net.parameters()).device
        space, trip = sampler.model.space, []
        for part in questions.images.split(250):
            back = to_bytes(space.decode(space.encode(part.to(device) * 2 - 1))).cpu()
            trip.append(control.h(unit(from_bytes(back))))
    assert questions.c is not None
    anchors = Consistency.of(control, questions.c, seen, tuple(pictures.shape[-2:]), torch.cat(trip))  # type: ignore[arg-type]
    each = (seen - questions.c).abs().flatten(1).mean(1)
    spread = bootstrap(each)[1]
    return {"consistency": anchors.value, "consistency_spread": spread, "consistency_chance": anchors.chance,
            "consistency_blank": anchors.blank, "consistency_round_trip": anchors.round_trip or 0.0}


def validation_probe(networks: Networks, run: Run, control: Control | None,
                     n: int = 500) -> Callable[[dict[str, nn.Module]], dict[str, float]]:
    """averages -> consistency, distance and agreement of the averaged student on n validation pictures."""
    held_out = load_pictures(run.data.source, run.data.validation, run.data.size)
    questions = Questions.of(held_out, control, min(n, len(held_out)), seed=0)
    extractor = ClassifierFeatures(judge())

    def target() -> Statistics:
        uncontrolled = networks.teacher.with_parts(controlnet=None)
        sampler = Sampler(uncontrolled, REFERENCE_STEPS, REFERENCE_GUIDANCE)
        pictures = answers(sampler, Questions.of(held_out, None, min(2000, len(held_out)), seed=1), None)
        return Statistics.of(extractor.features(pictures), extractor.name)

    known: list[Statistics] = []

    def probe(averages: dict[str, nn.Module]) -> dict[str, float]:
        known.extend([target()] if not known else [])
        student = networks.averaged(averages).with_parts(card={"kind": "one-step"})
        sampler = Sampler(student, 1)
        sampler.generator = networks.teacher.generator(networks.text, sampler.net, networks.generator.t_init)
        pictures = answers(sampler, questions, control)
        distance = frechet_distance(Statistics.of(extractor.features(pictures), extractor.name), known[0])
        row = {"fd": distance}
        if control is not None and questions.c is not None:
            seen = torch.cat([control.h(part) for part in unit(from_bytes(pictures)).split(250)])
            row["consistency"] = (seen - questions.c).abs().mean().item()
        if questions.labels is not None:
            row["prompt_agreement"] = prompt_agreement(judge(), pictures, questions.labels)
        return row

    return probe
