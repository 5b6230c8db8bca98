"""The bodies of the commands: arguments -> Python API -> what is printed. Imported once a command is known."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from jdm import files
from jdm.cli.parser import GPUS, _Parser, cost_flags, prepared_flags, refuse_unknown
from jdm.cli.progress import PartsProgress, TrainingProgress
from jdm.controls import checked, load_control
from jdm.data import pictures
from jdm.errors import RunError, UsageError
from jdm.evaluation.sampling import Sampler
from jdm.generator import starting_noise
from jdm.library import load_controlnet, load_model
from jdm.models.family import Family, placed
from jdm.recipes import find
from jdm.run import Run
from jdm.size import height_width, size_of, sized, spelled
from jdm.space import from_bytes, unit
from jdm.training import checkpoint, distributed
from jdm.training.best import FOLDER

diffusers.utils.logging.disable_progress_bar()
diffusers.utils.logging.set_verbosity_error()


def train(asked: argparse.Namespace) -> int:
    """`jdm train`: prints the exported model's folder."""
    from jdm.training.loop import train as trained

    run = configured(asked.recipe, asked.flags)
    _device(run.device)
    if place := checkpoint.last(run.out):
        Console(stderr=True).print(f"going on from {place}", highlight=False)
    with TrainingProgress(run.steps) as progress:
        try:
            folder = trained(run, progress)
        except KeyboardInterrupt:
            where = checkpoint.last(run.out) or "the start"
            raise KeyboardInterrupt(f"stopped; the same command goes on from {where}") from None
    if distributed.first():
        if run.best and (kept := checkpoint.last(run.out / FOLDER)) and (last := checkpoint.last(run.out)):
            Console(stderr=True).print(f"the best by {run.best} is exported: {kept.name} of {last.name}",
                                       highlight=False)
        print(folder)
    distributed.leave()
    return 0


def estimate(asked: argparse.Namespace) -> int:
    """`jdm estimate`: prints tables and writes JSON."""
    from jdm.cost.estimate import estimate as estimated
    from jdm.cost.estimate import tables

    parser = _Parser(prog="jdm estimate", allow_abbrev=False, add_help=False)
    cost_flags(parser)
    own, flags = parser.parse_known_args(asked.flags)
    gpus, out = own.gpu or asked.gpu or [*map(str, GPUS)], own.json or asked.json
    if out:
        _writable(Path(out).parent)
    found = estimated(configured(asked.recipe, flags))
    if out:
        files.write(Path(out), json.dumps(found.described(gpus), indent=1) + "\n")
    for table in tables(found, asked.recipe, gpus):
        Console().print(table)
    for note in found.notes:
        Console().print(note, highlight=False)
    return 0


