"""Diffusers folders: what they say, their networks, and a whole pipeline written at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar, cast

from diffusers import ControlNetModel
from safetensors import SafetensorError
from torch import nn

from jdm.errors import UsageError
from jdm.files import replaced
from jdm.models import hub
from jdm.models.family import Family
from jdm.models.schedulers import scheduler_of

CARD = "jdm.json"  # what a stock pipeline ignores: method, control, levels, provenance
Module = TypeVar("Module", bound=nn.Module)


def save_pipeline(model: Family, folder: Path, scheduler: dict | None = None, card: dict | None = None) -> Path:
    """Write a folder that stock diffusers loads; whole or not at all.

    Args:
        scheduler: a scheduler config in place of the model's own, such as `Family.step_scheduler`'s.
        card: what this project knows of the model; kept in jdm.json, which stock diffusers ignores.
    """
    whole: Any = model.pipeline(scheduler_of(scheduler or model.scheduler))
    with replaced(folder) as draft:
        whole.save_pretrained(draft)
        for config in draft.rglob("*.json"):
            _forget_place(config)
        if card is not None:
            (draft / CARD).write_text(json.dumps(card, indent=1) + "\n")
    return folder


def _forget_place(config: Path) -> None:
    """Drop where a part was loaded from: a path of the machine that trained it."""
    values = json.loads(config.read_text(encoding="utf-8"))
    if isinstance(values, dict) and values.pop("_name_or_path", None) is not None:
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def model_index(path: str) -> dict:
    """model_index.json of a diffusers folder or hub id.

    Raises:
        UsageError: there is none.
    """
    if Path(path).exists() and not Path(path).is_dir():
        raise UsageError(f"{path} is a file and no .safetensors checkpoint; give a model's folder, or a checkpoint")
    if not Path(path).is_dir() and (path.count("/") != 1 or path.startswith(".")):
        raise UsageError(f"{path}: no such folder; give a diffusers folder, a .safetensors checkpoint, a hub id "
                         "(owner/name), or a shipped one, such as nano-sd or nano-canny")
    index = folder_json(path, "model_index.json")
    if index is None:
        raise UsageError(f"{path} is no model: model_index.json is missing; a diffusers folder has one at its top")
    return index


def folder_json(path: str, name: str) -> dict | None:
    """A JSON file of a folder or hub id, by its path in there; None where there is none."""
    file = Path(path) / name if Path(path).is_dir() else hub.fetched(path, name)
    if file is None or not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{file} is not JSON ({error}); fetch the model again") from None


def lone_controlnet(folder: Path) -> ControlNetModel:
    """A ControlNet from a folder of its own, in float32, frozen.

    Raises:
        UsageError: it is no ControlNet's.
    """
    try:
        return whole_network(ControlNetModel, str(folder)).float().eval().requires_grad_(False)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"{folder} is no ControlNet ({(str(error).splitlines() or [''])[0][:120]})") from None


def whole_network(kind: type[Module], path: str, subfolder: str | None = None) -> Module:
    """A network from its folder, none of its weights left at random; ValueError where some are missing.

    diffusers and transformers only log a warning there.
    """
    loader = cast(Any, kind)
    extra = {} if subfolder is None else {"subfolder": subfolder}
    net, info = loader.from_pretrained(path, output_loading_info=True, **extra)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{len(missing)} weights of the {kind.__name__} are missing, {missing[0]} first")
    return net
