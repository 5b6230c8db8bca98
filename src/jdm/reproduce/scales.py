"""What a table is made on: a teacher, the controls of its columns, its recipes, and what ships already."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from jdm.errors import UsageError
from jdm.models.library import SHIPPED
from jdm.recipes import entries, find
from jdm.run import Run

# Per step at the recipe's batch, on two CPU cores: what `--dry-run` reckons with until a run has its own log.
NANO_SECONDS = {
    "canny": 0.83, "canny-own-t": 0.9, "clean-likelihood": 0.5, "controlled-fake": 0.9, "controlled-teacher": 0.55,
    "controlnet": 0.24, "diff-instruct": 0.38, "draws": 1.5, "dsm": 0.14, "dsm-teacher": 0.14, "fake-x0": 0.56,
    "frozen-posterior": 0.6, "implicit": 0.44, "jdm": 0.8, "joint": 0.85, "low-t": 0.8, "nct": 0.4,
    "nct-no-boundary": 0.4, "nct-no-consistency": 0.4, "nct-no-dual": 0.4, "no-warm-up": 0.8, "one-t": 0.75,
    "posterior": 0.3, "shared": 0.8,
    "text-both": 0.92, "text-di": 0.4, "text-dmd": 0.4, "text-guided": 0.5, "text-guided-blind": 0.5, "text-own": 0.4,
    "text-reward": 0.78, "text-reward-clean": 0.47, "unfrozen": 0.85, "weak-teacher": 0.23,
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
        lacks: measurements of its own that no code takes yet.
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
    lacks: tuple[str, ...] = ()

    def on(self, model: str | None, source: str | None) -> Scale:
        """The same tables on another teacher or other pictures: nothing that ships was made from those."""
        changed = [v for v, own in ((model, self.model), (source, self.source)) if v and v != own]
        if not changed:
            return self
        name = "-".join([self.name, *(Path(v).name for v in changed)])
        return replace(self, name=name, model=model or self.model, source=source or self.source, shipped={})


NANO = Scale(
    name="nano", model="nano-sd", prefix="nano-",
    controls={"canny": "canny", "HED": "soft-edge", "depth": "silhouette", "8x SR": "lowres"},
    shipped={("canny", "canny"): "nano-canny", ("controlnet", "canny"): "nano-controlnet",
             ("diff-instruct", ""): "nano-diff-instruct",
             **{(recipe, control): f"{name}-{control}" for control in ("soft-edge", "silhouette", "lowres")
                for recipe, name in (("controlnet", "nano-controlnet"), ("shared", "nano"))}},
    seconds=NANO_SECONDS)
SD15 = Scale(
    name="sd15", model="stable-diffusion-v1-5/stable-diffusion-v1-5", prefix="sd15-",
    controls={"canny": "canny", "HED": "hed", "depth": "depth", "8x SR": "lowres8"}, source="",
    lacks=("Inception FID", "CLIP", "HPSv2.1", "LAION aesthetic"))
SCALES = {scale.name: scale for scale in (NANO, SD15)}


def check(scale: Scale, recipes: set[str]) -> None:
    """UsageError, in one line, if something without which no cell can be filled is not there.

    Args:
        recipes: those a table needs, without prefix.
    """
    known, missing = entries(), []
    names = sorted(scale.prefix + name for name in recipes if scale.prefix + name not in known)
    if names:
        missing.append(f"the recipes {', '.join(names)}")
    if not _has_weights(scale.model):
        missing.append(f"the weights of {scale.model} (fetch them with `hf download {scale.model}`, or give a folder "
                       "or a .safetensors file with --model)")
    if not scale.source:
        missing.append("pictures (give a folder or a hub dataset with --source)")
    if scale.lacks:
        missing.append(f"the measurements {', '.join(scale.lacks)}")
    if missing:
        raise UsageError(f"--scale {scale.name} cannot run yet; missing are {'; '.join(missing)}; --scale nano has "
                         "everything it needs")


def _has_weights(model: str) -> bool:
    if model in SHIPPED or Path(model).exists():
        return True
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(model, "model_index.json"), str)
    except ValueError:  # no hub id either
        return False
