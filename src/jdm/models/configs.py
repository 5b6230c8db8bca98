"""Types of the JSON files in a model's folder, beside what diffusers' classes declare for their own configs."""

from __future__ import annotations

import inspect
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Optional, Required, TypedDict, Union, get_args, get_origin

import diffusers
from msgspec import Meta
from transformers import CLIPTextConfig

from jdm.errors import UsageError
from jdm.files import fitted
from jdm.trust import note_data

CARD = "jdm.json"  # what a stock pipeline ignores: method, control, levels, provenance
REMEDY = "put back the original or fetch the model again"
PARTS: dict[str, Any] = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL,
                         "controlnet": diffusers.ControlNetModel, "text_encoder": CLIPTextConfig,
                         "text_encoder_2": CLIPTextConfig}
Whole = Annotated[int, Meta(ge=-1, le=2**24)]
Layer = Annotated[int, Meta(ge=0, le=256)]  # each is made, before any weight is read
Layers = Layer | list[Layer | list[Layer]]
Side = Annotated[int, Meta(ge=1, le=2**14)]
Real = Annotated[float, Meta(ge=-1e9, le=1e9)]
Unit = Annotated[float, Meta(ge=0, le=1)]
Component = tuple[str | None, str | None] | None
Attention = Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] | None
NULL = ("joint_attention_dim",)  # of ControlNets that read no text, whatever their class declares
NAMES = {"_class_name": str | None, "architectures": list[str] | None}  # of a network's class, in a config.json
SIMPLE = {int: Whole, float: Real, bool: bool, str: str}


Colour = Annotated[str, Meta(pattern="^#[0-9a-fA-F]{6}$")]
Prompt = Annotated[str, Meta(min_length=1, max_length=1000)]


class Page(TypedDict, total=False):
    """The entries of jdm.json for the drawing page; docs/app.md explains each."""

    paper: Colour
    ink: Colour
    styles: dict[Annotated[str, Meta(min_length=1, max_length=40)], Annotated[Prompt, Meta(pattern=r"\{prompt\}")]]
    prompts: Annotated[list[Prompt], Meta(max_length=1000)]


class Card(TypedDict, total=False):
    """jdm.json; one without `preprocessor` was written by version 0.1.0."""

    kind: str
    method: str | None
    control: str | None
    preprocessor: dict[str, Any] | None
    levels: list[Annotated[int, Meta(ge=0, le=2**24)]] | None
    t_init: Annotated[int, Meta(ge=0, le=2**24)]
    guidance: Annotated[float, Meta(ge=0, le=1000)]
    size: Annotated[list[Side], Meta(min_length=2, max_length=2)]
    max_sequence_length: Annotated[int, Meta(ge=1, le=512)]
    page: Page


class Index(TypedDict, total=False):
    """model_index.json."""

    _class_name: Required[str]
    unet: Component
    vae: Component
    text_encoder: Component
    text_encoder_2: Component
    text_encoder_3: Component
    tokenizer: Component
    tokenizer_2: Component
    tokenizer_3: Component
    transformer: Component
    scheduler: Component
    controlnet: Component
    force_zeros_for_empty_prompt: bool


class Scheduler(TypedDict, total=False):
    """scheduler_config.json, of any class."""

    _class_name: str
    num_train_timesteps: Annotated[int, Meta(ge=1, le=100_000)]
    beta_start: Unit
    beta_end: Unit
    beta_schedule: str
    trained_betas: Annotated[list[Unit], Meta(min_length=1, max_length=100_000)] | None
    prediction_type: str
    rescale_betas_zero_snr: bool
    shift: Real
    use_dynamic_shifting: bool
    stochastic_sampling: bool
    clip_sample: bool
    set_alpha_to_one: bool
    timestep_spacing: str
    steps_offset: Annotated[int, Meta(ge=0, le=100_000)]


class Tokenizer(TypedDict, total=False):
    """tokenizer_config.json; a model_max_length of 10^30 stands for none."""

    model_max_length: Annotated[float, Meta(ge=1)] | None


class VAE(TypedDict, total=False):
    """The part of an autoencoder's config that is read; stock pipelines of these families ignore what is None."""

    scaling_factor: Annotated[float, Meta(gt=0, le=1e9)]
    latents_mean: None
    latents_std: None


class UNet(TypedDict, total=False):
    """The part of a UNet's config that is read, beside what its class checks."""

    sample_size: Required[Side | Annotated[list[Side], Meta(min_length=2, max_length=2)]]


SCHEMAS = {CARD: Card, "model_index.json": Index, "scheduler_config.json": Scheduler,
           "tokenizer_config.json": Tokenizer}


def check(found: Any, name: str, where: str, kind: Any = None) -> dict:
    """The JSON object of a file, checked by its schema; a card in the words of this version.

    Args:
        name: the file's path in the model's folder, such as unet/config.json.
        kind: the class that a config.json is for; by default that of its folder's name.

    Raises:
        UsageError: a value has another type or is out of range; the message has the file and the key.
    """
    file = Path(name)
    fitted(found, SCHEMAS.get(file.name, dict), where, REMEDY)
    if file.name == CARD:
        note_data(found, where)
        _update(found)
    kind = (kind or PARTS.get(file.parent.name)) if file.name == "config.json" else None
    fitted(found, {diffusers.UNet2DConditionModel: UNet, diffusers.AutoencoderKL: VAE}.get(kind, dict), where, REMEDY)
    for key, hint in NAMES.items() if kind else ():
        if key in found:
            fitted(found[key], hint, where, REMEDY, key)
    for key, hint in _fields(kind).items() if kind else ():
        if key in found:
            fitted(found[key], hint, where, REMEDY, key)
    for key in found if kind else ():
        if key == "quantization_config" and found[key] is not None:
            raise UsageError(f"{where}: {key}: quantised networks are not read; give the model before quantisation")
        if "attn_implementation" in key:  # transformers fetches code for other names
            fitted(found[key], Attention, where, REMEDY, key)
    return found


def _update(card: dict) -> None:
    """Puts a card of 0.1.0 in this version's words: its t_init is `levels`, its canny that of the grey picture."""
    if "t_init" in card:
        card.setdefault("levels", [card.pop("t_init")])
    if card.get("control") == "canny" and "preprocessor" not in card:
        card["control"] = "canny-grey"


@cache
def _fields(kind: Any) -> dict[str, Any]:
    """The types that a network's class declares for its config, by key."""
    of = inspect.signature((getattr(kind, "config_class", None) or kind).__init__).parameters.values()
    declared = [p for p in of if p.annotation is not p.empty and not isinstance(p.annotation, str)]
    found = {p.name: Layers | None if "layers" in p.name or p.name.endswith("coder_blocks") else _type(p.annotation)
             for p in declared}
    return found | {name: Optional[Whole] for name in NULL if name in found}  # noqa: UP045


def _type(hint: Any) -> Any:
    """A declared type as JSON spells it: tuples of any length, null where it is declared or for a flag."""
    if get_origin(hint) in (Union, UnionType):
        options = dict.fromkeys(_type(option) for option in get_args(hint))
        return Any if Any in options else Union[tuple(options)]  # noqa: UP007
    if hint is tuple or get_origin(hint) in (tuple, list):
        return Annotated[list[_type((*get_args(hint), Any)[0])], Meta(max_length=64)]
    if hint is bool:
        return bool | None
    return hint if hint is NoneType else SIMPLE.get(hint, Any)
