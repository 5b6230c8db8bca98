"""How a cell's model comes to be: given as it is, trained by a recipe, or composed of two others."""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from jdm.errors import UsageError
from jdm.files import ASSETS, alone, read_json, write
from jdm.library import SHIPPED, load_model
from jdm.models.folder import CARD, save_pipeline
from jdm.recipes import recorded
from jdm.reproduce.scales import Scale
from jdm.run import Run, described, without_cache
from jdm.training import checkpoint
from jdm.training.loop import train

COLUMN = "*"  # as Trained.control: the control of the table's column
NEEDS = "needs.json"  # in a run's folder: the weights it was trained from
# Fields that do not decide what is learnt.
APART = ("out", "device", "save_every", "log_every", "probe_every", "checkpointing", "compile", "shard")
# Fields that older runs were trained without, at the value that changes nothing: an old cell keeps its name.
LATER = {"precision": "fp32", "decoder": "", "accumulate": 1, "controlnet_start": "", "student_rank": 0,
         "fake_rank": 0, "states": "float32", "condition_range": [0.02, 0.98], "best": "", "patience": 0}
Watch = Callable[[Run], AbstractContextManager[Callable[[int, dict], None] | None]]


@dataclass(frozen=True)
class Given:
    """A model as it is, by name or folder; the scale's teacher where not named.

    Attributes:
        part: a sub-folder, such as vae. guide: the scale's better teacher, whose guidance is lent.
    """

    name: str = ""
    part: str = ""
    guide: bool = False


@dataclass(frozen=True)
class Trained:
    """What a recipe trains.

    Attributes:
        recipe: without the scale's prefix.
        control: COLUMN, a control by name, or empty.
        needs: (field, model): that model's folder becomes the run's `model`, or else the method's field of that name.
        like: a recipe whose steps and batch this one is given: a table's budget.
    """

    recipe: str
    control: str = COLUMN
    needs: tuple[tuple[str, Spec], ...] = ()
    like: str = ""


@dataclass(frozen=True)
class Composed:
    """One model's UNet with another's ControlNet, in one step where the first takes one."""

    unet: Spec
    controlnet: Spec


Spec = Given | Trained | Composed


@dataclass(frozen=True)
class Setting:
    """What holds for every cell of a sitting.

    Attributes:
        n: pictures per cell. steps: of every training, the recipes' own where not given.
        quick: measurements as in `jdm evaluate --quick`.
        prompts: that text-to-image models are scored on (`metrics.scores.read_prompts`), n of each style; those of the
            scale's pictures where empty.
        known: pages' .json files whose cells are taken where they would be measured again on equal terms.
    """

    scale: Scale
    out: Path = Path("runs/reproduce")
    n: int = 5000
    steps: int | None = None
    device: str = "cpu"
    quick: bool = False
    prompts: str = ""
    known: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model:
    """A spec, settled for one column and seed.

    Attributes:
        name: of its folder in the setting's `out`; of a given model, its own.
        path: what `load_model` takes. run: None of a model that is not trained here.
        needs: by field; `unet` and `controlnet` of a composed one. recipe: without the scale's prefix.
    """

    name: str
    path: str
    run: Run | None = None
    needs: Mapping[str, Model] = field(default_factory=dict)
    recipe: str = ""

    @property
    def seeded(self) -> bool:
        """Another training seed gives another model."""
        return self.run is not None or any(need.seeded for need in self.needs.values())


def settled(spec: Spec, setting: Setting, control: str, seed: int) -> Model:
    """The model of a column's control ("" where it has none) and a seed."""
    scale = setting.scale
    if isinstance(spec, Given):
        name = spec.name or (scale.guide if spec.guide else "") or scale.model
        return Model(name, str(_folders(name)[0] / spec.part) if spec.part else name)
    if isinstance(spec, Trained) and spec.recipe in scale.given:
        return Model(scale.given[spec.recipe], scale.given[spec.recipe])
    if isinstance(spec, Composed):
        parts = {k: settled(getattr(spec, k), setting, control, seed) for k in ("unet", "controlnet")}
        name = "+".join(part.name for part in parts.values())
        return Model(name, str(setting.out / name), needs=parts)
    control = control if spec.control == COLUMN else spec.control
    specs: dict[str, Spec] = {"model": Given(), **dict(spec.needs)}
    needs = {k: settled(need, setting, control, seed) for k, need in specs.items()}
    words = (scale.full_name(spec.recipe), control, f"seed{seed}", f"{setting.steps}steps" if setting.steps else "")
    name = "-".join(word for word in words if word)
    ships = scale.shipped.get((spec.recipe, control)) if seed == 0 else None
    if ships and not (setting.out / name / "run.json").is_file():  # a run of one's own comes first
        return Model(ships, ships)
    return Model(name, str(setting.out / name / "model"), _run(spec, setting, control, seed, needs, name), needs,
                 spec.recipe)


