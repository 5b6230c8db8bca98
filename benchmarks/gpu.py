"""All that a GPU is wanted for, in one command of ten minutes, in order of worth; --smoke takes it through on a CPU.

    python benchmarks/gpu.py OUT [--minutes 10] [--z-image FOLDER] [--commit SHA]
    python benchmarks/gpu.py OUT --page        # the page again, with jdm estimate's numbers; needs no GPU
    python benchmarks/gpu.py OUT --smoke       # toy sizes on a CPU, in seconds

(a) SD1.5's training step at 512 px: ours, a plain one, ours compiled, at batch 4 and 16; (b) SDXL's and Z-Image's;
(c) pytest -m gpu; (d) a picture in one step and in 50. Each row is a process with a time limit of its own. OUT/a.json
to OUT/d.json and the page, OUT/gpu.md, are written after every row, so that a run that is cut short counts; the same
command goes on where it stopped. Nothing is fetched: weights are random, pictures come with the package.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import gpu_latency
import gpu_page
import gpu_step
import torch
from gpu_step import Step

from jdm import files
from jdm.reproduce.sitting import commit

ROOT = Path(__file__).parents[1]
HEAVY = ["jdm.training.loop", "jdm.cost.estimate", "jdm.recipes", "torch._dynamo"]


@dataclass(frozen=True)
class Row:
    """A measurement in a process of its own.

    Attributes:
        part: a to d.
        limit: seconds after which it is ended.
        reason: why it is not taken; empty where it is.
    """

    part: str
    name: str
    make: Callable[..., dict[str, Any]]
    args: tuple[Any, ...]
    limit: float
    reason: str = ""


def rows(device: str, z_image: str, toy: bool) -> list[Row]:
    """Everything to measure, in order of worth: what compiles longest comes last."""
    size, large, batches = (64, 64, (2, 2)) if toy else (512, 1024, (4, 16))
    quick = {"warmup": 1, "rounds": 1} if toy else {}

    def step(row: str, batch: int, limit: float) -> Row:
        asked = Step("sd15-canny", row, batch, size, device, toy=toy, **quick)
        return Row("a", f"{row}, batch {batch}", gpu_step.trained, (asked,), limit)

    xl = Step("sdxl-canny", "ours", 2, large, device, toy=toy, **quick)
    z = Step(gpu_step.Z_IMAGE, "ours", 1, large, device, z_image, toy, **quick)
    pictures = [(50, "eager"), *((1, way) for way in gpu_latency.WAYS)]
    found = [
        Row("a", gpu_page.RATE, about, (device, 256 if toy else 8192), 60),
        *(step(row, batch, 75) for batch in batches for row in ("ours", "plain")),
        step("compiled", batches[0], 240),
        Row("b", "SDXL", gpu_step.trained, (xl,), 90),
        Row("b", "Z-Image", gpu_step.trained, (z,), 90, gpu_step.unknown(z_image, toy)),
        Row("c", "pytest -m gpu", tested, (device,), 120),
        *(Row("d", f"{n} step{'s' * (n > 1)}, {way}", gpu_latency.drawn,
              (gpu_latency.Drawing(n, way, size, device, toy, 1 if toy else 3 if n > 1 else 10),),
              60 if way == "eager" else 120) for n, way in pictures),
        step("compiled", batches[1], 300)]
    return list({(row.part, row.name): row for row in found}.values())


def about(device: str, side: int) -> dict[str, Any]:
    """The chip, and its measured rate of bf16 products."""
    on_gpu = torch.device(device).type == "cuda"
    return {"chip": torch.cuda.get_device_name() if on_gpu else platform.machine(), "torch": torch.__version__,
            "cuda": torch.version.cuda if on_gpu else None, "processor": f"{os.cpu_count()} cores",
            "python": platform.python_version(), **gpu_step.matmul_rate(device, side)}


class Outcomes:
    """A pytest plugin that counts."""

    def __init__(self):
        self.found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            self.found[report.outcome] += 1
        if report.failed:
            self.found["failures"].append(report.nodeid)


def tested(device: str) -> dict[str, Any]:
    """The tests that are marked gpu, run on the device."""
    import pytest

    os.environ["JDM_TEST_DEVICE"] = device
    marked = [str(file) for file in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in file.read_text()]
    outcomes = Outcomes()
    code = pytest.main(["-m", "gpu", "-p", "no:xdist", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *marked],
                       plugins=[outcomes])
    return {**outcomes.found, "exit_code": int(code)}


# Running a row


def taken(row: Row, seconds: float, log: Path) -> dict[str, Any]:
    """The row's outcome, in at most `seconds`: what it found, or why it found nothing."""
    # A fork of a process that has imported everything saves seconds, but has no CUDA if one of the imports touched it.
    context = multiprocessing.get_context("spawn" if "cuda" in repr(row.args) else "forkserver")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(HEAVY)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(there, row.make, row.args, str(log)))
    start = time.monotonic()
    process.start()
    there.close()
    try:
        outcome = here.recv() if here.poll(seconds) else \
            {"state": "out of time", "reason": f"not finished after {seconds:.0f} s"}
    except EOFError:
        process.join()
        outcome = {"state": "failed", "reason": f"its process ended with {process.exitcode}; see {log.name}"}
    ended(process)
    return {"row": row.name, "asked": [asdict(a) if is_dataclass(a) else a for a in row.args],
            "took": time.monotonic() - start, **outcome}


