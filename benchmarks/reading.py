"""A training step that reads its pictures from files, beside one whose pictures lie in memory; and `jdm doctor`.

    python benchmarks/reading.py [--pictures 5000] [--side 64] [--format png] [--rounds 30]

Two runs of nano-canny on the same pictures step in turn, so that both meet the same machine; the change is that of the
median, with the middle 95% of resampled rounds. The pictures are Fashion-MNIST's, enlarged, on
grounds of every brightness, and each has a caption beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from before_after import change
from PIL import Image

from jdm.data.batches import Batches
from jdm.data.sources import Pictures, load_pictures
from jdm.recipes import find
from jdm.run import Data
from jdm.training.trainer import Trainer


def write_pictures(folder: Path, n: int, side: int, ending: str) -> None:
    """Write n captioned pictures of side x side pixels."""
    source = load_pictures("fashion-mnist", "test", 32)
    folder.mkdir()
    for i in range(n):
        pixels = source.batch(torch.tensor([i % len(source)]))[0].permute(1, 2, 0).float()
        ground = 255 * i / n
        shaded = (pixels + (255 - pixels) / 255 * ground / 2).byte().numpy()
        Image.fromarray(shaded).resize((side, side)).save(folder / f"{i:05d}.{ending}")
        (folder / f"{i:05d}.txt").write_text(f"thing {i % 50}")


def in_memory(pictures: Pictures, *settings: Any) -> Batches:
    """Batches of pictures that are all decoded beforehand."""
    whole = pictures.images(torch.arange(int(pictures.indices.max()) + 1))
    return Batches(replace(pictures, images=lambda rows: whole[rows], slow=False), *settings)


def trainer_of(folder: Path, out: Path, args: argparse.Namespace) -> Trainer:
    """A run on the folder's pictures."""
    run = find("nano-canny")()
    return Trainer(replace(run, out=out, batch=args.batch, model=args.model, probe_every=0, log_every=1,
                           data=Data(source=str(folder), size=run.data.size)))


def step_times(trainers: Sequence[Trainer], rounds: int, warm_up: int) -> list[list[float]]:
    """Seconds of each trainer's steps, taken in turn."""
    times: list[list[float]] = [[] for _ in trainers]
    for step in range(warm_up + rounds):
        for trainer, seconds in zip(trainers, times, strict=True):
            start = time.perf_counter()
            trainer.step(step)
            seconds.append(time.perf_counter() - start)
    return [seconds[warm_up:] for seconds in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=5000, help="pictures that the runs train on")
    parser.add_argument("--doctor", type=int, default=10000, help="pictures that jdm doctor reads; 0 for none")
    parser.add_argument("--side", type=int, default=64, help="side of the pictures on disk, in pixels")
    parser.add_argument("--format", default="png", help="ending of their files")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=10, help="untimed steps first")
    parser.add_argument("--model", default="nano-sd")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, found = Path(place, "pictures"), {}
        write_pictures(folder, args.pictures, args.side, args.format)
        from_files = trainer_of(folder, Path(place, "files"), args)
        with patch("jdm.loading.Batches", in_memory):
            from_memory = trainer_of(folder, Path(place, "memory"), args)
        memory, files = step_times([from_memory, from_files], args.rounds, args.warm_up)
        slower, low, high = change(memory, files)
        found |= {"memory": memory, "files": files, "slower": slower}
        print(f"a step on {args.pictures:,} pictures of {args.side} px ({args.format}): "
              f"{statistics.median(memory):.3f} s from memory, {statistics.median(files):.3f} s from files, "
              f"{slower:+.1f}% [{low:+.1f}, {high:+.1f}]; "
              f"batch {args.batch}, {args.rounds} rounds, {torch.get_num_threads()} threads")
        if args.doctor:
            many = Path(place, "many")
            write_pictures(many, args.doctor, args.side, args.format)
            start = time.perf_counter()
            done = subprocess.run([sys.executable, "-m", "jdm", "doctor", str(many), "--out", f"{place}/page.html"],
                                  capture_output=True, text=True, env=dict(os.environ))
            found["doctor"] = time.perf_counter() - start
            assert done.returncode == 0, done.stderr
            print(f"jdm doctor on {args.doctor:,} such pictures: {found['doctor']:.0f} s")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
