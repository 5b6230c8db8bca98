"""Exports a run's model as a folder, in the layout that other software loads."""

from __future__ import annotations

import difflib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from jdm.cost.known_configs import without_weights
from jdm.errors import UsageError, in_short
from jdm.export.model_card import (
    CHECKPOINT_FILE,
    COMFYUI_FILE,
    CONTROLNET_FILE,
    KOHYA_FILE,
    Subject,
    model_card,
)
from jdm.export.onnx_folder import write_student
from jdm.files import ASSETS, read_json, replaced
from jdm.formats import lora_file, single_file, transformers
from jdm.library import FAMILIES, SHIPPED, load_model, lone_controlnet
from jdm.models.configs import REMEDY
from jdm.models.folder import CARD, folder_json
from jdm.models.schedulers import alphas_cumprod
from jdm.models.stable_diffusion import ControlNetModel, StableDiffusion
from jdm.models.stock import StockModel
from jdm.recipes import recorded
from jdm.run import Record
from jdm.schedule import NoiseSchedule
from jdm.size import height_width, sized
from jdm.training import checkpoint
from jdm.training.product import export_checkpoint

RANK = 64


@dataclass(frozen=True)
class Source:
    """A finished model's folder and the record of its training.

    Attributes:
        folder: the model's folder.
        record: run.json, or {}.
        name: the path that the user gave.
    """

    folder: Path
    record: dict
    name: Path

    @property
    def card(self) -> dict:
        return folder_json(str(self.folder), CARD) or {}

    @property
    def kind(self) -> str | None:
        """The diffusers class that the folder names, or None."""
        index = folder_json(str(self.folder), "model_index.json") or read_json(self.folder / "config.json")
        kind = index.get("_class_name")
        if kind is not None and not str(kind).isidentifier():  # it becomes a line of the README's code
            raise UsageError(f"{self.folder}: _class_name: expected a class of diffusers, got {kind!r:.60}; {REMEDY}")
        return kind if "_diffusers_version" in index else None

    def model(self) -> StockModel:
        """The whole model, for the layouts of other programs."""
        if not (self.folder / "model_index.json").is_file():
            raise UsageError(f"{self.name} is one network, not a whole model; export it with --format diffusers")
        return cast(StockModel, load_model(str(self.folder)))

    def controlnet(self) -> tuple[Any, type[StockModel]]:
        """The model's ControlNet, and the family that the ControlNet belongs to."""
        named = {family.PARTS["controlnet"].classes[0] for family in FAMILIES.values()}
        for folder in (self.folder, self.folder / "controlnet"):
            if read_json(folder / "config.json").get("_class_name") in named:
                return lone_controlnet(str(folder))
        raise UsageError(f"{self.name} has no ControlNet; export it with --format diffusers, single-file or lora")


def export(
    run: str | Path,
    out: str | Path,
    dtype: torch.dtype = torch.float32,
    format: str = "diffusers",
    rank: int | None = None,
    base: str | None = None,
    metrics: str | Path | None = None,
) -> Path:
    """Exports a finished run's model, or one built from the averages of the last checkpoint; returns `out`.

    Args:
        run: a run's folder, a model's folder, or a shipped model's name.
        out: a new or empty folder; it is written whole or not at all.
        dtype: precision of the weights on disk. A stock loader still computes in the precision it is told to.
        format: diffusers, a folder for stock pipelines; single-file, for ComfyUI and A1111; controlnet, the ControlNet
            alone in both layouts; lora, the backbone's difference from its base, in both layouts; onnx, graphs of a
            student.
        rank: rank of the LoRA; by default RANK.
        base: the model that the LoRA is applied to; by default the run's teacher.
        metrics: a file written by `jdm evaluate --json`, for the README.

    Raises:
        UsageError: there is no model to export, it does not fit the format, or `out` is not empty.
        RunError: the disk cannot be written.
    """
    run, out = Path(run), Path(out)
    _check(run, out, dtype, format, rank, base)
    known = _metrics(Path(metrics)) if metrics else {}
    try:
        with replaced(out) as draft:
            with _source(run, draft.with_name(f".{out.name}.source")) as source:
                subject = replace(_subject(source, out.name, format, dtype), metrics=known, rank=rank or RANK)
                subject = WRITERS[format](source, draft, replace(subject, base=base) if base else subject)
            for file in draft.rglob("*.safetensors"):
                _recast(file, dtype)
            (draft / "README.md").write_text(model_card(subject), encoding="utf-8")
    except SafetensorError as error:
        raise UsageError(f"{run} has damaged weights ({error}); fetch or train it again") from None
    return out