def work(answers: Connection, make: Callable[..., Any], args: tuple[Any, ...], log: str) -> None:
    """In a row's process: send what make(*args) returns, or why it returned nothing; all output goes to the log."""
    os.setsid()  # so that a compiler's processes end with this one
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    print(f"\n=== {make.__name__} {args}", flush=True)
    try:
        answers.send({"state": "done", "found": make(*args)})
    except torch.OutOfMemoryError as error:
        answers.send({"state": "out of memory", "reason": str(error).split(". ")[0]})
    except Exception as error:
        import traceback

        traceback.print_exc()
        answers.send({"state": "failed", "reason": f"{type(error).__name__}: {error}"[:300]})


def ended(process: Any) -> None:
    """Ends a row's process, and what it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has ended already, or leads no group yet
        process.kill()
    process.join()


# A sitting


def known(out: Path, part: str) -> dict[str, Any]:
    return files.read_json(out / f"{part}.json", dict[str, Any])


def noted(out: Path, part: str, name: str, outcome: dict[str, Any]) -> None:
    files.write(out / f"{part}.json", json.dumps({**known(out, part), name: outcome}, indent=1) + "\n")


def measure(out: Path, asked: list[Row], deadline: float, source: str) -> None:
    """Take every row that is not done, until the deadline, and write down each as it ends."""
    for row in asked:
        left = deadline - time.monotonic()
        if known(out, row.part).get(row.name, {}).get("state") == "done":
            continue
        if row.reason or left < 10:
            outcome = {"state": "skipped", "reason": row.reason or "no time was left"}
        else:
            outcome = taken(row, min(row.limit, left), out / "gpu.log")
        noted(out, row.part, row.name, outcome | {"commit": source})
        print(f"({row.part}) {row.name}: {outcome['state']} {outcome.get('reason', '')}", flush=True)
        gpu_page.written(out)
        if row.name == gpu_page.RATE and outcome["state"] != "done":
            raise SystemExit("no product of matrices ran on this device; --smoke runs on a CPU")


def estimate(out: Path, seconds: float, only: str = "") -> None:
    """Put `jdm estimate`'s numbers beside the training steps whose names begin so, where they are not yet."""
    start = time.monotonic()
    for part in ("a", "b"):
        for name, outcome in known(out, part).items():
            left = seconds - (time.monotonic() - start)
            wanted = name.startswith(only) and outcome["state"] != "skipped" and name != gpu_page.RATE
            if wanted and left > 0 and "estimate" not in outcome:
                step = Step(**{**outcome["asked"][0], "device": "cpu"})
                made = taken(Row(part, name, gpu_step.estimated, (step,), left), left, out / "gpu.log")
                noted(out, part, name, outcome | ({"estimate": made["found"]} if made["state"] == "done" else {}))
                print(f"({part}) {name}: estimate {made['state']}", flush=True)
    gpu_page.written(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write a.json to d.json, gpu.md and gpu.log to")
    parser.add_argument("--minutes", type=float, default=10, help="no row goes on after these")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--z-image", default="", metavar="FOLDER", help="a diffusers folder, of which the configs are "
                        "enough, in place of the published Z-Image")
    parser.add_argument("--commit", default="", help="of the source, where it is a copy that git does not know")
    parser.add_argument("--page", action="store_true", help="only estimate what was measured, and write the page")
    parser.add_argument("--smoke", action="store_true", help="toy sizes on a CPU")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    device, deadline = "cpu" if args.smoke else args.device, time.monotonic() + 60 * args.minutes
    if not args.page:
        measure(args.out, rows(device, args.z_image, args.smoke), deadline, args.commit or commit())
    estimate(args.out, float("inf") if args.page else deadline - time.monotonic(),
             "plain" if args.smoke else "")
    print(args.out / "gpu.md")


if __name__ == "__main__":
    main()
