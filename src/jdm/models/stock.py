"""The base class of families: parts that are read from a diffusers folder, and what follows from them alone."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import diffusers
import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import BatchEncoding

from jdm.errors import UsageError, in_short, plural
from jdm.generator import Generator
from jdm.models.configs import REMEDY
from jdm.models.family import Denoiser, ManySteps
from jdm.models.folder import CARD, folder_json, folder_scheduler, model_index, whole_network
from jdm.models.text import TextEncoder, refuse_foreign_tokenizer
from jdm.models.weights import not_finite
from jdm.schedule import NoiseSchedule
from jdm.score import Prediction, ScoreModel
from jdm.size import Size, height_width, spelled
from jdm.space import Space


@dataclass(frozen=True)
class Part:
    """A part of a folder.

    Attributes:
        kind: its class, for a network.
        classes: the names that model_index.json may give its class.
        read: (folder or hub id, the part's name) -> the network or tokenizer.
        make: config.json -> the network with random weights; None for a tokenizer.
        needed: whether a folder without it is no model.
        null: whether model_index.json may have null in its place.
    """

    classes: tuple[str, ...]
    read: Callable[[str, str], Any]
    make: Callable[[dict], Any] | None = None
    needed: bool = True
    null: bool = False
    kind: Any = None

    @classmethod
    def of(cls, kind: Any, needed: bool = True, null: bool = False, also: tuple[str, ...] = ()) -> Part:
        """A network of a class of diffusers or transformers; `also` are other classes with the same weights."""
        if hasattr(kind, "config_class") and kind.config_class is not None:
            def make(config: dict) -> Any:
                return kind(kind.config_class(**config))
        else:
            make = kind.from_config
        return cls((kind.__name__, *also), lambda path, part: whole_network(kind, path, part, also), make, needed, null,
                   kind)


class StockModel(ABC):
    """A model in a diffusers folder. Families subclass it as frozen dataclasses with a field for each part."""

    NAME: ClassVar[str]
    PARTS: ClassVar[dict[str, Part]]
    # Without and with a ControlNet.
    PIPELINES: ClassVar[tuple[str, str]]
    BACKBONE: ClassVar[str]
    # Keys of its config in which a ControlNet and its backbone must agree.
    SHARED: ClassVar[tuple[str, ...]]
    SCHEDULERS: ClassVar[tuple[str, ...]]
    CONTROL: ClassVar[str] = "control_image"
    lora_targets: ClassVar[tuple[str, ...]]

    vae: AutoencoderKL
    tokenizer: Any
    scheduler: dict
    controlnet: Any
    card: dict | None

    @classmethod
    def load(cls, path: str, controlnet: str | None = None, file: Path | None = None) -> Self:
        """Reads a diffusers folder or hub id; `controlnet` adds a ControlNet from its own folder.

        Args:
            file: a .safetensors with the backbone's weights in another program's layout, read by diffusers in place of
                the folder's.

        Raises:
            UsageError: the folder does not hold a model of this family.
        """
        index = model_index(path)
        parts = {**cls.PARTS, "scheduler": Part(cls.SCHEDULERS, lambda path, name: None)}
        missing = [name for name, part in parts.items() if part.needed and name not in index]
        if missing:
            raise UsageError(f"{path} is not a {cls.NAME} model: it lacks {', '.join(missing)}; its model_index.json "
                             f"must name {'them' if len(missing) > 1 else 'it'}")
        cls._refuse_others(path, index, parts)
        scheduler = folder_scheduler(path, index, cls.SCHEDULERS)
        try:
            read = {"controlnet": cls.PARTS["controlnet"].read(controlnet, "")} if controlnet else {}
            if file:
                read[cls.BACKBONE] = from_file(cls.PARTS[cls.BACKBONE].kind, file, path, cls.BACKBONE)
            read |= {name: part.read(path, name) for name, part in cls.PARTS.items()
                     if name not in read and cls._named(index.get(name))}
            model = cast(Any, cls)(**read, scheduler=scheduler, card=cls._card(path), **cls._more(path, index))
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} could not be loaded as a {cls.NAME} model: "
                             f"{(str(error).splitlines() or [type(error).__name__])[0][:200]}") from None
        model._settle()
        model._refuse_misfits(path)
        return model

    @classmethod
    def made(cls, configs: Mapping[str, Any]) -> Self:
        """Makes a model with random weights, from part -> config.json; its tokenizers map all prompts to zeros.

        Raises:
            UsageError: a config that its class cannot be made from.
        """
        parts: dict[str, Any] = networks(cls.PARTS, configs)
        for name, part in cls.PARTS.items():
            if part.make is None and name.replace("tokenizer", "text_encoder") in parts:
                read = configs[name.replace("tokenizer", "text_encoder")]
                parts[name] = Zeros(read.get("max_position_embeddings", 77))
        model = cast(Any, cls)(**parts, scheduler=configs["scheduler"], card=configs.get("card"),
                    **cls._of_card(configs.get("card") or {}))
        model._settle()
        return model

    def _settle(self) -> None:
        for part in self.modules().values():
            if any(p.is_floating_point() and p.dtype != torch.float32 for p in part.state_dict().values()):
                part.float()
            part.eval().requires_grad_(False)

    @staticmethod
    def _named(entry: Any) -> str | None:
        """The class that model_index.json names for a part; None where it names none."""
        return entry[1] if isinstance(entry, list) and len(entry) == 2 else None

    @classmethod
    def _refuse_others(cls, path: str, index: dict, parts: Mapping[str, Part]) -> None:
        """UsageError where model_index.json names no class for a part, or one that is not this family's."""
        for name, part in parts.items():
            if name not in index or (part.null and index[name] in (None, [None, None])):
                continue
            named = cls._named(index[name])
            if named is None:
                raise UsageError(f"{path}/model_index.json names no class for {name} ({json.dumps(index[name])[:60]}); "
                                 f"put back its own, one of {', '.join(part.classes)}")
            if named not in part.classes:
                raise UsageError(f"{path}/model_index.json: {name} is a {named}; a {cls.NAME} model has "
                                 f"{' or '.join(part.classes)}")

    def _refuse_misfits(self, path: str) -> None:
        """UsageError where the parts were made for different models: their shapes, levels or words would be wrong."""
        try:
            n = self.schedule.n
        except Exception as error:  # diffusers' own checks raise several
            raise UsageError(f"{path}/scheduler/scheduler_config.json gives no noise levels ({in_short(error)}); "
                             f"{REMEDY}") from None
        if max(levels := self.levels or (0,)) >= n:
            raise UsageError(f"{path}/{CARD}: levels: must be below {n}, the scheduler's, got {max(levels)}; {REMEDY}")
        self._refuse_widths(path)
        taken, latents = self.channels, self.vae.config["latent_channels"]
        if taken != latents:
            raise UsageError(f"{path}: the {self.NETWORK} takes {plural(taken, 'channel')}, its autoencoder writes "
                             f"latents of {latents}; put back its own autoencoder ({self.NETWORK}s for inpainting and "
                             "editing cannot be teachers)")
        self._refuse_tokenizers(path)
        if (self.card or {}).get("kind") == "one-step" and not self.levels:
            raise UsageError(f"{path}: its {CARD} says one-step and names no levels; add \"levels\": "
                             f"[{n - 1}] there")

    NETWORK: ClassVar[str]  # the backbone, in a sentence

    @abstractmethod
    def _refuse_widths(self, path: str) -> None:
        """UsageError where the backbone does not read what the text encoders write."""
        ...

    def _refuse_tokenizers(self, path: str) -> None:
        for network, own in self.text().networks:
            refuse_foreign_tokenizer(own, cast(Any, network).config, path)

    @classmethod
    def _card(cls, path: str) -> dict | None:
        return folder_json(path, CARD)

    @classmethod
    def _more(cls, path: str, index: dict) -> dict[str, Any]:
        """Further fields that its folder decides."""
        return cls._of_card(cls._card(path) or {})

    @classmethod
    def _of_card(cls, card: dict) -> dict[str, Any]:
        """Further fields that its jdm.json decides."""
        return {}

    def modules(self) -> dict[str, nn.Module]:
        found = {name: getattr(self, name) for name, part in self.PARTS.items() if part.make is not None}
        return {name: network for name, network in found.items() if network is not None}

    @property
    def tokenizers(self) -> dict[str, Any]:
        """Every tokenizer, by its name in the folder; None for one that is not there."""
        return {name: getattr(self, name) for name, part in self.PARTS.items() if part.make is None}

    def to(self, device: torch.device | str, texts: bool = True) -> Self:
        for name, part in self.modules().items():
            if texts or not name.startswith("text_encoder"):
                part.to(device)
        return self

    @property
    def backbone(self) -> Any:
        return getattr(self, self.BACKBONE)

    @property
    def channels(self) -> int:
        """Channels of the latents that the backbone takes."""
        return self.backbone.config["in_channels"]

    @property
    @abstractmethod
    def schedule(self) -> NoiseSchedule:
        ...

    @property
    @abstractmethod
    def prediction(self) -> Prediction:
        ...

    @abstractmethod
    def text(self, one_by_one: bool = False) -> TextEncoder:
        ...

    @abstractmethod
    def denoiser(self, backbone: nn.Module | None = None, controlnet: nn.Module | None = None,
                 adapters: Sequence[Any] = (), also: Sequence[nn.Module] = ()) -> Denoiser:
        ...

    @property
    def levels(self) -> tuple[int, ...] | None:
        """The level indices that a student of this project runs at; None for a multi-step model."""
        levels = (self.card or {}).get("levels")
        return None if levels is None else tuple(levels)

    @property
    def noted(self) -> dict[str, Any]:
        return {}

    @property
    def distilled(self) -> str:
        if not self.levels:
            return ""
        return f"it is a student of {len(self.levels)} step{'s' * (len(self.levels) > 1)}"

    def begins(self, levels: Sequence[int], schedule: NoiseSchedule) -> str:
        if self.levels is None:
            return ("is not a one-step generator; name one, such as nano-canny, or train one first: jdm train "
                    "nano-diff-instruct")
        if self.levels != tuple(levels):
            return (f"runs at levels {list(self.levels)}, asked for {list(levels)}; use --levels "
                    f"{' '.join(map(str, self.levels))}")
        return ""

    @property
    def space(self) -> Space:
        return Space(self.vae)

    @property
    def downscale(self) -> int:
        """Pixels per latent, along one side."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    @property
    def patch(self) -> int:
        """Latents per token along one side."""
        return 1

    def latent_shape(self, n: int, size: Size) -> tuple[int, int, int, int]:
        (height, width), multiple = height_width(size), self.downscale * self.patch
        if min(height, width) < 1 or height % multiple or width % multiple:
            raise UsageError(f"both sides of a picture must be multiples of {multiple}, got {spelled(size)}")
        return n, self.channels, height // self.downscale, width // self.downscale

    def score_of(self, text: TextEncoder, net: Denoiser, guidance: float = 1.0) -> ScoreModel[Denoiser]:
        return ScoreModel(net, self.schedule, self.prediction, text, guidance)

    def generator(self, text: TextEncoder, net: Denoiser, levels: Sequence[int] | None = None) -> Generator:
        own = self.levels or (self.schedule.n - 1,)
        return Generator(net, self.schedule, own if levels is None else levels, text, self.prediction)

    def pipeline(self, scheduler: Any) -> diffusers.DiffusionPipeline:
        """The stock pipeline of these parts."""
        kind = getattr(diffusers, self.PIPELINES[self.controlnet is not None])
        return kind(**self.modules(), **self.tokenizers, scheduler=scheduler, **self._of_pipeline())

    def _of_pipeline(self) -> dict[str, Any]:
        """Further arguments of its stock pipeline."""
        return {}

    @staticmethod
    @abstractmethod
    def asked(levels: Sequence[int] | None, guidance: float, n: int, controlled: bool = False,
              size: Size | None = None) -> dict[str, Any]:
        ...

    @property
    @abstractmethod
    def size(self) -> Size:
        ...

    @abstractmethod
    def at(self, size: Size) -> Self:
        ...

    @abstractmethod
    def new_controlnet(self, backbone: nn.Module | None = None) -> nn.Module:
        ...

    @abstractmethod
    def step_scheduler(self, levels: Sequence[int]) -> dict:
        ...

    @abstractmethod
    def many_steps(self, steps: int) -> ManySteps:
        ...

    @property
    def clip(self) -> float:
        return math.inf

    def with_networks(self, **networks: nn.Module | None) -> Self:
        """With another `backbone` or `controlnet`; controlnet=None drops the model's own."""
        return self.with_parts(**{self.BACKBONE if name == "backbone" else name: net for name, net in networks.items()})

    def with_parts(self, **parts: Any) -> Self:
        return replace(cast(Any, self), **parts)


def from_file(kind: Any, file: Path, path: str, part: str) -> nn.Module:
    """A network from a file in another program's layout, by the config of a part of a folder.

    Raises:
        UsageError: diffusers cannot read it so, or a weight is missing or not finite.
    """
    folder_json(path, f"{part}/config.json", kind)
    try:
        net = kind.from_single_file(str(file), config=path, subfolder=part, local_files_only=True)
    except Exception as error:  # diffusers raises several
        raise UsageError(f"{file} could not be read as the {part} of {path} ({in_short(error)}); give the file of a "
                         f"model of that family and size, or its diffusers folder") from None
    lacking = next((name for name, value in net.state_dict().items() if value.is_meta), "")
    if bad := lacking or not_finite(net):
        raise UsageError(f"{file}: {bad} is {'missing' if lacking else 'not finite (NaN or infinity)'}; fetch the file "
                         "again")
    return net


def networks(parts: Mapping[str, Part], configs: Mapping[str, Any]) -> dict[str, Any]:
    """Networks with random weights by part, for each part that has a config.json in `configs`.

    Raises:
        UsageError: a config that its class cannot be made from.
    """
    made: dict[str, Any] = {}
    for name, part in parts.items():
        if part.make is not None and configs.get(name):
            try:
                made[name] = part.make(dict(configs[name]))
            except Exception as error:  # diffusers and transformers raise several
                raise UsageError(f"{name}/config.json: no network can be made of it ({in_short(error)}); {REMEDY}"
                                 ) from None
    return made


class Zeros:
    """A tokenizer without a vocabulary: every prompt becomes `length` zeros."""

    def __init__(self, length: int):
        self.model_max_length = length

    def __call__(self, prompts: Sequence[str], max_length: int | None = None, **_: Any) -> BatchEncoding:
        ids = torch.zeros(len(prompts), min(max_length or self.model_max_length, self.model_max_length),
                          dtype=torch.long)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def apply_chat_template(self, messages: Sequence[dict[str, str]], **_: Any) -> str:
        return messages[-1]["content"]
