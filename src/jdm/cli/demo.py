"""`jdm demo`: the shipped models compared, and a student trained on the spot. About ten minutes on a CPU."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from jdm import files
from jdm.cli import checks, console
from jdm.cli.progress import TrainingProgress
from jdm.controls import Control, checked, load_control
from jdm.data.pictures import grid, save_picture
from jdm.data.sources import load_pictures
from jdm.errors import plural
from jdm.evaluation import html
from jdm.evaluation.evaluate import cost, judge, measured
from jdm.evaluation.questions import Questions, answers
from jdm.evaluation.reference import references
from jdm.evaluation.sampling import Sampler
from jdm.levels import Bound
from jdm.library import load_model
from jdm.metrics.extractors import ClassifierFeatures
from jdm.recipes import find
from jdm.run import Run
from jdm.space import to_bytes
from jdm.training.curves import charts
from jdm.training.loop import train
from jdm.training.record import measurements

# The full training set does not ship: students train on one half of the packaged test split and are asked about the
# other.
TRAINS, ASKS = "test[:5000]", "test[5000:]"
NAMES = {"controlnet50": "ControlNet, 50 steps", "shipped": "shipped student, 1 step",
         "fresh_before": "fresh student, before", "fresh_after": "fresh student, after"}
COLUMNS = ("fd", "fd_floor", "consistency", "consistency_chance", "diversity", "prompt_agreement", "nfe",
           "seconds_per_image", "n")
SHEET = 16  # pictures of a row of grid.png
SHOWN = ("step", "fidelity", "condition", "fake/loss", "posterior/loss", "std_x")  # of metrics.jsonl


def command(asked: argparse.Namespace) -> int:
    out = checks.writable(Path(asked.out))
    with TrainingProgress(asked.steps) as progress:
        metrics = demo(out, asked.steps, asked.n, progress, progress.console.print)
    head, body = rows(metrics)
    by_measurement = [list(values) for values in zip(*[head, *body], strict=True)]
    console.table(by_measurement[0], by_measurement[1:])
    return 0


def recipe(out: Path, steps: int, batch: int = 32) -> Run:
    """The recipe of the shipped student, shortened, on one half of the packaged pictures.

    The condition term has a looser bound, because the student must learn the control in a few hundred steps.
    """
    run = find("nano-canny")()
    method = replace(run.method, condition=replace(run.method.condition, bound=Bound(1.0, 1.0)))
    return replace(run, method=method, out=out / "fresh", steps=steps, batch=batch, ema=0.98, save_every=100,
                   log_every=5, probe_every=50, data=replace(run.data, split=TRAINS, validation=ASKS))


def demo(out: Path, steps: int = 300, n: int = 500, progress: Callable[[int, dict], None] | None = None,
         say: Callable[[str], None] = print) -> dict[str, dict[str, Any]]:
    """Sample, train, evaluate and write report.html, metrics.json and grid.png into a folder.

    Args:
        n: pictures per measurement.
        progress: called after every training step, as in `train`.
        say: called with each line to print.

    Returns:
        The measurements of each generator by name, as metrics.json holds them.
    """
    run = recipe(out, steps)
    control = checked(load_control("canny"), run.data.size)
    questions = Questions.of(load_pictures(run.data.source, ASKS, run.data.size), control, n, seed=0)
    many = load_model("nano-controlnet")
    multi = Sampler(many, 50, float((many.card or {}).get("guidance", 2.0)))
    samplers = {"controlnet50": multi, "shipped": Sampler(load_model("nano-canny")), "fresh_before": _untrained(run)}
    say(f"1. {plural(n, 'prompt')} and edges of real test pictures: 50-step ControlNet (guidance {multi.guidance:g}) "
        "beside the shipped one-step student")
    extractor = ClassifierFeatures(judge())
    whole = load_pictures(run.data.source, "test", run.data.size)
    targets = references("nano-sd", [extractor], whole)
    pictures: dict[str, Tensor] = {}
    metrics: dict[str, dict[str, Any]] = {}

    def ask(name: str) -> None:
        start = time.perf_counter()
        pictures[name] = answers(samplers[name], questions, control)
        wall = time.perf_counter() - start
        row = measured(pictures[name], questions, control, targets, [extractor], samplers[name], quick=True)
        metrics[name] = row | cost(samplers[name], questions, control, repeats=1)
        say(f"   {NAMES[name]}: {plural(n, 'picture')} in {wall:.1f} s, "
            f"consistency {metrics[name]['consistency']:.4f} (chance {metrics[name]['consistency_chance']:.4f}), "
            f"distance {metrics[name]['fd']:.1f} (floor {metrics[name]['fd_floor']:.1f})")

    for name in ("controlnet50", "shipped", "fresh_before"):
        ask(name)
    say(f"2. Training a fresh student from the teacher with JDM: {plural(steps, 'step')} of batch {run.batch}")
    folder = train(run, progress)
    say("3. The same questions to the fresh student")
    samplers["fresh_after"] = Sampler(load_model(str(folder)))
    ask("fresh_after")
    files.write_json(out / "metrics.json", metrics)
    sheet = _sheet(questions, control, pictures)
    save_picture(sheet, out / "grid.png")
    _page(out, run, metrics, sheet)
    say(f"4. {out / 'report.html'}, {out / 'metrics.json'} and {out / 'grid.png'}")
    return metrics


def rows(metrics: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The demo's table as text: its head, and a row for each generator."""
    body = [[NAMES[name], *(_text(row[c]) for c in COLUMNS)] for name, row in metrics.items()]
    return ["", *(c.replace("_", " ") for c in COLUMNS)], body


