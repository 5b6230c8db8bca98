"""Diffusers folders: what they say, their networks, and a whole pipeline written at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

from diffusers.utils import logging
from torch import nn
from transformers import CLIPTokenizer

from jdm.errors import UsageError, in_short, plural
from jdm.files import read_json, replaced
from jdm.models import configs, hub
from jdm.models.configs import CARD as CARD
from jdm.models.family import Family
from jdm.models.schedulers import checked_scheduler, scheduler_of
from jdm.models.text import whole_tokenizer
from jdm.models.weights import folder_of, refuse_foreign, refuse_unsound, variant_of

Module = TypeVar("Module", bound=nn.Module)


def save_pipeline(model: Family, folder: Path, scheduler: dict | None = None, card: dict | None = None) -> Path:
    """Write a folder that stock diffusers loads; whole or not at all.

    Args:
        scheduler: a scheduler config in place of the model's own, such as `Family.step_scheduler`'s.
        card: this project's record of the model; kept in jdm.json, which stock diffusers ignores.
    """
    whole: Any = model.pipeline(scheduler_of(scheduler or model.scheduler))
    with replaced(folder) as draft:
        with _without_warnings():  # of parts that the model does without
            whole.save_pretrained(draft)
        for config in draft.rglob("*.json"):
            _forget_place(config)
        if card is not None or model.noted:
            card = {**model.noted, **(card or {})}
            (draft / CARD).write_text(json.dumps(card, indent=1) + "\n")
    return folder


@contextmanager
def _without_warnings() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


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
        raise UsageError(f"{path} is not a model: model_index.json is missing; a diffusers folder has one at its top")
    return index


def folder_json(path: str, name: str, kind: Any = None) -> dict | None:
    """A JSON file of a folder or hub id, checked by `configs.check`; None where there is none.

    Args:
        name: its path in there.
        kind: the network's class, for a config.json.
    """
    file = Path(path) / name if Path(path).is_dir() else hub.fetched(path, name)
    if file is None or not file.exists():
        return None
    return configs.check(read_json(file, remedy=configs.REMEDY), name, str(file), kind)


def folder_scheduler(path: str, index: dict, kinds: tuple[str, ...]) -> dict:
    """The scheduler's config of a folder or hub id, of the class that model_index.json names where it names none.

    Raises:
        UsageError: it is missing, of a class that is not read, or has a value that makes no sense.
    """
    name = "scheduler/scheduler_config.json"
    config = folder_json(path, name)
    if not isinstance(config, dict) or not config:
        what = "is missing" if config is None else "says nothing of the noise levels"
        raise UsageError(f"{path}: {name} {what}; put back the scheduler that the model was trained with")
    named = index.get("scheduler") or [None, None]
    return checked_scheduler({"_class_name": named[1], **config}, f"{path}/{name}", kinds)


def whole_network(kind: type[Module], path: str, subfolder: str = "", also: tuple[str, ...] = ()) -> Module:
    """A network from the .safetensors of its folder, none of its weights left at random.

    Args:
        also: other classes that its config may name, whose weights hold those of this one.

    Raises:
        UsageError: its config does not fit its class, its weights are a pickle, of another class, or not finite.
        ValueError: it cannot be loaded, or lacks weights, of which diffusers and transformers only warn.
    """
    folder_json(path, f"{subfolder}/config.json".lstrip("/"), kind)
    refuse_foreign(Path(path) / subfolder)
    more: dict[str, Any] = {"output_loading_info": True, "use_safetensors": True,
                            "variant": variant_of(folder_of(path, subfolder))}
    try:
        net, info = cast(Any, kind).from_pretrained(path, **({"subfolder": subfolder} if subfolder else {}), **more)
    except Exception as error:  # from a config that its class cannot be made from, or from damaged weights
        said = str(error) if isinstance(error, OSError | ValueError) else in_short(error)
        raise ValueError(f"{subfolder or path}: {said}") from None
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{subfolder or path} lacks {plural(len(missing), 'weight')} of the {kind.__name__}, "
                         f"{missing[0]} first")
    refuse_unsound(net, path, subfolder, also)
    return net


def tokenizer(path: str, subfolder: str) -> CLIPTokenizer:
    """A CLIP tokenizer; UsageError where its files are missing or cannot be read."""
    folder_json(path, f"{subfolder}/tokenizer_config.json")
    return whole_tokenizer(path, subfolder)
