"""Models of a table's cells: given as they are, trained by a recipe, or composed of two others."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from jdm.errors import UsageError
from jdm.files import ASSETS, alone, read_json, sha256_of, write_json
from jdm.library import SHIPPED, load_model
from jdm.models.folder import CARD, save_pipeline
from jdm.recipes import recorded
from jdm.reproduce.results import AGAIN, Stage
from jdm.reproduce.setups import Setup
from jdm.run import Run
from jdm.training import checkpoint
from jdm.training.loop import train
from jdm.training.record import measurements

LOGGED = 5  # logged steps to a probe, where a table follows its runs' course
WATCHED = ("reward", "std_x", "dm_over_ca", "cos_real_fake")  # logged values whose course is kept, beside the probes'
COLUMN = "*"  # as Trained.control: the control of the table's column
NEEDS = "needs.json"  # in a run's folder: the weights it was trained from
# Fields that do not decide what is learnt.
APART = ("out", "device", "save_every", "log_every", "probe_every", "preview_every", "trackers", "checkpointing",
         "compile", "shard")
Watch = Callable[[Run], AbstractContextManager[Callable[[int, dict], None] | None]]


@dataclass(frozen=True)
class Given:
    """The setup's teacher as it is, or its better one, `guide`; `part` is a sub-folder, such as vae."""

    part: str = ""
    guide: bool = False


@dataclass(frozen=True)
class Trained:
    """The model that a recipe trains.

    Attributes:
        recipe: without the scale's prefix.
        control: COLUMN, a control by name, or empty.
        needs: (path, model): the model's folder becomes the field of that dotted path in the method, such as
            "student.start"; "model" is the run's.
        like: a recipe whose steps, batch and averages this one is given: a table's budget.
        settings: (path, value): fields of the method that are changed, by dotted path.
        name: added to the recipe's in the folder's name; needed where there are settings.
    """

    recipe: str
    control: str = COLUMN
    needs: tuple[tuple[str, Spec], ...] = ()
    like: str = ""
    settings: tuple[tuple[str, Any], ...] = ()
    name: str = ""


@dataclass(frozen=True)
class Composed:
    """One model's backbone with another's ControlNet, in one step where the first takes one."""

    backbone: Spec
    controlnet: Spec


Spec = Given | Trained | Composed


@dataclass(frozen=True)
class Model:
    """A spec, settled for one column and seed.

    Attributes:
        name: name of its folder in the setup's `out`, or of a given model. path: argument of `load_model`.
        run: None of a model that is not trained here.
        needs: by the path they are put at; `backbone` and `controlnet` of a composed one.
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


def settled(spec: Spec, setup: Setup, control: str, seed: int) -> Model:
    """The model of a column's control ("" where it has none) and a seed."""
    if isinstance(spec, Given):
        name = (spec.guide and setup.guide) or setup.teacher
        return Model(name, str(_folders(name)[0] / spec.part) if spec.part else name)
    if isinstance(spec, Composed):
        parts = {k: settled(getattr(spec, k), setup, control, seed) for k in ("backbone", "controlnet")}
        name = "+".join(part.name for part in parts.values())
        return Model(name, str(setup.out / name), needs=parts)
    if spec.recipe in setup.untrained:
        return Model(setup.teacher, setup.teacher)
    control = control if spec.control == COLUMN else spec.control
    specs: dict[str, Spec] = {"model": Given(), **dict(spec.needs)}
    needs = {path: settled(need, setup, control, seed) for path, need in specs.items()}
    words = (setup.full_name(spec.recipe), spec.name, control, f"seed{seed}",
             f"{setup.steps}steps" if setup.steps else "")
    name = "-".join(filter(None, words))
    ships = setup.shipped.get((spec.recipe, control)) if seed == 0 and not spec.settings else None
    if ships and not (setup.out / name / "run.json").is_file():  # a run of one's own comes first
        return Model(ships, ships)
    return Model(name, str(setup.out / name / "model"), _run(spec, setup, control, seed, needs, name), needs,
                 spec.recipe)