def _check(run: Path, out: Path, dtype: torch.dtype, format: str, rank: int | None, base: str | None) -> None:
    if format not in WRITERS:
        near = difflib.get_close_matches(format, WRITERS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the formats are {', '.join(WRITERS)}"
        raise UsageError(f"there is no format {format!r}; {hint}")
    if format != "lora" and (rank is not None or base is not None):
        raise UsageError(f"--{'base' if rank is None else 'rank'} is for a LoRA; leave it out or add --format lora")
    if format == "onnx" and dtype == torch.bfloat16:
        raise UsageError("ONNX graphs hold weights in fp32 or fp16, not bf16; choose --dtype fp16")
    if rank is not None and rank < 1:
        raise UsageError(f"LoRA rank must be at least 1, got {rank}")
    if out.name in ("", ".."):
        raise UsageError(f"{out} is not a name for a new folder; give one, such as my_model")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UsageError(f"{out} already exists and is not empty; name a new folder")
    single_file.refuse_pickle(run)


@contextmanager
def _source(run: Path, spare: Path) -> Iterator[Source]:
    """Yields the model of `run`; if it must be built from a checkpoint, in a temporary folder at `spare`."""
    if not run.is_dir() and str(run) in SHIPPED:
        run = ASSETS / str(run)
    for folder in (run / "model", run):
        if (folder / "model_index.json").is_file() or (folder / "config.json").is_file():
            for file in folder.rglob("*"):
                _refuse_link(file, folder)
                if "training" not in file.parts and not any(file.parent.glob("*.safetensors")):
                    single_file.refuse_pickle(file)
            yield Source(folder, _record(folder), run)
            return
    place = checkpoint.last(run)
    if place is None or not (run / "run.json").is_file():
        what = "is not a run" if not (run / "run.json").is_file() else "has no checkpoint yet"
        raise UsageError(f"{run} {what}; give the --out folder of jdm train, such as runs/nano-canny")
    again = replace(recorded(run / "run.json"), out=run)
    try:
        export_checkpoint(again, spare)
        yield Source(spare, read_json(run / "run.json", Record), run)
    finally:
        shutil.rmtree(spare, ignore_errors=True)


def _refuse_link(file: Path, folder: Path) -> None:
    """Raises UsageError if an export would copy something from outside the folder.

    A link may lead to a file in the folder, or, in the hub's cache, to one of the same model's blobs.
    """
    if not file.is_symlink() and (file.is_file() or file.is_dir()):
        return
    home, target = folder.resolve(), file.resolve()
    if home.parent.name == "snapshots":
        home = home.parents[1]
    if not target.is_file() or not target.is_relative_to(home):
        raise UsageError(f"{file} leads to {target}, which is no file of this model; put the file itself there, or "
                         "delete it")


def _record(folder: Path) -> dict:
    """The run.json of a model's folder, from its run or from its `training` folder; {} if there is none."""
    beside = folder.parent / "run.json" if folder.name == "model" else folder / "run.json"
    kept = [file for file in (folder / "training").glob("*.json") if "run" in read_json(file)]
    place = beside if beside.exists() or len(kept) != 1 else kept[0]
    return read_json(place, Record)


def _subject(source: Source, name: str, format: str, dtype: torch.dtype) -> Subject:
    """The facts for the README that the model's configs hold; no weight is read."""
    found = Subject(name, format, source.kind, source.card, source.record, dtype=str(dtype).split(".")[-1],
                    base=source.record.get("run", {}).get("model"),
                    controlled=(source.folder / "controlnet").is_dir())
    index = folder_json(str(source.folder), "model_index.json") or {}
    scheduling = folder_json(str(source.folder), "scheduler/scheduler_config.json") or {}
    found = replace(found, stepper=str(scheduling.get("_class_name", "")),
                    n=scheduling.get("num_train_timesteps", 1000),
                    absent=tuple(name for name, part in (found.family.PARTS if found.family else {}).items()
                                 if part.null and index.get(name) == [None, None]))
    if found.family and not issubclass(found.family, StableDiffusion):
        with torch.device("meta"):
            model = without_weights(str(source.folder))
        return replace(found, pixels=model.size, prediction=model.prediction)
    configs = ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")
    unet, vae, scheduler = (folder_json(str(source.folder), file) for file in configs)
    if not (unet and vae and scheduler and "block_out_channels" in vae):
        return found
    downscale = 2 ** (len(vae["block_out_channels"]) - 1)
    found = replace(found, pixels=sized([side * downscale for side in height_width(unet["sample_size"])]),
                    prediction=scheduler.get("prediction_type", "epsilon"), known_as=single_file.known_size(unet))
    if found.levels is None:
        return found
    try:
        own, theirs = alphas_cumprod(scheduler), NoiseSchedule.scaled_linear().alphas_cumprod
    except Exception as error:  # diffusers' own checks raise several
        raise UsageError(f"{source.folder / configs[-1]} gives no noise levels ({in_short(error)}); {REMEDY}") from None
    signal, level = float(own[-1]), len(own) - 1
    same = level < len(theirs) and abs(float(theirs[level]) / signal - 1) < 1e-3
    return replace(found, sigma=((1 - signal) / signal) ** 0.5, same_levels=same)


def _pickles(_: Any, names: list[str]) -> set[str]:
    """The names, of a folder that is copied, which are of pickles or of an index of them."""
    return {name for name in names if name.lower().endswith((*single_file.PICKLES, ".bin.index.json"))}


def _diffusers(source: Source, draft: Path, subject: Subject) -> Subject:
    """Writes a copy of the folder."""
    shutil.copytree(source.folder, draft, ignore=_pickles)
    return subject


def _single_file(source: Source, draft: Path, subject: Subject) -> Subject:
    """Writes one checkpoint, its ControlNet beside it, and the configs with which stock diffusers reads both."""
    model = source.model()
    if not isinstance(model, StableDiffusion):
        tensors = transformers.checkpoint_tensors(model)
        if not tensors:
            raise UsageError(f"no single file is written for {model.NAME} models; export it with --format diffusers")
        draft.mkdir()
        single_file.save(tensors, draft / CHECKPOINT_FILE.format(name=subject.name))
        _keep_card(source, draft)
        subject = replace(subject, comfyui={CHECKPOINT_FILE.format(name=subject.name): "models/diffusion_models"})
        return _with_layout(model.controlnet, draft, subject)
    draft.mkdir()
    others = shutil.ignore_patterns("*.safetensors", CARD, "training", "*.md")
    shutil.copytree(source.folder, draft / "config",
                    ignore=lambda folder, names: {*_pickles(folder, names), *others(folder, names)})
    single_file.save(single_file.checkpoint_tensors(model), draft / CHECKPOINT_FILE.format(name=subject.name))
    _keep_card(source, draft)
    return _with_layout(model.controlnet, draft, subject)


def _controlnet(source: Source, draft: Path, subject: Subject) -> Subject:
    """Writes the ControlNet in the layout of diffusers and, beside it, in the single-file layout."""
    net, family = source.controlnet()
    net.save_pretrained(draft)
    config = read_json(draft / "config.json")
    config.pop("_name_or_path", None)
    (draft / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    subject = _with_layout(net, draft, subject)
    _keep_card(source, draft)
    known = single_file.known_size({**net.config}) if issubclass(family, StableDiffusion) else None
    subject = replace(subject, controlled=True, known_as=known)
    if subject.kind != type(net).__name__:
        return subject
    wide = net.config.get("addition_embed_type") is not None
    return replace(subject, kind="StableDiffusionXLControlNetPipeline" if wide else family.PIPELINES[1])


def _lora(source: Source, draft: Path, subject: Subject) -> Subject:
    """The UNet's difference from its base as a LoRA in both layouts; ControlNet and scheduler beside it."""
    if subject.base is None:
        raise UsageError(f"{source.name} does not record the model it was trained from; name it with --base")
    model = source.model()
    try:
        base = load_model(subject.base)
    except UsageError as error:
        raise UsageError(f"{error}; name the model that the LoRA is applied to with --base") from None
    found = lora_file.difference_lora(base.backbone, model.backbone, subject.rank)
    draft.mkdir()
    lora_file.write_diffusers(found.lora, draft / lora_file.DIFFUSERS_FILE, model.BACKBONE)
    if isinstance(model, StableDiffusion):
        lora_file.write_kohya(found.lora, draft / KOHYA_FILE.format(name=subject.name))
    elif tensors := transformers.lora_tensors(model, found.lora):
        single_file.save(tensors, draft / COMFYUI_FILE.format(name=subject.name))
        subject = replace(subject, comfyui={COMFYUI_FILE.format(name=subject.name): "models/loras"})
    for part in ("scheduler", "controlnet"):
        if (source.folder / part).is_dir():
            shutil.copytree(source.folder / part, draft / part, ignore=_pickles)
    subject = _with_layout(model.controlnet, draft, subject)
    _keep_card(source, draft)
    return replace(subject, errors=found.errors, left_out=found.left_out, rank=found.lora.rank)


def _onnx(source: Source, draft: Path, subject: Subject) -> Subject:
    """Writes a student's graphs, tokenizers and card."""
    write_student(str(source.name), source.model(), draft, half=subject.dtype == "float16")
    return subject


WRITERS: dict[str, Callable[[Source, Path, Subject], Subject]] = {
    "diffusers": _diffusers, "single-file": _single_file, "controlnet": _controlnet, "lora": _lora, "onnx": _onnx}


def _with_layout(net: Any, draft: Path, subject: Subject) -> Subject:
    """Writes a ControlNet, where there is one, in the layout of other programs."""
    file = CONTROLNET_FILE.format(name=subject.name)
    if isinstance(net, ControlNetModel):
        single_file.save(single_file.controlnet_tensors(net), draft / file)
    elif net is not None and (tensors := transformers.controlnet_tensors(net)):
        single_file.save(tensors, draft / file)
        return replace(subject, comfyui={**subject.comfyui, file: "models/model_patches"})
    return subject


def _keep_card(source: Source, draft: Path) -> None:
    if (source.folder / CARD).is_file():
        shutil.copy(source.folder / CARD, draft / CARD)


def _metrics(file: Path) -> dict[str, Any]:
    """Reads the measurements of `jdm evaluate --json`."""
    single_file.refuse_pickle(file)
    remedy = "give a file written by jdm evaluate --json, which has one value for each name"
    found = read_json(file, dict[str, str | float | bool | None], remedy, needed=True)
    if not found:
        raise UsageError(f"{file} is empty; {remedy}")
    return found


def _recast(file: Path, dtype: torch.dtype) -> None:
    """Converts a file's tensors to `dtype`, but not its header or single numbers such as a LoRA's alpha.

    Raises:
        UsageError: a number is not finite, before or after.
    """
    tensors = load_file(file)
    if name := next((k for k, v in tensors.items() if v.is_floating_point() and not bool(v.isfinite().all())), ""):
        raise UsageError(f"{name} of {file.parent.name} is not finite (NaN or infinity); export an earlier checkpoint, "
                         "or fetch the model again")
    changed = {k: v.to(dtype) for k, v in tensors.items() if v.is_floating_point() and v.ndim and v.dtype != dtype}
    if not changed:
        return
    if name := next((k for k, v in changed.items() if not bool(v.isfinite().all())), ""):
        raise UsageError(f"{name} of {file.parent.name} is too large for {dtype}; choose --dtype bf16 or fp32")
    with safe_open(file, "pt") as opened:
        header = opened.metadata() or {"format": "pt"}
    draft = file.with_suffix(".draft")  # unchanged tensors may still be mapped from the file
    save_file(tensors | changed, draft, metadata=header)
    draft.replace(file)
