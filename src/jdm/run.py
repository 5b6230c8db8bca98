"""The parts of a training run: Optimiser, Phase, Task, Data, Run. The loop is in training/loop.py."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, Required, TypedDict

from torch import Tensor, nn

from jdm.ranges import Count, Decay, NotNegative, Positive, Seed, Share, Whole, refuse_outside
from jdm.size import Size


@dataclass(frozen=True)
class Optimiser:
    """AdamW with warm-up and decay; the learning rate is a pure function of the step.

    Attributes:
        lr: Base learning rate, above 0; the warm-up and the decay scale it down.
        betas: Decay rates of Adam's first and second moments, each in [0, 1). With a first of 0, no first moment is
            stored.
        weight_decay: AdamW's decoupled weight decay, at least 0; a step shrinks weights by lr times this.
        warmup: Steps over which the learning rate rises linearly from 0; 0 starts at the full rate.
        decay: How the learning rate falls to 0 over the run: along a cosine, along a line, or (constant) not at all.
        states: How the moments are stored: in the parameters' own dtype (float32), or in 8 bits to save memory.
    """

    lr: Positive
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    weight_decay: NotNegative = 0.0
    warmup: Whole = 100
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
    """Parameters, their optimisers, and the one loss that trains them.

    Attributes:
        groups: (parameters, optimiser) pairs; one backward serves all.
        loss: (state of the step, repeat number) -> scalar loss and what to log; of an accumulated batch, called for
            each of its parts.
        asks_batch: whether the loss needs means over the whole batch (`sharing.batch_mean`); the parts of an
            accumulated batch are then computed twice.
        after: called once after each update: (mean of the parts' logs) -> further values to log.
        repeats: updates per step.
        every: steps between updates.
        clip: bound on the norm of the whole gradient, over all groups.
        start: the first step of the run in which it trains.
    """

    name: str
    groups: list[tuple[list[nn.Parameter], Optimiser]]
    loss: Callable[[Any, int], tuple[Tensor, dict[str, Any]]]
    repeats: int = 1
    every: int = 1
    clip: float = 1.0
    asks_batch: bool = False
    after: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    start: int = 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for parameters, _ in self.groups for p in parameters]


@dataclass
class Product:
    """The result of a run: the networks that are averaged and exported, and how they become a folder.

    Attributes:
        modules: networks by name; averages are kept of each.
        write: (folder, averages) -> writes the trained model for use; `averages` are these modules holding averages.
    """

    modules: dict[str, nn.Module]
    write: Callable[[Path, dict[str, nn.Module]], object]


@dataclass(frozen=True)
class Shown:
    """Pictures of a run in progress: one row for each source of pictures, one column for each question.

    Attributes:
        prompts: the columns' prompts; empty where there are none.
        rows: uint8 [N, 3, H, W] by the row's name, from the top.
        trained: the row that training changes; the others are the same at every step.
    """

    prompts: Sequence[str]
    rows: Mapping[str, Tensor]
    trained: str


@dataclass
class Task:
    """Everything a method asks of the loop.

    Attributes:
        begin: step -> the state its phases share (batch, noise, the generator's sample).
        modules: everything that trains, for the checkpoint; the product's networks among them.
        product: what is averaged and exported.
        probe: averages -> cheap measurements on validation pictures.
        frozen: networks that run and do not train, or hold what does; they are sharded with the others.
        preview: averages -> their answers to the same questions and noise at every step; None if it draws no pictures.
    """

    phases: list[Phase]
    begin: Callable[[int], Any]
    modules: dict[str, nn.Module]
    product: Product
    probe: Callable[[dict[str, nn.Module]], dict[str, float]] | None = None
    frozen: Sequence[nn.Module] = ()
    preview: Callable[[dict[str, nn.Module]], Shown] | None = None


@dataclass(frozen=True)
class Needs:
    """The inputs of a run, apart from how it is wired: `estimate`, `prepare` and `export` ask for this alone.

    Attributes:
        models: role -> model's name, the teacher first; the method asks for a model by its role.
        control: the control's name or import path; empty for none.
        reward: the reward's name or import path; empty for none.
        prompts: roles of the models whose text encoders read the prompts.
        pictures: the training pictures, or their captions, are read.
        latents: every training picture is encoded once.
        autoencoder: folder of the autoencoder that encodes them; empty for the teacher's.
        whole: why pictures must be seen whole, at one size and as they are, by which buckets, crops and mirrors are
            refused; empty where batches are read through `Batches`. Latents that are encoded once are such a reason.
    """

    models: Mapping[str, str] = field(default_factory=dict)
    control: str = ""
    reward: str = ""
    prompts: tuple[str, ...] = ("teacher",)
    pictures: bool = True
    latents: bool = False
    autoencoder: str = ""
    whole: str = ""


class Method(Protocol):
    """A frozen dataclass whose fields are its hyperparameters and whose body is its equation.

    `loaded` is a jdm.loading.Loaded: what `needs` names, read when it is first asked for.
    """

    def needs(self, run: Run) -> Needs:
        """The inputs of a run with this method."""
        ...

    def product(self, loaded: Any) -> Product:
        """The networks that are exported, built without what only training needs."""
        ...

    def task(self, loaded: Any) -> Task:
        """Phases, batches and networks of training."""
        ...


@dataclass(frozen=True)
class Data:
    """The pictures and captions of a run.

    Attributes:
        source: "fashion-mnist", "emoji", a folder of captioned pictures, .tar shards of them, a folder of shards named
            by their split (train*.tar, validation*.tar, test*.tar), or a Hugging Face dataset id.
        size: Side, or height and width, in pixels. Each picture is resized to cover it, then cropped at the centre.
        split: Pictures to train on: a split's name or a slice of one, such as train[:1000].
        validation: Pictures for the probes during training, written like `split`.
        prepared: Folder that `jdm prepare` wrote for this split; empty for none. It saves time and leaves
            the trained model unchanged.
        pictures: What the pictures are, where that is ambiguous: a column of a table or hub data set; in a folder a
            pattern ('*.jpg', 'images/*.png'), an ending or a folder's name; in shards an ending (jpg).
        captions: What the captions are: a column; the ending of the texts beside the pictures (.caption) or the folder
            they are in; in shards an ending, or a key of the .json.
        controls: Control maps of your own, read in place of measuring them, named as `pictures` are; empty measures the
            control on each picture.
        table: The table in a folder that holds several, by its path from there, or none to read no table.
        encoding: Encoding of captions and tables that are not UTF-8 and have no byte order mark, such as cp1252 or gbk.
        splits: How a folder is divided: by sub-folders named train, validation, test (folders); or 1 of 20 pictures
            each held out for validation and test (held-out). Left empty, sub-folders count where all are so named.
        unreadable: Largest share of the pictures that may turn out unreadable in a run: each is skipped, counted and
            named, and one beyond the share ends the run.
        changed: Go on with a run although its pictures or captions changed since it began; run.json then lists both.
        buckets: Pixels of which both sides of an aspect bucket are multiples, such as 64: each picture is cut to the
            bucket nearest its proportions, about as large as `size` in area, and a batch is of one bucket. 0 cuts all
            pictures to `size`.
        flip: Share of the training pictures that are mirrored left to right, drawn anew in every step, in [0, 1].
            Pictures whose caption says left or right are not mirrored.
        crop: Where a training picture is cut that does not have the proportions it is cut to: at its centre, or at a
            place drawn at random in every step.
    """

    source: str = "fashion-mnist"
    size: Size = 32
    split: str = "train"
    validation: str = "validation"
    prepared: str = ""
    pictures: str = ""
    captions: str = ""
    controls: str = ""
    table: str = ""
    encoding: str = ""
    splits: Literal["", "folders", "held-out"] = ""
    unreadable: Share = 0.05
    changed: bool = False
    buckets: Whole = 0
    flip: Share = 0.0
    crop: Literal["centre", "random"] = "centre"

    @property
    def recut(self) -> bool:
        """Whether what a step sees of a picture differs from the middle of `size`, a mirror apart."""
        return bool(self.buckets) or self.crop != "centre"


@dataclass(frozen=True)
class Run:
    """A training run: everything that determines its result.

    Attributes:
        method: The training method and its hyperparameters.
        out: Folder for checkpoints, logs and the trained model. A run that already has checkpoints there resumes from
            the last one.
        model: Teacher: a diffusers folder, a .safetensors checkpoint, a Hugging Face id, or "nano-sd".
        data: The pictures and captions to train on.
        steps: Training steps, at least 1; the learning rate decays over all of them.
        batch: Samples per step, summed over all processes; a multiple of the number of processes times `accumulate`.
        accumulate: Parts that a batch is computed in, one after another, to save memory. With more than 1, each phase
            draws its own sample from the generator.
        shard: Processes that split each network's weights among them; it must divide the number of processes.
        seed: Seed of every random draw: weights, noise and the order of the pictures.
        ema: Decay per step of the exponential moving average of the weights, in [0, 1). The average is exported.
        device: Device to train on, such as cpu, cuda or cuda:1.
        precision: Number format that networks compute in. Trained weights, sums and score differences stay float32.
        frozen: How frozen weights of the denoiser's blocks are kept: in the type of `precision`, or in 8 bits (fp8,
            e4m3) and converted when used, for half the memory at some loss; fp8 needs precision bf16, and saves most
            with checkpointing, which keeps no converted ones for the backward pass.
        checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        decoder: Folder or Hugging Face id of a small autoencoder of the same latents (AutoencoderTiny, such as TAESD)
            that decodes inside the likelihood or reward; empty for the teacher's own.
        compile: Compile the UNets and ControlNets with torch.compile: minutes before the first step, faster ones after.
        save_every: Steps between checkpoints, at least 1.
        log_every: Steps between lines of metrics.jsonl, at least 1.
        probe_every: Steps between measurements on the validation pictures; 0 for none.
        preview_every: Steps between previews: the control, the student's pictures and the teacher's, drawn from the
            same noise each time, as files in the folder `previews` of `out`. 0 for none; they change nothing else.
        trackers: Programs that get every logged number and preview: tensorboard (event files in `out`), wandb (W&B,
            over the network), or jsonl (metrics.jsonl, which every run writes).
        best: Export the averaged weights that scored best on this probe (judge, prompt_agreement, fd or consistency);
            empty exports the last ones.
        patience: End the run after this many probes without a new best; 0 never ends it early.
    """

    method: Any
    out: Path
    model: str = "nano-sd"
    data: Data = field(default_factory=Data)
    steps: Count = 1000
    batch: Count = 64
    accumulate: Count = 1
    shard: Count = 1
    seed: Seed = 0
    ema: Decay = 0.999
    device: str = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    frozen: Literal["precision", "fp8"] = "precision"
    checkpointing: bool = False
    decoder: str = ""
    compile: bool = False
    save_every: Count = 500
    log_every: Count = 20
    probe_every: Whole = 0
    preview_every: Whole = 0
    trackers: tuple[Literal["jsonl", "tensorboard", "wandb"], ...] = ()
    best: str = ""
    patience: Whole = 0

    def __post_init__(self):
        refuse_outside(self)


class Description(TypedDict, total=False):
    """What is read of a run's description before its dataclasses are made of it."""

    type: str
    model: str
    method: Required[dict[str, Any]]
    data: Required[dict[str, Any]]
    steps: int


class Record(TypedDict, total=False):
    """run.json."""

    run: Required[Description]
    data: dict[str, Any]
    before: list[dict[str, Any]]
    found: dict[str, Any]
    unreadable: list[str]
    versions: dict[str, Any]
    preprocessor: dict[str, Any] | None  # of the control


def described(value: Any) -> Any:
    """A dataclass as plain JSON, with its type's name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: described(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, (list, tuple)):
        return [described(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def without_cache(description: dict) -> dict:
    """A run's description without the data fields that do not affect the result; missing ones get their default."""
    data = described(Data()) | description.get("data", {})
    return description | {"data": {k: v for k, v in data.items() if k not in ("prepared", "changed", "unreadable")}}
