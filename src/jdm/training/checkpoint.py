"""Checkpoints: every tensor and counter needed to resume a run exactly, in safetensors and JSON, written atomically.

    OUT/checkpoints/step-0000500/   state.safetensors  state.json

Several processes write their shards with torch.distributed.checkpoint instead of state.safetensors. Any number of
processes can read either kind.

A checkpoint is written under a temporary name, flushed to disk and renamed, so that a folder named step-* was complete
once. state.json holds the SHA-256 of every file, its own included, so that later damage is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Annotated, TypedDict

import msgspec
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from jdm.errors import RunError, UsageError, in_short, remedy
from jdm.files import read_json, sha256_of, umasked
from jdm.training import distributed, sharded

KEPT, WHOLE, INFO = 2, "state.safetensors", "state.json"
UNSIGNED = {"step", "optimizers"}  # all that state.json held before it had hashes
DELETE = "delete it and run again to resume from the checkpoint before it"


class Slots(TypedDict):
    """An optimiser's entry in state.json: its parameter groups, and the names of each parameter's states."""

    groups: int
    slots: list[str]


class Info(TypedDict):
    """The part of state.json that is read; the file also holds the state's counters."""

    step: Annotated[int, msgspec.Meta(ge=0)]
    optimizers: dict[str, Slots]


@dataclass
class State:
    """The state that a run carries from step to step.

    Attributes:
        modules: trained modules by name; `trained` selects the tensors to save.
        optimizers: optimisers by phase name.
        averages: exponential moving averages by module name, then by tensor name as in `trained`.
        counters: numbers and strings, as JSON.
    """

    modules: Mapping[str, nn.Module]
    optimizers: Mapping[str, Optimizer]
    averages: Mapping[str, dict[str, Tensor]]
    counters: dict