def _run(spec: Trained, setting: Setting, control: str, seed: int, needs: dict[str, Model], name: str) -> Run:
    scale = setting.scale
    run = scale.recipe(scale.full_name(spec.recipe))
    if spec.like:
        model = scale.recipe(scale.full_name(spec.like))
        run = replace(run, steps=model.steps, batch=model.batch, ema=model.ema)
    changes = {k: need.path for k, need in needs.items() if k != "model"} | ({"control": control} if control else {})
    return replace(run, method=replace(run.method, **changes), model=needs["model"].path, seed=seed,
                   out=setting.out / name, steps=setting.steps or run.steps, device=setting.device,
                   data=replace(run.data, source=scale.source))


# What is there


def finished(model: Model) -> bool:
    """Nothing is left to train or to put together.

    Raises:
        UsageError: its folder holds something else.
    """
    if model.run is not None:
        return _holds_this_run(model) and (Path(model.path) / "model_index.json").is_file()
    if not model.needs:
        return True
    card = read_json(Path(model.path) / CARD)
    return all(map(finished, model.needs.values())) and bool(card) and card.get("parts") == _weights_of_needs(model)


def _holds_this_run(model: Model) -> bool:
    run = model.run
    assert run is not None
    if not (run.out / "run.json").is_file():
        return False
    there, wanted = ({k: v for k, v in _flat(essence(r, model.needs)).items()}
                     for r in (recorded(run.out / "run.json"), run))
    other = sorted(k for k in there.keys() | wanted.keys() if there.get(k) != wanted.get(k))
    if other:
        raise UsageError(f"{run.out} holds a run with another {other[0]} ({there.get(other[0])}, not "
                         f"{wanted.get(other[0])}); move it away, or choose another --out")
    before, now = read_json(run.out / NEEDS), {k: weights(m.path) for k, m in model.needs.items() if finished(m)}
    changed = sorted(k for k in now if before.get(k) != now[k])
    if changed and not before:
        raise UsageError(f"{run.out} does not say from which weights it was trained ({NEEDS}: jdm reproduce writes it "
                         "before it trains); move it away to train it again, or choose another --out")
    if changed:
        raise UsageError(f"{run.out} was trained from another {changed[0]} than {model.needs[changed[0]].path} is "
                         "now; move it away to train it again, or choose another --out")
    return True


def essence(run: Run, needs: Mapping[str, Model]) -> dict:
    """What of a run decides its result, as JSON; not the models it starts from."""
    whole = _as_before(without_cache(json.loads(json.dumps(described(run)))))
    kept = {k: v for k, v in whole.items() if k not in (*APART, "model")}
    return kept | {"method": {k: v for k, v in whole["method"].items() if k not in needs}}


def _as_before(value: Any) -> Any:
    """A description without LATER's fields where they change nothing."""
    if not isinstance(value, dict):
        return value
    return {k: _as_before(v) for k, v in value.items() if k not in LATER or v != LATER[k]}


def plan(model: Model) -> dict:
    """How a model comes to be, down to the weights that are given; as JSON."""
    parts = {k: plan(need) for k, need in model.needs.items()}
    if model.run is None:
        return parts or {"given": weights(model.path)}
    return {"run": essence(model.run, model.needs), "needs": parts}


def weights(path: str) -> str:
    """SHA-256 of a model's tensors and levels; of a hub id, the id."""
    files = [Path(path)] if Path(path).is_file() else [
        file for folder in _folders(path) for pattern in ("*.safetensors", "scheduler_config.json")
        for file in sorted(folder.rglob(pattern))]
    if not files:
        if Path(path).is_dir():
            raise UsageError(f"{path} holds no weights (*.safetensors); is it a model's folder?")
        return f"hub id {path}"
    seen = [_sha256(file, (stat := file.stat()).st_mtime_ns, stat.st_size) for file in files]
    return hashlib.sha256("".join(seen).encode()).hexdigest()


