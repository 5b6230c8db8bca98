"""What a table is made on: a teacher, the controls of its columns, its recipes, and what ships already."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

from jdm.errors import UsageError
from jdm.library import SHIPPED
from jdm.recipes import entries, find, sd15
from jdm.rewards.base import KNOWN
from jdm.run import Run

# Per step at the recipe's batch, on two CPU cores: what `--dry-run` reckons with until a run has its own log.
NANO_SECONDS = {
    "canny": 0.83, "canny-own-t": 0.9, "clean-likelihood": 0.5, "controlled-fake": 0.9, "controlled-teacher": 0.55,
    "controlnet": 0.24, "diff-instruct": 0.38, "draws": 1.5, "dsm": 0.14, "dsm-teacher": 0.14, "fake-x0": 0.56,
    "from-nct": 0.8, "frozen-posterior": 0.6, "implicit": 0.44, "jdm": 0.8, "joint": 0.85, "low-t": 0.8, "nct": 0.4,
    "nct-no-boundary": 0.4, "nct-no-consistency": 0.4, "nct-no-dual": 0.4, "no-warm-up": 0.8, "one-t": 0.75,
    "posterior": 0.3, "shared": 0.8,
    "text-both": 0.92, "text-di": 0.4, "text-dmd": 0.4, "text-guided": 0.5, "text-guided-blind": 0.5, "text-own": 0.4,
    "text-reward": 0.78, "text-reward-clean": 0.47, "text-reward-clean-strong": 0.47,
    "text-reward-strong": 0.78, "unfrozen": 0.85, "weak-teacher": 0.23,
}


@dataclass(frozen=True)
class Scale:
    """A family of recipes to make the tables with; everything that differs between families is data here.

    Attributes:
        model: the teacher; distances are taken to its uncontrolled samples.
        prefix: of its recipes' names.
        controls: the paper's column -> the control that is measured beside it, under its own name.
        shipped: (recipe without prefix, its control) -> the model that ships as that recipe's result for seed 0.
        source, split, validation: the pictures that are asked about, once, and those that choices are made on.
        seconds: per training step of a recipe, for estimates; a recipe that is not there has none.
        recipe: full name -> its run.
        given: recipe without prefix -> a model that is taken as it is in its place. same: recipe -> another that is the
            same here, so that it is trained once.
        guide: a better teacher than `model`, for guidance; `model` itself where empty.
        scores, extractors: as `evaluate`'s `scored` and `also`. measures: of a table, where they are not its own.
        device: of trainings and measurements, where none is asked for.
    """

    name: str
    model: str
    prefix: str
    controls: Mapping[str, str]
    shipped: Mapping[tuple[str, str], str] = field(default_factory=dict)
    source: str = "fashion-mnist"
    split: str = "test"
    validation: str = "validation"
    seconds: Mapping[str, float] = field(default_factory=dict)
    recipe: Callable[[str], Run] = lambda name: find(name)()
    given: Mapping[str, str] = field(default_factory=dict)
    same: Mapping[str, str] = field(default_factory=dict)
    guide: str = ""
    scores: tuple[str, ...] = ()
    extractors: tuple[str, ...] = ()
    measures: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    device: str = "cpu"

    def full_name(self, recipe: str) -> str:
        """A recipe's name with the prefix, under which it is trained here."""
        return self.prefix + self.same.get(recipe, recipe)

    def on(self, model: str | None = None, source: str | None = None, guide: str | None = None,
           scores: tuple[str, ...] = ()) -> Scale:
        """The same tables on another teacher or other pictures: nothing that ships was made from those."""
        scale = replace(self, guide=guide or self.guide, scores=scores or self.scores)
        changed = [v for v, own in ((model, self.model), (source, self.source)) if v and v != own]
        if not changed:
            return scale
        given = {recipe: model if model and v == self.model else v for recipe, v in self.given.items()}
        return replace(scale, name="-".join([self.name, *(Path(v).name for v in changed)]), model=model or self.model,
                       source=source or self.source, shipped={}, given=given)


NANO = Scale(
    name="nano", model="nano-sd", prefix="nano-",
    controls={"canny": "canny", "HED": "soft-edge", "depth": "silhouette", "8x SR": "lowres"},
    shipped={("canny", "canny"): "nano-canny", ("controlnet", "canny"): "nano-controlnet",
             ("diff-instruct", ""): "nano-diff-instruct",
             **{(recipe, control): f"{name}-{control}" for control in ("soft-edge", "silhouette", "lowres")
                for recipe, name in (("controlnet", "nano-controlnet"), ("shared", "nano"))}},
    seconds=NANO_SECONDS)
SD15 = Scale(
    name="sd15", model=sd15.SD15, prefix="sd15-",
    controls={"canny": "canny", "HED": "hed", "depth": "depth", "8x SR": "lowres8"}, source="",
    given={"weak-teacher": sd15.SD15},
    same={"jdm": "canny", "text-dmd": "diff-instruct", "text-reward": "hfl", "text-guided-blind": "cfg21"},
    guide=sd15.SD21, scores=("clip", "hpsv2", "aesthetic"), extractors=("inception",),
    measures={"table3": (*(f"hpsv2_{style}" for style in ("anime", "concept_art", "paintings", "photo")), "hpsv2",
                         "aesthetic", "clip"),
              "fig6": ("hpsv2", "aesthetic", "clip")},
    device="cuda")
SCALES = {scale.name: scale for scale in (NANO, SD15)}


def check(scale: Scale, recipes: set[str]) -> None:
    """UsageError, in one line, if something without which no cell can be filled is not there.

    Args:
        recipes: those a table needs, without prefix.
    """
    known, missing = entries(), []
    wanted = {scale.full_name(name) for name in recipes - scale.given.keys()}
    names = sorted(wanted - known.keys())
    if names:
        missing.append(f"the recipes {', '.join(names)}")
    text = "weak-teacher" in recipes  # the table that a guide is lent to
    for model in [scale.model, *([scale.guide] if text and scale.guide else [])]:
        if not _has_weights(model):
            flag = "--model" if model == scale.model else "--guide"
            missing.append(f"the weights of {model} (fetch them with `hf download {model}`, or give a folder or a "
                           f".safetensors file with {flag})")
    if not scale.source:
        missing.append("pictures (give a folder or a hub dataset with --source)")
    missing += [f"{spec}'s weights (`{command}`, or --scores {spec}:FOLDER)" for spec in scale.scores
                if (command := _to_fetch(spec))]
    if scale.extractors and find_spec("torch_fidelity") is None:
        missing.append("torch-fidelity (pip install 'jdm[fid]')")
    if missing:
        raise UsageError(f"--scale {scale.name} cannot run yet; missing are {'; '.join(missing)}; --scale nano has "
                         "everything it needs")


def _has_weights(model: str) -> bool:
    return model in SHIPPED or Path(model).exists() or _fetched(model, "model_index.json")


def _to_fetch(spec: str) -> str:
    """The command that fetches a published score's weights; empty where they are there, or named by the user."""
    if spec not in KNOWN:
        return ""
    module = importlib.import_module(KNOWN[spec].partition(":")[0])
    place, files = getattr(module, "WEIGHTS", ""), getattr(module, "FILES", ())
    if not place or _fetched(place, files[0] if files else "config.json"):
        return ""
    return " ".join(["hf download", place, *files[:1]])


def _fetched(place: str, file: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(place, file), str)
    except ValueError:  # no hub id either
        return False
