"""Start-up, load and a training step of two source trees, run in turn, so that both meet the same machine.

    python benchmarks/before_after.py BEFORE/src src [--rounds 15]

Each time is that of a fresh process: the CPU's, user and system together, which other work on the machine changes
least. The change is that of the median, with the middle 95% of 2,000 bootstrap samples of the rounds; a process of a
fraction of a second is run ten times as often.
"""

import argparse
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

IMPORT = "import jdm"
LOAD = """
try: from jdm.library import load_model
except ImportError: from jdm.models.library import load_model
load_model("nano-canny")
"""
# The steps alone are timed: importing and loading are rows of their own.
STEPS = """
import sys, tempfile, time
from dataclasses import replace
from pathlib import Path
try: from jdm.training.trainer import Trainer
except ImportError: from jdm.train import Trainer
from jdm.recipes import all_recipes
import torch
torch.set_num_threads(1)
run = all_recipes()["nano-canny"]()
data = replace(run.data, split="test[:256]", validation="test[:64]")
with tempfile.TemporaryDirectory() as out:
    trainer = Trainer(replace(run, out=Path(out), data=data, batch=16, probe_every=0))
    for step in range(2): trainer.step(step)
    start = time.process_time()
    for step in range(2, 8): trainer.step(step)
    print((time.process_time() - start) / 6)
"""
QUICK = ("`jdm --help`", "`import jdm`")  # run ten times as often
WORK = {
    "`jdm --help`": ["-m", "jdm", "--help"],
    "`import jdm`": ["-c", IMPORT],
    "load nano-canny": ["-c", LOAD],
    "`jdm sample nano-canny --n 1`": ["-m", "jdm", "sample", "nano-canny", "--prompt", "a boot", "--n", "1", "--image",
                                      "photo.png", "--out", "drawn"],
    "a training step of nano-canny, batch 16": ["-c", STEPS],
}


def seconds(command: list[str], source: Path, folder: Path) -> float:
    """CPU seconds of a process, or those that it prints, where it times its own work."""
    env = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen([sys.executable, *command], env=env, cwd=folder, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        said = process.stdout.read().decode()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[:2]} of {source} ended with {process.returncode}")
    return float(said) if STEPS in command else used.ru_utime + used.ru_stime


def interleaved(command: list[str], trees: list[Path], rounds: int) -> list[list[float]]:
    """Seconds of each round, a list for each tree; each tree goes first in half of the rounds."""
    times: list[list[float]] = [[] for _ in trees]
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch, str(k)) for k in range(len(trees))]
        for folder in folders:
            folder.mkdir()
            Image.linear_gradient("L").convert("RGB").save(folder / "photo.png")
        for number in range(-1, rounds):  # the first fills caches and is not counted
            for k in ((0, 1), (1, 0))[number % 2]:
                took = seconds(command, trees[k], folders[k])
                times[k] += [took] if number >= 0 else []
    return times


def change(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """The change of the median in percent, and the middle 95% of it over 2,000 resamplings of the rounds."""
    def of(*times: Sequence[float]) -> float:
        return 100 * (statistics.median(times[1]) / statistics.median(times[0]) - 1)

    rng = random.Random(0)
    drawn = sorted(of(*(rng.choices(times, k=len(times)) for times in (before, after))) for _ in range(2000))
    return of(before, after), drawn[50], drawn[-51]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="folder that holds the package jdm")
    parser.add_argument("after", type=Path, help="another one")
    parser.add_argument("--rounds", type=int, default=15, help="times that each is run (default: %(default)s)")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    asked = parser.parse_args()
    trees = [asked.before.resolve(), asked.after.resolve()]
    print(f"{platform.machine()}, one thread, medians of {asked.rounds} processes ({10 * asked.rounds} of help and "
          "import)\n\n| | before, s | after, s | change [95%] |\n|---|---|---|---|", flush=True)
    for name in [name for name in WORK if asked.only in name]:
        before, after = interleaved(WORK[name], trees, asked.rounds * (10 if name in QUICK else 1))
        slower, low, high = change(before, after)
        print(f"| {name} | {statistics.median(before):.3f} | {statistics.median(after):.3f} | "
              f"{slower:+.1f}% [{low:+.1f}, {high:+.1f}] |", flush=True)


if __name__ == "__main__":
    main()