@lru_cache(maxsize=4096)
def _sha256(file: Path, changed: int, size: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _folders(name: str) -> list[Path]:
    if name in SHIPPED and not Path(name).is_dir():
        return [ASSETS / part for part in SHIPPED[name] if part]
    return [Path(name)]


# Making it


def make(model: Model, watch: Watch = lambda run: nullcontext()) -> None:
    """Train or compose what is not there, and what it needs, first.

    Args:
        watch: run -> a context that gives what `train` calls after every step.

    Raises:
        UsageError, RunError: as `train`; or its folder holds something else.
    """
    if finished(model):
        return
    for need in model.needs.values():
        make(need, watch)
    if model.run is None:
        _compose(model)
        return
    with _alone(model.run.out):
        if finished(model):  # by another process, while this one waited
            return
        write(model.run.out / NEEDS, json.dumps(_weights_of_needs(model), indent=1) + "\n")
        with watch(model.run) as progress:
            train(model.run, progress)
        shutil.rmtree(model.run.out / "checkpoints", ignore_errors=True)  # many times the model's size


def _compose(model: Model) -> None:
    unet, controlnet = (load_model(model.needs[k].path) for k in ("unet", "controlnet"))
    if controlnet.controlnet is None:
        raise UsageError(f"{model.needs['controlnet'].path} has no ControlNet to compose with")
    control = (controlnet.card or {}).get("control")
    card = {**(unet.card or {}), "method": "composed", "control": control, "parts": _weights_of_needs(model)}
    save_pipeline(unet.with_networks(controlnet=controlnet.controlnet), Path(model.path), card=card)


def _alone(folder: Path) -> AbstractContextManager[None]:
    """Two sittings may need the same model."""
    return alone(folder, lambda: print(f"another process trains {folder}; waiting for it", file=sys.stderr, flush=True))


def _weights_of_needs(model: Model) -> dict[str, str]:
    return {k: weights(need.path) for k, need in model.needs.items()}


# What it costs


def stages(model: Model) -> list[dict[str, Any]]:
    """The trainings behind a model, the teacher's apart: samples, and seconds (median per step times steps).

    Seconds are None where no log says: of shipped models.
    """
    found: dict[str, dict[str, Any]] = {}
    for key, need in model.needs.items():
        if key not in ("model", "guide"):
            found |= {stage["name"]: stage for stage in stages(need)}
    if model.run is not None:
        found[model.name] = _stage(model.name, model.run.steps, model.run.batch, seconds_per_step(model.run.out))
    elif not model.needs and model.path in SHIPPED:
        record = read_json(_folders(model.path)[-1] / "training" / f"{model.path}.json").get("run")
        if record:
            found[model.name] = _stage(model.name, record["steps"], record["batch"], None)
    return list(found.values())


def _stage(name: str, steps: int, batch: int, seconds: float | None) -> dict[str, Any]:
    return {"name": name, "steps": steps, "batch": batch, "samples": steps * batch,
            "seconds": None if seconds is None else seconds * steps}


def seconds_per_step(out: Path) -> float | None:
    """The median in a run's log."""
    seen = [float(row["seconds"]) for row in _logged(out) if "seconds" in row]
    return statistics.median(seen) if seen else None


def _logged(out: Path) -> list[dict]:
    file = out / "metrics.jsonl"
    return [_parsed(line) for line in file.read_text().splitlines()] if file.is_file() else []


def course(model: Model) -> list[dict[str, float]]:
    """What the run measured on validation pictures as it trained; its reward is the mean since the probe before."""
    if model.run is None:
        return []
    found: list[dict[str, float]] = []
    rewards: list[float] = []
    for row in _logged(model.run.out):
        rewards += [row["reward"]] if "reward" in row else []
        if probe := {k.removeprefix("probe/"): v for k, v in row.items() if k.startswith("probe/")}:
            found.append({"step": row["step"], **({"reward": statistics.fmean(rewards)} if rewards else {}), **probe})
            rewards = []
    return found


def to_train(model: Model, setting: Setting) -> dict[str, tuple[Run, int, float | None]]:
    """By name, what is left to train: (run, steps left, seconds left if they can be reckoned)."""
    if finished(model):
        return {}
    found = {k: v for need in model.needs.values() for k, v in to_train(need, setting).items()}
    if model.run is not None:
        place = checkpoint.last(model.run.out)
        left = model.run.steps - (int(place.name.removeprefix("step-")) if place else 0)
        each = _reckoned(model, setting)
        found[model.name] = (model.run, left, None if each is None else each * left)
    return found


def _reckoned(model: Model, setting: Setting) -> float | None:
    """Seconds per step: from this run's own log, else the scale's."""
    assert model.run is not None
    return seconds_per_step(model.run.out) or setting.scale.seconds.get(model.recipe)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, own in value.items() for k, v in _flat(own, f"{name}.{key}" if name else key).items()}


def _parsed(line: str) -> dict:
    try:
        return json.loads(line)
    except ValueError:
        return {}