def prepare(asked: argparse.Namespace) -> int:
    """`jdm prepare`: prints the bytes of each part and the command that trains with them."""
    from jdm.prepare import prepare as prepared

    parser = _Parser(prog="jdm prepare", allow_abbrev=False, add_help=False)
    prepared_flags(parser)
    own, flags = parser.parse_known_args(asked.flags)
    named = Path(asked.recipe)
    name = {".py": named.stem, ".json": named.absolute().parent.name}.get(named.suffix, asked.recipe)
    folder = Path(own.out or asked.out or f"runs/prepared/{name}")
    run = configured(asked.recipe, flags)
    _device(run.device)
    _writable(folder.parent)
    try:
        with PartsProgress() as progress:
            written = prepared(run, folder, asked.recipe, progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command goes on from the last whole part") from None
    for part, size in {**written, "in all": sum(written.values())}.items():
        print(f"{part.partition('-')[0]:9} {size:>16,} bytes")
    print(shlex.join(["jdm", "train", asked.recipe, *flags, "--data.prepared", str(folder)]))
    return 0


def configured(recipe: str, arguments: Sequence[str]) -> Run:
    """A recipe's run with flags laid over it.

    Raises:
        UsageError: an unknown recipe or flag, with the nearest; a value that does not fit.
    """
    prog = f"jdm train {recipe}"
    try:
        run = find(recipe)()
    except UsageError:
        raise
    except Exception as error:  # a user's recipe may raise anything
        raise UsageError(f"{recipe} failed ({type(error).__name__}: {error})") from error
    if not isinstance(run, Run):
        raise UsageError(f"{recipe} must return a jdm.run.Run, got {type(run).__name__}")
    known = [*flags_of(run), "--help"]
    arguments = [_whole(argument, known) for argument in arguments]
    refuse_unknown(arguments, known, prog)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(Run, default=run, args=arguments, prog=prog)
    except SystemExit as end:
        if end.code in (0, None):
            raise
        raise UsageError(f"{_unboxed(complaint.getvalue())}; see: {prog} --help") from None


def flags_of(value: Any, prefix: str = "") -> list[str]:
    """Every flag of a dataclass, nested fields with dots."""
    found: list[str] = []
    for field in fields(value):
        name, own = field.name.replace("_", "-"), getattr(value, field.name)
        if is_dataclass(own):
            found += flags_of(own, f"{prefix}{name}.")
        else:
            found += [f"--{prefix}{name}"] + ([f"--{prefix}no-{name}"] if isinstance(own, bool) else [])
    return found


def _whole(argument: str, known: Iterable[str]) -> str:
    """A flag in full: `--condition_weight 2` means `--method.condition-weight 2` where nothing else ends so."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    flag = flag.replace("_", "-")
    ends = [k for k in known if k.split(".")[-1].lstrip("-") == flag.removeprefix("--")]
    return (ends[0] if flag not in known and len(ends) == 1 else flag) + equals + value


def _unboxed(text: str) -> str:
    """The message of an error box, on one line: what stands between its title and its first rule."""
    lines = [line.strip(" │") for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]
    body = [line for line in lines if line][1:]
    if body and not body[0].strip("-"):  # the title is underlined where boxes cannot be drawn
        body = body[1:]
    message = itertools.takewhile(lambda line: line.strip("─-") and not line.startswith("╰"), body)
    return " ".join(message) or "the flags could not be read"


def sample(asked: argparse.Namespace) -> int:
    """`jdm sample`: control.png, 000.png, ... and grid.png."""
    model = load_model(asked.model).to(_device(asked.device))
    if asked.size:
        if len(asked.size) > 2:
            raise UsageError(f"--size is a side, or height and width; got {len(asked.size)} numbers")
        model = model.at(sized([asked.size[0], asked.size[-1]]))
    shown = shown_control(model, asked.image, asked.control_map, asked.control)
    also = [load_controlnet(name, model) for name in asked.also]
    if also:
        shown = _beside(shown, [spec for _, spec in also], asked)
    guidance = float((model.card or {}).get("guidance", 2.0)) if asked.guidance is None else asked.guidance
    sampler = Sampler(model, asked.steps, guidance,
                      [placed(net, asked.device) for net, _ in also], asked.strength)
    out = _writable(Path(asked.out))
    z = starting_noise(model.latent_shape(asked.n, model.size), asked.seed)
    images = sampler(z, [asked.prompt] * asked.n, None if shown is None else shown.expand(asked.n, -1, -1, -1),
                     seed=asked.seed)
    pictures.save_pictures(images, out)
    sheet = images
    try:
        if shown is not None:
            measured = (torch.cat(shown.split(3, dim=1)) * 255).round().clamp(0, 255).to(torch.uint8)
            pictures.grid(measured, len(measured), pad=0).save(out / "control.png")
            sheet = torch.cat([measured, images])
        pictures.grid(sheet, 9, scale=max(1, 128 // max(height_width(model.size)))).save(out / "grid.png")
    except OSError as error:
        raise RunError(f"{out} could not be written ({error.strerror or error}); free some space or choose another "
                       "--out") from None
    print(out / "grid.png")
    return 0


def shown_control(model: Family, image: str | None, control_map: str | None,
                  control: str | None) -> Tensor | None:
    """What the ControlNet is shown, [1, 3, H, W] in [0, 1]: measured on a picture, or read from a ready map.

    Raises:
        UsageError: the model and what was given do not go together; a bad picture, map or control.
    """
    if model.controlnet is None:
        if image or control_map or control:
            raise UsageError("this model takes no control; leave out --image, --control and --control-map, or name "
                             "a model with a ControlNet, such as nano-canny")
        return None
    if (image is None) == (control_map is None):
        raise UsageError("this model draws to a control; give --image with a picture to measure it on, or "
                         "--control-map with a ready map, and not both")
    if control_map is not None:
        loaded = pictures.load_picture(control_map, model.size)
        with Image.open(control_map) as file:
            width, height = file.size
        if (height, width) != height_width(model.size):
            raise UsageError(f"{control_map}: a control map must be {spelled(model.size)} pixels (height x width), got "
                             f"{height} x {width}; resize it, or give the picture itself with --image")
        return loaded[None].float() / 255
    assert image is not None
    spec = control or (model.card or {}).get("control")
    if not spec:
        raise UsageError("this model does not say which control it draws to; name it with --control canny")
    measure = checked(load_control(spec), model.size)
    return measure.image(measure.h(unit(from_bytes(pictures.load_picture(image, model.size)))[None]))


def _beside(shown: Tensor | None, specs: list[str | None], asked: argparse.Namespace) -> Tensor:
    """The first control's image with those of further ControlNets on the same picture, along the channels."""
    if shown is None or asked.image is None:
        raise UsageError("--also measures its control on a picture; give one with --image to a model that draws to a "
                         "control, such as nano-canny")
    picture = unit(from_bytes(pictures.load_picture(asked.image, size_of(shown))))[None]
    parts = [shown]
    for spec, name in zip(specs, asked.also, strict=True):
        if not spec:
            raise UsageError(f"{name} does not say which control it draws to; it needs a jdm.json with one")
        measure = checked(load_control(spec), size_of(shown))
        parts.append(measure.image(measure.h(picture)))
    return torch.cat(parts, dim=1)


def evaluate(asked: argparse.Namespace) -> int:
    """`jdm evaluate`: prints a table and writes JSON."""
    from jdm.evaluation.evaluate import evaluate as evaluated
    from jdm.evaluation.evaluate import evaluate_prompts
    from jdm.metrics.scores import read_prompts

    file = Path(asked.json) if asked.json else None
    if file:
        _writable(file.parent)
    _device(asked.device)
    scored = _names(asked.scores or "")
    if asked.prompts:
        row = evaluate_prompts(asked.model, read_prompts(asked.prompts), scored, asked.n, asked.seed, asked.steps,
                               asked.guidance, asked.device)
    else:
        row = evaluated(asked.model, asked.control, asked.n, asked.seed, asked.source, asked.split, asked.steps,
                        asked.guidance, asked.teacher, asked.quick, scored, asked.extractor, asked.device)
    if file:
        files.write(file, json.dumps(row, indent=1) + "\n")
    table = Table("measurement", "value", title=asked.model)
    for key, value in row.items():
        table.add_row(key.replace("_", " "), f"{value:.5g}" if isinstance(value, float) else str(value))
    Console().print(table)
    return 0


def export(asked: argparse.Namespace) -> int:
    """`jdm export`: prints the folder, and its address where it was uploaded."""
    from jdm.export import hub
    from jdm.export.writers import export as exported

    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    name = hub.checked_name(asked.push) if asked.push else None
    folder = exported(asked.run, asked.out, dtypes[asked.dtype], asked.format, asked.rank, asked.base, asked.metrics)
    print(folder)
    if name:
        print(hub.push(folder, name))
    return 0


def demo(asked: argparse.Namespace) -> int:
    """`jdm demo`: prints the table last."""
    from jdm.cli import demo as page

    out = _writable(Path(asked.out))
    with TrainingProgress(asked.steps) as progress:
        metrics = page.demo(out, asked.steps, asked.n, progress, progress.console.print)
    head, body = page.rows(metrics)
    table = Table(*(row[0] for row in [head, *body]))
    for name, *values in zip(*[head, *body], strict=True):
        if name:
            table.add_row(name, *values)
    Console().print(table)
    return 0


def reproduce(asked: argparse.Namespace) -> int:
    """`jdm reproduce`: prints the table and where its page is."""
    from jdm.reproduce import sitting
    from jdm.reproduce.cells import selected
    from jdm.reproduce.models import Setting
    from jdm.reproduce.page import paper_form
    from jdm.reproduce.scales import SCALES
    from jdm.reproduce.tables import TABLES

    table = TABLES[asked.table]
    scale = SCALES[asked.scale].on(asked.model, asked.source, asked.guide, tuple(_names(asked.scores or "")))
    setting = Setting(scale, Path(asked.out), asked.n or table.n, asked.steps, asked.device or scale.device,
                      asked.quick, asked.prompts or "", tuple(asked.known))
    if asked.dry_run:
        print(sitting.listed(table, setting, asked.seeds, asked.cells))
        return 0
    selected(sitting.opened(table, setting, asked.seeds), asked.cells)
    _device(setting.device)
    for folder in (setting.out, Path(asked.page)):
        _writable(folder)
    said = Console(stderr=True)
    try:
        data, failures = sitting.reproduce(
            table, setting, asked.seeds, asked.cells, not asked.no_run, Path(asked.page), _again(asked),
            lambda run: TrainingProgress(run.steps), lambda line: said.print(line, highlight=False, markup=False))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command goes on where it was") from None
    print(f"{data['headline']}\n\n{paper_form(data)}\n")
    page = Path(asked.page) / f"{data['file']}.md"
    print(page)
    if failures:
        raise RunError(f"{len(failures)} cells failed, the first with: {failures[0]} ({page} has them all)")
    return 0


def _again(asked: argparse.Namespace) -> str:
    """The command that was given, without its cells."""
    given = {"scale": "nano", "model": None, "guide": None, "source": None, "seeds": 1, "n": None, "steps": None,
             "out": "runs/reproduce", "page": "docs/results", "prompts": None, "scores": None, "device": None}
    flags = [f"--{k} {shlex.quote(str(getattr(asked, k)))}" for k, usual in given.items() if getattr(asked, k) != usual]
    return " ".join([f"jdm reproduce {asked.table}", *flags, *(["--quick"] if asked.quick else [])])


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:  # RuntimeError, AssertionError: by backend
        first = (str(error).splitlines() or [""])[0][:120]
        raise UsageError(f"--device {name} cannot be used here ({first}); use --device cpu") from None
    return device


def _writable(folder: Path) -> Path:
    """The folder, made where missing.

    Raises:
        UsageError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be made ({error.strerror}); choose another place") from None
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{folder} cannot be written; choose another place")
    return folder
