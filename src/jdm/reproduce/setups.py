"""Setups of tables: a recipes' scale, controls, pictures, what ships already, and the budget."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jdm.errors import UsageError
from jdm.library import SHIPPED
from jdm.recipes import find, scales
from jdm.rewards.base import NAMED
from jdm.run import Run

# Per step at the recipe's batch, on two CPU cores: what `--dry-run` reckons with until a run has its own log.
NANO_SECONDS = {
    "canny": 0.83, "canny-own-t": 0.9, "clean-likelihood": 0.5, "controlled-fake": 0.9, "controlled-teacher": 0.55,
    "controlnet": 0.24, "diff-instruct": 0.38, "draws": 1.5, "dsm": 0.14, "dsm-teacher": 0.14, "fake-x0": 0.56,
    "ddmd-4": 0.48, "canny-4": 0.95,
    "from-nct": 0.8, "frozen-posterior": 0.6, "implicit": 0.44, "jdm": 0.8, "joint": 0.85, "low-t": 0.8, "nct": 0.4,
    "nct-no-boundary": 0.4, "nct-no-consistency": 0.4, "nct-no-dual": 0.4, "no-warm-up": 0.8, "one-t": 0.75,
    "posterior": 0.3, "shared": 0.8,
    "text-both": 0.92, "text-di": 0.4, "text-dmd": 0.4, "text-guided": 0.5, "text-guided-blind": 0.5, "text-own": 0.4,
    "text-reward": 0.78, "text-reward-clean": 0.47, "text-reward-clean-strong": 0.47,
    "text-reward-strong": 0.78, "unfrozen": 0.85, "weak-teacher": 0.23,
}


@dataclass(frozen=True)
class Setup:
    """The settings every cell of a table shares; all that differs between scales is data here.

    Attributes:
        teacher: the model that is distilled; distances are taken to its uncontrolled samples.
        controls: the paper's column -> the control that is measured beside it, under its own name.
        guide: a better teacher, for guidance; the teacher itself where empty.
        split, validation: of the pictures that are asked about once, and of those that choices are made on.
        shipped: (recipe without prefix, its control) -> the model that ships as that recipe's result for seed 0.
        untrained: recipes that the scale has not: the teacher itself takes their models' place.
        same: recipe -> another that trains the same at this scale, so that it is trained once.
        seconds: per training step of a recipe, for estimates; a recipe that is not there has none.
        recipe: full name -> its run.
        scores, extractors: as `evaluate`'s `scored` and `also`.
        measures: measurements of a table, by its name, where they are not its own.
        out: folder of models and cells.
        n: pictures per cell. steps: of every training; by default the recipes' own.
        budgets: steps of every training of a table, by its name, where the recipes' own would take days.
        probes: measurements on validation pictures in the course of each training; 0 for the recipes' own.
        quick: measurements as in `jdm evaluate --quick`.
        prompts: prompts that text-to-image models are scored on (`metrics.scores.read_prompts`), n of each style; empty
            for those of the pictures.
        known: pages' .json files whose cells are taken where they would be measured again on equal terms.
    """

    name: str
    scale: scales.Scale
    teacher: str
    controls: Mapping[str, str]
    guide: str = ""
    source: str = ""
    split: str = "test"
    validation: str = "validation"
    shipped: Mapping[tuple[str, str], str] = field(default_factory=dict)
    untrained: tuple[str, ...] = ()
    same: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    recipe: Callable[[str], Run] = lambda name: find(name)()
    scores: tuple[str, ...] = ()
    extractors: tuple[str, ...] = ()
    measures: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    device: str = "cpu"
    out: Path = Path("runs/reproduce")
    n: int = 5000
    steps: int | None = None
    budgets: Mapping[str, int] = field(default_factory=dict)
    probes: int = 0
    quick: bool = False
    prompts: str = ""
    known: tuple[str, ...] = ()

    def full_name(self, recipe: str) -> str:
        """A recipe's name with the scale's prefix, under which it is trained here."""
        return f"{self.scale.name}-{self.same.get(recipe, recipe)}"

    def run(self, recipe: str) -> Run:
        """A recipe's run, by its name without prefix."""
        return self.recipe(self.full_name(recipe))

    def for_table(self, name: str, probes: int, n: int, steps: int | None = None) -> Setup:
        """This setup with a table's numbers of pictures and probes, and with its budget unless `steps` are given."""
        return replace(self, n=n, steps=steps or self.budgets.get(name), probes=probes)

    def on(self, teacher: str | None = None, source: str | None = None) -> Setup:
        """This setup with another teacher or other pictures, from which no shipped model was made."""
        changes = {k: v for k, v in (("teacher", teacher), ("source", source)) if v and v != getattr(self, k)}
        if not changes:
            return self
        return replace(self, **changes, name="-".join([self.name, *(Path(v).name for v in changes.values())]),
                       shipped={})


