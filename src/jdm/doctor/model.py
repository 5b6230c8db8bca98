"""Examines a model for `jdm doctor`: its parts, schedule and tokenizers, and the recipes it can be a teacher of."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode

from jdm import recipes
from jdm.cost.estimate import overwriting
from jdm.cost.known_configs import configured, without_weights
from jdm.errors import UsageError, plural
from jdm.files import ASSETS
from jdm.library import SHIPPED, load_model
from jdm.loading import Loaded
from jdm.methods.declared import Declared
from jdm.methods.refusals import refuse_distilled, refuse_impossible
from jdm.models import hub
from jdm.models.family import Family
from jdm.models.schedulers import complete
from jdm.models.stock import StockModel
from jdm.models.weights import types_of
from jdm.run import Run
from jdm.size import height_width, spelled

PARTS = ("unet", "transformer", "vae", "text_encoder", "scheduler")  # folders by which a damaged model is known
CARD = ("kind", "levels", "control", "method")
SAID = ("beta_schedule", "beta_start", "beta_end", "prediction_type", "shift", "rescale_betas_zero_snr")


@dataclass
class Model:
    """Facts of a model, and what recipes make of it.

    Attributes:
        parts: name, class, parameters, types of numbers on disk.
        facts: what it is, and what training needs to know of it.
        fits: what is to be said of recipes -> their names; "fit" first.
        refused: why training refuses it as a teacher; empty if it does not.
    """

    parts: list[list[str]] = field(default_factory=list)
    facts: list[list[str]] = field(default_factory=list)
    fits: dict[str, list[str]] = field(default_factory=dict)
    refused: str = ""


def is_model(name: str) -> bool:
    """Whether a name stands for a model, rather than for pictures."""
    folder = Path(name)
    if folder.is_dir():
        marks = ("model_index.json", "config.json", *(f"{part}/config.json" for part in PARTS))
        return any((folder / mark).is_file() for mark in marks)
    if name in SHIPPED or name.partition("#")[0].endswith(".safetensors"):
        return True
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or "*" in name or name.endswith(".tar"):
        return False
    try:
        return hub.fetched(name, "model_index.json") is not None
    except UsageError:
        return False


def examined(name: str) -> Model:
    """Loads a model as training loads its teacher; what refuses it is in `refused`."""
    found = Model()
    try:
        model = load_model(name)
    except UsageError as error:
        found.refused = str(error)
        return found
    assert isinstance(model, StockModel)
    found.parts = [_part(name, part, net) for part, net in model.modules().items()]
    found.facts = _facts(model)
    found.fits = dict(sorted(_fits(name, model).items(), key=lambda item: item[0] != "fit"))
    return found


def _part(name: str, part: str, net: Any) -> list[str]:
    folder = (ASSETS / SHIPPED[name][0] if name in SHIPPED else Path(name)) / part
    types = ", ".join(types_of(folder)) if folder.is_dir() else ""
    return [part, type(net).__name__, f"{sum(p.numel() for p in net.parameters()):,}", types]


def _facts(model: StockModel) -> list[list[str]]:
    schedule, card, config = model.schedule, model.card or {}, complete(model.scheduler, model.SCHEDULERS)
    low, high = schedule.reach
    latents = " x ".join(map(str, model.latent_shape(1, model.size)[1:]))
    said = [f"{key} {config[key]}" for key in SAID if config.get(key) not in (None, False)]
    rows = [["family", f"{model.NAME} ({model.PIPELINES[model.controlnet is not None]})"],
            ["pictures", f"{spelled(model.size)} pixels, latents {latents}"],
            ["sides are multiples of", str(model.downscale * model.patch)],
            ["scheduler", ", ".join([config["_class_name"], f"{schedule.n} levels", *said])],
            ["predicts", str(model.prediction)],
            ["log signal to noise", f"{low:.3g} to {high:.3g}"]]
    for (_, tokenizer), title in zip(model.text().networks, model.tokenizers, strict=False):
        rows.append([title, f"{type(tokenizer).__name__}, {len(tokenizer):,} words, prompts of at most "
                            f"{tokenizer.model_max_length} tokens"])
    rows += [[f"{key}, by its card", str(card[key])] for key in CARD if card.get(key)]
    if why := model.distilled:
        rows.append(["as a teacher", f"without guidance: {why}"])
    return rows


# Recipes


def _fits(name: str, model: StockModel) -> dict[str, list[str]]:
    """Whether recipes fit this teacher, in words -> the names of those recipes."""
    found: dict[str, list[str]] = {}
    others: Counter[str] = Counter()
    for entry in recipes.entries().values():
        run = entry.load()()
        if why := _made_for_others(run, model):
            others[why] += 1
        elif (said := _said(run, name, model)) is not None:
            found.setdefault(said, []).append(entry.name)
    return found | {f"made for {why}": [plural(count, "recipe")] for why, count in others.items()}


def _made_for_others(run: Run, model: StockModel) -> str:
    """The kind of models that a recipe is made for, if of another family or size than this one; else empty."""
    own = _family(run.model)
    if own and own != model.NAME:
        return f"{own} models"
    if height_width(run.data.size) != height_width(model.size):
        return f"pictures of {spelled(run.data.size)}"
    return ""


def _said(run: Run, name: str, model: StockModel) -> str | None:
    """"fit", or what stands in the way of a recipe with this teacher; None where it has no teacher."""
    own, run = run.model, replace(run, model=name, device="cpu")
    try:
        needs = run.method.needs(run)
        if "teacher" not in needs.models:
            return None
        if needs.models["teacher"] != name:
            return f"have a teacher of their own, {needs.models['teacher']}"
        for role, other in needs.models.items():
            if role != "teacher" and (why := _missing(other) or _misfit(role, other, run, model)):
                return why
        if isinstance(run.method, Declared):
            declared = run.method.distillation()
            refuse_impossible(declared, model.schedule, run.steps)
            refuse_distilled(_Known(run, model), declared.terms)
    except UsageError as error:
        return f"do not fit: {error}"
    return "fit" if _family(own) else f"fit, and are made for {own}, which is not here"


class _Known(Loaded):
    """A run's needs with a teacher that is loaded already; of further models only shapes are known."""

    def __init__(self, run: Run, teacher: Family):
        super().__init__(run)
        self._teacher = teacher

    def model(self, role: str) -> Family:
        found = self._teacher if role == "teacher" else _shape(self.needs.models[role])
        if found is None:
            raise UsageError(f"the configuration of {self.needs.models[role]} is not here; fetch it first")
        return found


def _missing(name: str) -> str:
    if name in SHIPPED or Path(name).exists():
        return ""
    if name.startswith("runs/"):
        return f"need {name} first: jdm train {Path(name).parent.name}"
    return f"need {name}, which is not here" if hub.unfetched(name) else ""


def _misfit(role: str, name: str, run: Run, model: StockModel) -> str:
    """Why another model of a recipe does not go with this teacher; empty if it does, or if nothing is known of it."""
    other = _shape(name)
    if other is None:
        return ""
    size = run.data.size
    if other.NAME != model.NAME or other.latent_shape(1, size) != model.latent_shape(1, size):
        return f"do not fit: {name} works on other latents than this model"
    student = getattr(run.method, "student", None)
    levels = getattr(run.method, "base_levels", student.levels if student else ())
    why = other.begins(levels, model.schedule) if role == "start" and levels else ""
    return why and f"do not fit: {name} {why}"


@cache
def _family(name: str) -> str:
    """The family of a model; empty if its configuration is not here."""
    try:
        return configured(name)[0].NAME
    except UsageError:
        return ""


@cache
def _shape(name: str) -> StockModel | None:
    """A model without its weights; None if its configuration is not here."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), overwriting():
            return without_weights(name)
    except UsageError:
        return None