def _run(spec: Trained, setup: Setup, control: str, seed: int, needs: Mapping[str, Model], name: str) -> Run:
    run = setup.run(spec.recipe)
    budget = setup.run(spec.like) if spec.like else run
    method = replace(run.method, control=control) if control else run.method
    for path, value in (*spec.settings, *((path, need.path) for path, need in needs.items() if path != "model")):
        method = replaced(method, path, value)
    steps = setup.steps or budget.steps
    every = max(1, steps // setup.probes) if setup.probes else run.probe_every
    return replace(run, method=method, model=needs["model"].path, seed=seed, out=setup.out / name, steps=steps,
                   batch=budget.batch, ema=budget.ema, device=setup.device, data=replace(run.data, source=setup.source),
                   probe_every=every, log_every=max(1, every // LOGGED) if setup.probes else run.log_every)


def replaced(settings: Any, path: str, value: Any) -> Any:
    """A dataclass with the field of a dotted path replaced, such as "student.start"."""
    first, _, rest = path.partition(".")
    return replace(settings, **{first: replaced(getattr(settings, first), rest, value) if rest else value})


# What is there


def finished(model: Model) -> bool:
    """Nothing is left to train or to put together.

    Raises:
        UsageError: its folder holds something else.
    """
    if model.run is not None:
        return _holds(model.run, model) and (Path(model.path) / "model_index.json").is_file()
    if not model.needs:
        return True
    return all(map(finished, model.needs.values())) and \
        read_json(Path(model.path) / CARD).get("parts") == _weights_of_needs(model)


def _holds(run: Run, model: Model) -> bool:
    """The folder holds this run, begun or finished, from the weights that are there now."""
    if not (run.out / "run.json").is_file():
        return False
    there, wanted = (essence(each, model) for each in (recorded(run.out / "run.json"), run))
    if other := sorted(k for k in there.keys() | wanted.keys() if there.get(k) != wanted.get(k)):
        values = [found.get(other[0], "its default") for found in (there, wanted)]
        raise UsageError(f"{run.out} holds a run with another {other[0]} ({values[0]}, not {values[1]}); move it away, "
                         "or choose another --out")
    before = read_json(run.out / NEEDS, remedy=AGAIN)
    now = {k: weights(m.path) for k, m in model.needs.items() if finished(m)}
    if changed := sorted(k for k in now if before.get(k) != now[k]):
        said = f"was trained from another {changed[0]} than {model.needs[changed[0]].path} is now" if before else \
            f"does not say from which weights it was trained ({NEEDS}: jdm reproduce writes it before it trains)"
        raise UsageError(f"{run.out} {said}; move it away to train it again, or choose another --out")
    return True


def differing(settings: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of each field that is not at its default, and each dataclass's type under its own name.

    A field that is added later, at a default that changes nothing, leaves what this gives of older settings alone. A
    default that changes does not: results of before would pass for results of now.
    """
    yield name, type(settings).__name__
    for each in dataclasses.fields(settings):
        value = getattr(settings, each.name)
        default = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
        if value != default:
            place = f"{name}.{each.name}" if name else each.name
            yield from differing(value, place) if dataclasses.is_dataclass(value) else [(place, value)]


def essence(run: Run, model: Model) -> dict[str, Any]:
    """The settings of a run that decide its result, by dotted name, as JSON; not the models it starts from."""
    apart = {*APART, "model", *(f"method.{path}" for path in model.needs)}
    run = replace(run, data=replace(run.data, prepared=""))
    return {name: json.loads(json.dumps(value)) for name, value in differing(run) if name not in apart}


def plan(model: Model) -> dict:
    """The plan by which a model is made, down to the weights that are given; as JSON."""
    parts = {k: plan(need) for k, need in model.needs.items()}
    if model.run is None:
        return parts or {"given": weights(model.path)}
    return {"run": essence(model.run, model), "needs": parts}


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
    return sha256_of(file)


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
    out = model.run.out
    with _alone(out):
        if finished(model):  # by another process, while this one waited
            return
        write_json(out / NEEDS, _weights_of_needs(model))
        with watch(model.run) as progress:
            train(model.run, progress)
        shutil.rmtree(out / "checkpoints", ignore_errors=True)  # many times the model's size


def _compose(model: Model) -> None:
    one, other = (load_model(model.needs[k].path) for k in ("backbone", "controlnet"))
    if other.controlnet is None:
        raise UsageError(f"{model.needs['controlnet'].path} has no ControlNet to compose with")
    card = {**(one.card or {}), "method": "composed", "control": (other.card or {}).get("control"),
            "preprocessor": (other.card or {}).get("preprocessor"),
            "parts": _weights_of_needs(model)}
    save_pipeline(one.with_networks(controlnet=other.controlnet), Path(model.path), card=card)


def _alone(folder: Path) -> AbstractContextManager[None]:
    """Two sittings may need the same model."""
    return alone(folder, lambda holder: print(f"{folder} is in use by {holder}; waiting for it", file=sys.stderr,
                                              flush=True))


def _weights_of_needs(model: Model) -> dict[str, str]:
    return {k: weights(need.path) for k, need in model.needs.items()}


# What it costs


def stages(model: Model) -> list[Stage]:
    """The trainings behind a model, the teachers' apart."""
    found = {stage.name: stage for key, need in model.needs.items() if key not in ("model", "guidance.teacher")
             for stage in stages(need)}
    if model.run is not None:
        each = seconds_per_step(model.run.out)
        found[model.name] = Stage(model.name, model.run.steps, model.run.batch,
                                  None if each is None else each * model.run.steps)
    elif not model.needs and model.path in SHIPPED:
        run = read_json(_folders(model.path)[-1] / "training" / f"{model.path}.json").get("run")
        found |= {model.name: Stage(model.name, run["steps"], run["batch"])} if run else {}
    return list(found.values())


def seconds_per_step(out: Path) -> float | None:
    """The median in a run's log."""
    seen = [float(row["seconds"]) for row in measurements(out / "metrics.jsonl") if "seconds" in row]
    return statistics.median(seen) if seen else None


def course(model: Model) -> tuple[dict[str, float], ...]:
    """The run's measurements on validation pictures as it trained.

    Values of training batches, its reward and std(x), are means since the probe before; std(x) has its error.
    """
    found: list[dict[str, float]] = []
    seen: dict[str, list[float]] = {}
    for row in measurements(model.run.out / "metrics.jsonl") if model.run else ():
        for key in WATCHED:
            seen.setdefault(key, []).extend([row[key]] if key in row else [])
        if probe := {k.removeprefix("probe/"): v for k, v in row.items() if k.startswith("probe/")}:
            means = {key: statistics.fmean(values) for key, values in seen.items() if values}
            if len(std := seen["std_x"]) > 1:
                means["std_x_spread"] = statistics.stdev(std) / len(std) ** 0.5
            found.append({"step": row["step"], **means, **probe})
            seen = {}
    return tuple(found)


def growth(course: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """std(x) at the end of a run over that at its start, as `std_growth` with its error; {} where it is not known."""
    known = [at for at in course if at.get("std_x", 0) > 0]
    if len(known) < 2:
        return {}
    first, last = known[0], known[-1]
    ratio = last["std_x"] / first["std_x"]
    errors = [at["std_x_spread"] / at["std_x"] for at in (first, last) if "std_x_spread" in at]
    spread = {"std_growth_spread": ratio * (errors[0] ** 2 + errors[1] ** 2) ** 0.5} if len(errors) == 2 else {}
    return {"std_growth": ratio, **spread}


def to_train(model: Model, setup: Setup) -> dict[str, tuple[Run, int, float | None]]:
    """Trainings that are left, by name: (run, steps left, seconds left if they can be estimated)."""
    if finished(model):
        return {}
    found = {k: v for need in model.needs.values() for k, v in to_train(need, setup).items()}
    if model.run is not None:
        place = checkpoint.last(model.run.out)
        left = model.run.steps - (checkpoint.step_of(place) if place else 0)
        each = seconds_per_step(model.run.out) or setup.seconds.get(model.recipe)
        found[model.name] = (model.run, left, None if each is None else each * left)
    return found