def trained(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module that training changes, by name: parameters with gradients, and buffers. Not copied."""
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    return {name: value for name, value in module.state_dict().items() if name not in frozen}


def refuse_not_finite(state: State, out: Path, step: int) -> None:
    """RunError where a weight or an average is not finite, in any process; the checkpoint before stays the last."""
    networks = {**state.modules, **{f"{name}'s average": held for name, held in state.averages.items()}}
    bad = next((name for name, held in networks.items() if not _finite(held)), "")
    if distributed.agreed(bool(bad)):
        raise RunError(f"the weights{f' of {bad}' if bad else ''} are not finite (NaN or infinity) after step {step}; "
                       f"last good checkpoint: {last(out) or 'none yet'}; lower the learning rates or raise their "
                       "warm-up, and run again")


def _finite(held: nn.Module | Mapping[str, Tensor]) -> bool:
    """Whether every number that training changes is finite, in this process's part of it."""
    tensors = (trained(held) if isinstance(held, nn.Module) else held).values()
    return all(bool(distributed.local(t.detach()).isfinite().all()) for t in tensors if t.is_floating_point())


def name_of(step: int) -> str:
    return f"step-{step:07d}"


def step_of(place: Path) -> int:
    return int(place.name.removeprefix("step-"))


def save(state: State, out: Path, step: int) -> Path:
    """Writes OUT/checkpoints/step-NNNNNNN and deletes all but the last KEPT checkpoints.

    Raises:
        RunError: the disk is full or cannot be written; earlier checkpoints are intact.
    """
    folder = out / "checkpoints"
    place, draft = folder / name_of(step), folder / f".draft-{step:07d}"
    try:
        if distributed.first():
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        if distributed.size() > 1:
            distributed.barrier()
            dcp.save(_tensors(state), checkpoint_id=draft)
        else:
            save_file(_apart(_tensors(state)), draft / WHOLE)
        if distributed.first():
            _seal(draft, {"step": step, **state.counters, **_scalars(state)})
            umasked(draft)
            shutil.rmtree(place, ignore_errors=True)
            draft.rename(place)
            _flush(folder)
        distributed.barrier()
    except (OSError, SafetensorError, dcp.CheckpointException) as error:
        raise RunError(f"checkpoint of step {step} could not be written ({_cause(error)}); {remedy(error)} and run the "
                       f"same command again to resume from {last(out) or 'the start'}") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    for old in all_checkpoints(out)[:-KEPT] if distributed.first() else ():
        shutil.rmtree(old, ignore_errors=True)
    return place


def _seal(draft: Path, info: dict) -> None:
    """Flushes a checkpoint's files to disk and writes state.json, with the SHA-256 of each of them."""
    files = sorted(draft.iterdir())
    with ThreadPoolExecutor() as hashing:  # while the disk writes
        hashes = hashing.map(sha256_of, files)
        for file in files:
            _flush(file)
        info["sha256"] = {file.name: digest for file, digest in zip(files, hashes, strict=True)}
    info["sha256"][INFO] = _digest(info)
    (draft / INFO).write_text(json.dumps(info), encoding="utf-8")
    _flush(draft / INFO)


def newest_whole(out: Path, aside: bool = False) -> Path | None:
    """A run's newest checkpoint whose files are as they were written; None if it has no checkpoint.

    Args:
        aside: the run goes on from it, which is printed; damaged ones are renamed to checkpoints/damaged-*, so that
            they are kept and not read again.

    Raises:
        UsageError: all are damaged.
    """
    found = sorted((out / "checkpoints").glob("step-*"), reverse=True)
    damages = []
    for place in found:
        if not (damage := damage_of(place)):
            if aside and not damages:
                print(f"going on from {place}", file=sys.stderr, flush=True)
            for damaged, what in damages if aside else ():
                kept = _unused(damaged.with_name(damaged.name.replace("step", "damaged")))
                damaged.rename(kept)
                print(f"{damaged} is damaged ({what}); going on from {place}, and keeping it as {kept.name}",
                      file=sys.stderr, flush=True)
            return place
        damages.append((place, damage))
    if damages:
        raise UsageError(f"{damages[0][0]} is damaged ({damages[0][1]}), and no checkpoint before it is whole; delete "
                         "it to begin again, or choose another --out")
    return None


def damage_of(place: Path) -> str:
    """Describes what is wrong with a checkpoint's files, in a few words; empty if they are as they were written."""
    try:
        info = json.loads((place / INFO).read_text(encoding="utf-8")) if (place / INFO).is_file() else None
        if not isinstance(info, dict) or not isinstance(info.get("step"), int):
            return f"{INFO} {'is missing' if info is None else 'has no step'}"
        known = info.get("sha256")
        if known is None and set(info) <= UNSIGNED:
            return ""
        if not isinstance(known, dict) or known.pop(INFO, None) != _digest(info):
            return f"{INFO} was changed after it was written"
        for name in known:
            if not (place / name).is_file():
                return f"{name} is missing"
        with ThreadPoolExecutor() as hashing:
            found = dict(zip(known, hashing.map(lambda name: sha256_of(place / name), known), strict=True))
        changed = [name for name in known if known[name] != found[name]]
        return f"{changed[0]} was changed after it was written" if changed else ""
    except (OSError, ValueError, RecursionError) as error:
        return in_short(error)


def load(state: State, place: Path, alone: bool = False) -> dict:
    """Loads a checkpoint into `state` and returns its JSON; `damage_of` is for the caller to ask.

    Args:
        alone: True if only this process reads it.

    Raises:
        UsageError: the checkpoint belongs to another recipe (names or shapes differ), or is damaged.
    """
    try:
        info = read_json(place / "state.json", Info, DELETE, needed=True)
        tensors = load_file(place / WHOLE) if (place / WHOLE).is_file() else _gathered(state, place, alone)
    except (OSError, ValueError, SafetensorError, dcp.CheckpointException) as error:
        raise UsageError(f"{place} is damaged ({_cause(error)}); {DELETE}") from None
    if name_of(info["step"]) != place.name or not state.optimizers.keys() <= info["optimizers"].keys():
        raise UsageError(f"{place / 'state.json'}: step {info['step']} and optimisers "
                         f"{', '.join(info['optimizers']) or 'none'} are not this folder's; {DELETE}")
    for group, held in _held(state).items():
        _copy(held, _under(tensors, f"{group}."), place, group.partition(".")[2])
    for name, optimizer in state.optimizers.items():
        _load_optimizer(optimizer, _under(tensors, f"optimizer.{name}."), info["optimizers"][name])
    if "rng.torch" in tensors:
        torch.set_rng_state(tensors["rng.torch"])
    return info


def _cause(error: BaseException) -> str:
    """The error in one line; if several processes failed, that of the first, whose traceback comes as text."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        process, (first, *_) = next(iter(error.failures.items()))
        return f"process {process}: {in_short(first)}"  # type: ignore[arg-type]
    return in_short(error)  # type: ignore[arg-type]


def all_checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(p for p in (out / "checkpoints").glob("step-*") if (p / "state.json").is_file())


def last(out: Path) -> Path | None:
    found = all_checkpoints(out)
    return found[-1] if found else None


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU, contiguous, copied where two share memory, which safetensors refuses."""
    found, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return found


def _digest(info: dict) -> str:
    """SHA-256 of state.json's values, without this digest itself."""
    return hashlib.sha256(json.dumps(info, sort_keys=True).encode()).hexdigest()


def _unused(path: Path) -> Path:
    """The path, or the first of path-2, path-3, ... that does not exist."""
    others = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return next(found for found in chain([path], others) if not found.exists())


def _tensors(state: State) -> dict[str, Tensor]:
    tensors = {"rng.torch": torch.get_rng_state()}
    for group, held in _held(state).items():
        tensors |= {f"{group}.{k}": v for k, v in held.items()}
    for name, optimizer in state.optimizers.items():
        for i, slots in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{name}.{i}.{k}": torch.as_tensor(v) for k, v in slots.items()}
    return {k: v.detach() for k, v in tensors.items()}


def _held(state: State) -> dict[str, dict[str, Tensor]]:
    """Tensors of networks and averages, by group; the group is the prefix of their names in the file."""
    return {**{f"module.{name}": trained(module) for name, module in state.modules.items()},
            **{f"average.{name}": average for name, average in state.averages.items()}}


def _gathered(state: State, place: Path, alone: bool) -> dict[str, Tensor]:
    """Reads a checkpoint of several processes, sharded like this run's tensors."""
    likes = {f"{group}.{k}": v for group, held in _held(state).items() for k, v in held.items()}
    for name, optimizer in state.optimizers.items():
        likes |= {f"optimizer.{name}.{i}": p for i, p in enumerate(_parameters(optimizer))}
    tensors = {}
    reader = sharded.Reader(place)
    for key, known in reader.read_metadata().state_dict_metadata.items():
        like = likes.get(key, likes.get(key.rpartition(".")[0]))  # an optimiser's slot is sharded like its parameter
        if isinstance(known, TensorStorageMetadata) and (like is not None or key == "rng.torch"):
            empty = torch.zeros(known.size, dtype=known.properties.dtype)
            tensors[key] = empty if like is None or not empty.ndim else distributed.placed_like(empty, like)
    dcp.load(tensors, storage_reader=reader, no_dist=alone or distributed.size() == 1)
    return tensors


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _scalars(state: State) -> dict:
    return {"optimizers": {n: {"groups": len(o.param_groups), "slots": sorted(
        {k for s in o.state_dict()["state"].values() for k in s})} for n, o in state.optimizers.items()}}


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix):]: v for k, v in tensors.items() if k.startswith(prefix)}


@torch.no_grad()
def _copy(own: dict[str, Tensor], tensors: dict[str, Tensor], place: Path, name: str) -> None:
    wrong = sorted(set(own) ^ set(tensors)) or [k for k in own if own[k].shape != tensors[k].shape]
    if wrong:
        raise UsageError(f"{place} belongs to another recipe: {name}.{wrong[0]} does not fit; resume with the "
                         "recipe in its run.json, or choose another --out")
    for key, tensor in tensors.items():
        distributed.local(own[key]).copy_(distributed.local(distributed.placed_like(tensor, own[key])))


def _load_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor], info: dict) -> None:
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        i, slot = key.split(".", 1)
        slots.setdefault(int(i), {})[slot] = value
    parameters = _parameters(optimizer)
    for i, values in slots.items():
        for slot, value in values.items():
            if value.ndim and not isinstance(value, DTensor):
                values[slot] = distributed.placed_like(value, parameters[i])
    own = optimizer.state_dict()
    if info["groups"] != len(own["param_groups"]):
        raise UsageError("the checkpoint belongs to another recipe: its optimiser has other parameter groups; resume "
                         "with the recipe in its run.json, or choose another --out")
    optimizer.load_state_dict({"state": slots, "param_groups": own["param_groups"]})


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