def _untrained(run: Run) -> Sampler:
    """The fresh student before training: the teacher's UNet, a ControlNet that adds nothing yet, one step."""
    torch.manual_seed(run.seed)
    teacher = load_model(run.model)
    student = teacher.with_networks(controlnet=teacher.new_controlnet().eval().requires_grad_(False))
    return Sampler(student.with_parts(card={"levels": list(run.method.student.levels)}))


def _sheet(questions: Questions, control: Control, pictures: dict[str, Tensor]) -> Image.Image:
    """One picture: a row of real pictures, a row of their controls, then a row for each generator."""
    assert questions.c is not None
    asked = [to_bytes(images[:SHEET] * 2 - 1) for images in (questions.images, control.image(questions.c[:SHEET]))]
    return grid(torch.cat([*asked, *(p[:SHEET] for p in pictures.values())]), SHEET, scale=2)


def _page(out: Path, run: Run, metrics: dict[str, dict[str, Any]], sheet: Image.Image) -> None:
    log = [{k: v for k, v in row.items() if k in SHOWN} for row in measurements(run.out / "metrics.jsonl")]
    drawn = [curve for group in charts({"fresh student": log}).values() for curve in group]
    extractor = next(iter(metrics.values()))["fd_extractor"]
    many, one = metrics["controlnet50"], metrics["shipped"]
    ratio = many["seconds_per_image"] / one["seconds_per_image"]
    caption = "From the top: real test pictures, their Canny edges, then " + ", ".join(NAMES[k] for k in metrics)
    files.write(out / "report.html", html.page(
        "A one-step generator that follows a new control",
        html.paragraph("The teacher, nano-sd, knows prompts but no edges. Joint Distribution Matching teaches its "
                       "one-step student to follow Canny edges while it is distilled."),
        html.picture(sheet, caption),
        html.table(*rows(metrics)),
        html.paragraph(f"fd: Frechet distance to samples of the teacher without control, on the features of "
                       f"{extractor}; its floor is the distance of more such samples. consistency: mean |h(x) - c| "
                       "with OpenCV's Canny, where lower follows the edges better; chance is the value if the control "
                       f"is ignored. The shipped student takes 1/{ratio:.0f} of the ControlNet's time per picture, at "
                       "batch 64."),
        html.heading(f"Training of the fresh student, {plural(run.steps, 'step')} of batch {run.batch}"),
        html.columns(*drawn),
        html.heading("What to try next"),
        html.code('jdm sample nano-canny --prompt "ankle boot" --image photo.jpg --n 8 --seed 0\n'
                  "jdm evaluate nano-canny --control canny --n 1000 --seed 0 --json out.json\n"
                  "jdm train nano-canny --steps 2000")))


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
