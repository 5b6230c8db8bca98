"""References for distances: statistics of uncontrolled teacher samples, and the floor from a second set of samples.

The teacher draws pictures for the test pictures' prompts without any control. Statistics, steps, guidance and seeds are
stored in one file; the floor is the distance between a second, disjoint set of teacher samples and the first.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from jdm.data.cache import prompts_sha256
from jdm.data.sources import Pictures
from jdm.errors import UsageError
from jdm.evaluation.questions import Questions, answers
from jdm.evaluation.sampling import Sampler, counted
from jdm.files import ASSETS, parsed
from jdm.library import load_model
from jdm.metrics.extractors import Extractor
from jdm.metrics.frechet import Statistics, frechet_distance
from jdm.size import spelled

AGAIN = "delete that file in ~/.cache/jdm/reference and run again"
STEPS, GUIDANCE, SAMPLES = 25, 2.0, 5000
SEEDS = (1000, 2000)  # seeds of the reference and of the second set
FLOORS = (250, 500, 1000, 2000, 5000)  # sizes of the second set at which the floor is stored


@dataclass(frozen=True)
class Reference:
    """Statistics of uncontrolled teacher samples, which include the floor at several sizes of a second set."""

    statistics: Statistics

    def floor(self, n: int) -> float:
        """Distance of n further teacher samples; interpolated linearly in 1 / n, as its bias is, between sizes."""
        found = parsed(self.statistics.extra.get("floors", ""), "the floors of a reference", dict[str, float], AGAIN)
        if not found or not all(k.isdecimal() for k in found):
            raise UsageError(f"the floors of a reference must be by number of pictures; {AGAIN}")
        table = sorted((int(k), float(v)) for k, v in found.items())
        sizes = [k for k, _ in table]
        if n <= sizes[0]:
            return table[0][1] * sizes[0] / n
        if n >= sizes[-1]:
            return table[-1][1]
        high = next(i for i, k in enumerate(sizes) if k >= n)
        (a, at_a), (b, at_b) = table[high - 1], table[high]
        share = (1 / a - 1 / n) / (1 / a - 1 / b)
        return at_a + share * (at_b - at_a)


def references(teacher: str, extractors: list[Extractor], pictures: Pictures, steps: int = STEPS,
               guidance: float = GUIDANCE, samples: int = SAMPLES,
               device: str | torch.device = "cpu") -> dict[str, Reference]:
    """One reference per extractor: shipped for nano-sd; for other teachers computed once and cached on disk."""
    found: dict[str, Reference] = {}
    recipe = {"teacher": teacher, "pictures": pictures.source, "size": spelled(pictures.size),
              "steps": str(steps), "guidance": f"{guidance:g}", "samples": str(min(samples, len(pictures))),
              "seeds": json.dumps(SEEDS)}
    if pictures.stamps is not None:  # not the packaged ones, whose name says which prompts they have
        recipe["prompts"] = prompts_sha256(pictures)
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    for extractor in extractors:
        for folder in (ASSETS / "reference", _cache() / key):
            file = folder / f"{extractor.name}.safetensors"
            if file.is_file():
                statistics = Statistics.load(file)
                said = {"size": "32 x 32"} | statistics.extra  # nano-sd's, which the shipped files do not record
                if all(said.get(k) == v for k, v in recipe.items()):
                    found[extractor.name] = Reference(statistics)
                    break
    missing = [e for e in extractors if e.name not in found]
    if missing:
        found |= _measured(teacher, missing, pictures, recipe, _cache() / key, device)
    return found


def _measured(teacher: str, extractors: list[Extractor], pictures: Pictures, recipe: dict[str, str],
              folder: Path, device: str | torch.device) -> dict[str, Reference]:
    model = load_model(teacher).with_networks(controlnet=None).at(pictures.size).to(device)
    if model.levels:
        raise UsageError(f"{teacher} is a student of {counted(len(model.levels))}; a reference needs its multi-step "
                         "teacher")
    sampler = Sampler(model, int(recipe["steps"]), float(recipe["guidance"]))
    n = int(recipe["samples"])
    first, second = (answers(sampler, Questions.of(pictures, None, n, seed), None) for seed in SEEDS)
    digest = hashlib.sha256(first.numpy().tobytes()).hexdigest()
    made: dict[str, Reference] = {}
    for extractor in extractors:
        own = Statistics.of(extractor.features(first), extractor.name)
        others = extractor.features(second)
        floors = {str(k): frechet_distance(Statistics.of(others[:k], extractor.name), own)
                  for k in sorted({*FLOORS, n}) if k <= n}
        extra = recipe | {"floors": json.dumps(floors), "sha256_of_samples": digest}
        statistics = Statistics(own.mean, own.covariance, own.n, own.extractor, extra)
        folder.mkdir(parents=True, exist_ok=True)
        statistics.save(folder / f"{extractor.name}.safetensors")
        made[extractor.name] = Reference(statistics)
    return made


def _cache() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "jdm" / "reference"

