"""What a training run is made of: Optimiser, Phase, Task, Data, Run. The loop is in train.py."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_type_hints

from torch import Tensor, nn

from jdm.size import Size


@dataclass(frozen=True)
class Optimiser:
    """AdamW with warm-up, decay and clipping; the learning rate is a pure function of the step.

    Attributes:
        states: of the moments it keeps: in the parameters' own dtype, or in 8 bits (`jdm.training.optimiser`).
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup: int = 100
    decay: Literal["constant", "cosine", "linear"] = "cosine"
    states: Literal["float32", "8bit"] = "float32"

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of `step` in a run of `steps`."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        left = 1 - step / max(1, steps)
        fall = {"constant": 1.0, "linear": left, "cosine": 0.5 + 0.5 * math.cos(math.pi * (1 - left))}
        return self.lr * rise * fall[self.decay]


@dataclass
class Phase:
    """Parameters, how they move, and the one loss that moves them.

    Attributes:
        groups: (parameters, optimiser) pairs; one backward serves all.
        loss: (state of the step, repeat number) -> scalar loss and what to log.
        repeats: updates per step.
        every: steps between updates.
        clip: bound on the norm of the whole gradient, over all groups.
    """

    name: str
    groups: list[tuple[list[nn.Parameter], Optimiser]]
    loss: Callable[[Any, int], tuple[Tensor, dict[str, Any]]]
    repeats: int = 1
    every: int = 1
    clip: float = 1.0

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for parameters, _ in self.groups for p in parameters]


@dataclass
class Product:
    """What a run is for: the networks that are averaged and exported, and how they become a folder.

    Attributes:
        modules: networks by name; averages are kept of each.
        write: (folder, averages) -> writes the trained model for use; `averages` are these modules holding averages.
    """

    modules: dict[str, nn.Module]
    write: Callable[[Path, dict[str, nn.Module]], object]


@dataclass
class Task:
    """What a method asks of the loop.

    Attributes:
        begin: step -> the state its phases share (batch, noise, the generator's sample).
        modules: everything that trains, for the checkpoint; the product's networks among them.
        product: what is averaged and exported.
        probe: averages -> cheap measurements on validation pictures.
        frozen: networks that run and do not train, or hold what does; they are sharded with the others.
    """

    phases: list[Phase]
    begin: Callable[[int], Any]
    modules: dict[str, nn.Module]
    product: Product
    probe: Callable[[dict[str, nn.Module]], dict[str, float]] | None = None
    frozen: Sequence[nn.Module] = ()


@dataclass(frozen=True)
class Needs:
    """What a run reads, apart from how it is wired: `estimate`, `prepare` and `export` ask for this alone.

    Attributes:
        models: role -> model's name, the teacher's first; a role is what the method asks for it by.
        control: the control's name or import path; empty for none.
        reward: the reward's name or import path; empty for none.
        prompts: roles of the models whose text encoders read the prompts.
        pictures: the training pictures, or their captions, are read.
        latents: the teacher's autoencoder encodes every training picture once.
    """

    models: Mapping[str, str] = field(default_factory=dict)
    control: str = ""
    reward: str = ""
    prompts: tuple[str, ...] = ("teacher",)
    pictures: bool = True
    latents: bool = False


class Method(Protocol):
    """A frozen dataclass whose fields are its hyperparameters and whose body is its equation.

    `loaded` is a jdm.loading.Loaded: what `needs` names, read when it is first asked for.
    """

    def needs(self, run: Run) -> Needs:
        """What a run with this method reads."""
        ...

    def product(self, loaded: Any) -> Product:
        """The networks that are exported, built without what only training needs."""
        ...

    def task(self, loaded: Any) -> Task:
        """Phases, batches and networks of training."""
        ...


@dataclass(frozen=True)
class Data:
    """Where pictures come from.

    Attributes:
        source: "fashion-mnist", a folder of pictures with captions, .tar shards of them, or a hub dataset
            id.
        size: side, or height and width, in pixels; a picture is resized to cover it and cut from the centre.
        split, validation: as `datasets` writes them.
        prepared: folder that `jdm prepare` wrote for this split; empty for none. It decides nothing that is learnt.
    """

    source: str = "fashion-mnist"
    size: Size = 32
    split: str = "train"
    validation: str = "validation"
    prepared: str = ""


@dataclass(frozen=True)
class Run:
    """A training run: everything that decides its result.

    Attributes:
        method: what is learnt, with its hyperparameters.
        model: the teacher: a diffusers folder, a .safetensors checkpoint, a hub id, or "nano-sd".
        batch: samples per step, over all processes. accumulate: parts it is computed in, one after the other; the
            sample is drawn again for each phase then. shard: processes that share each network's weights; a divisor of
            their number.
        ema: decay of the exponential moving average of the weights.
        precision: of what networks compute; sums, differences and what trains stay in float32.
        checkpointing: recompute activations in backward in place of keeping them: less memory, a third more time.
        compile: torch.compile for the UNets and ControlNets: minutes before the first step, then faster ones.
        decoder: folder or hub id of a tiny autoencoder of the same latents (AutoencoderTiny, such as TAESD) that
            decodes inside the likelihood or reward in place of the teacher's; empty for the teacher's own.
        save_every, log_every, probe_every: in steps.
        best: of what the probe measures (judge, prompt_agreement, fd, consistency): the averages that were best by it
            are exported; empty for the last ones. patience: probes without a better one that end the run; 0 for none.
    """

    method: Any
    out: Path
    model: str = "nano-sd"
    data: Data = field(default_factory=Data)
    steps: int = 1000
    batch: int = 64
    accumulate: int = 1
    shard: int = 1
    seed: int = 0
    ema: float = 0.999
    device: str = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpointing: bool = False
    decoder: str = ""
    compile: bool = False
    save_every: int = 500
    log_every: int = 20
    probe_every: int = 0
    best: str = ""
    patience: int = 0


def described(value: Any) -> Any:
    """A dataclass as plain JSON, with its type's name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: described(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, (list, tuple)):
        return [described(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def without_cache(description: dict) -> dict:
    """A run's description without the one field of its data that decides nothing: where that is prepared."""
    return description | {"data": {k: v for k, v in description.get("data", {}).items() if k != "prepared"}}


def from_description(value: Any, types: Mapping[str, type]) -> Any:
    """The inverse of `described`: JSON -> dataclass. JSON's lists become tuples, strings Path where one is declared.

    Args:
        types: dataclasses by name. KeyError, TypeError or ValueError where the description does not fit them.
    """
    if isinstance(value, list):
        return tuple(from_description(v, types) for v in value)
    if not isinstance(value, dict) or "type" not in value:
        return value
    if value["type"] not in types:
        raise ValueError(f"{value['type']} is not a known type")
    kind = types[value["type"]]
    hints = get_type_hints(kind)
    fields = {k: from_description(v, types) for k, v in value.items() if k != "type"}
    unknown = sorted(set(fields) - {f.name for f in dataclasses.fields(kind)})
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {unknown[0]}")
    return kind(**{k: Path(v) if hints[k] is Path else v for k, v in fields.items()})