def _setup(scale: scales.Scale, **more: Any) -> Setup:
    teacher = scale.run("", None).model
    return Setup(scale.name, scale, teacher, guide="" if scale.guide == teacher else scale.guide, **more)


NANO = _setup(
    scales.NANO, source="fashion-mnist", seconds=NANO_SECONDS, budgets={"ddmd": 500, "control": 500},
    controls={"canny": "canny", "HED": "soft-edge", "depth": "silhouette", "8x SR": "lowres"},
    shipped={("canny", "canny"): "nano-canny", ("controlnet", "canny"): "nano-controlnet",
             ("diff-instruct", ""): "nano-diff-instruct",
             **{(recipe, control): f"{name}-{control}" for control in ("soft-edge", "silhouette", "lowres")
                for recipe, name in (("controlnet", "nano-controlnet"), ("shared", "nano"))}})
SD15 = _setup(
    scales.SD15_SCALE, controls={"canny": "canny", "HED": "hed", "depth": "depth", "8x SR": "lowres8"},
    untrained=("weak-teacher",), same={"jdm": "canny", "text-dmd": "diff-instruct"},
    scores=("clip", "hpsv2", "aesthetic"), extractors=("inception",), device="cuda",
    measures={"table3": (*(f"hpsv2_{style}" for style in ("anime", "concept_art", "paintings", "photo")), "hpsv2",
                         "aesthetic", "clip"),
              "fig6": ("hpsv2", "aesthetic", "clip"),
              "ddmd": ("hpsv2", "clip", "fd", "diversity", "std", "std_growth")})
SETUPS = {setup.name: setup for setup in (NANO, SD15)}


def check(setup: Setup, guided: bool = False) -> None:
    """UsageError, in one line, if something without which no cell can be filled is not there.

    Args:
        guided: the better teacher is needed too.
    """
    missing = []
    for model in [setup.teacher, *([setup.guide] if guided and setup.guide else [])]:
        if not (model in SHIPPED or Path(model).exists() or _fetched(model, "model_index.json")):
            flag = "--model" if model == setup.teacher else "--guide"
            missing.append(f"the weights of {model} (fetch them with `hf download {model}`, or give a folder or a "
                           f".safetensors file with {flag})")
    if not setup.source:
        missing.append("pictures (give a folder or a hub dataset with --source)")
    missing += [f"{spec}'s weights (`{command}`, or --scores {spec}:FOLDER)" for spec in setup.scores
                if (command := _to_fetch(spec))]
    if setup.extractors and find_spec("torch_fidelity") is None:
        missing.append("torch-fidelity (pip install 'jdm[fid]')")
    if missing:
        raise UsageError(f"--scale {setup.scale.name} cannot run yet; missing are {'; '.join(missing)}; --scale nano "
                         "has everything it needs")


def _to_fetch(spec: str) -> str:
    """The command that fetches a published score's weights; empty where they are there, or named by the user."""
    if spec not in NAMED:
        return ""
    module = importlib.import_module(NAMED[spec].partition(":")[0])
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
