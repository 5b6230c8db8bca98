"""Samples per second of JDM at SD1.5's real shapes: full copies, one shared backbone, and the latter compiled.

    python benchmarks/sd15_step.py [--device cuda] [--batch 4] [--rounds 10] [--json step.json]
    python benchmarks/sd15_step.py --device cpu --tiny --only plain ours

Weights are random, since the cost of a step does not depend on them. Each row runs in its own process, so that peaks do
not mix. Model FLOPs are those of a step without recomputation, from `jdm estimate`; utilisation is their rate relative
to that of a bf16 matrix product, measured here.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch._dynamo.utils import counters

from jdm import loading
from jdm.cost.estimate import estimate
from jdm.cost.known_configs import without_weights
from jdm.models import execution, published
from jdm.recipes import find
from jdm.run import Data, Run
from jdm.training.loop import Trainer

ROWS = {"plain": "full copies, float32 weights, bf16 autocast",
        "ours": "one frozen bf16 backbone with adapters",
        "compiled": "one frozen bf16 backbone with adapters, compiled"}
TINY = {
    "unet": {"sample_size": 8, "cross_attention_dim": 32, "attention_head_dim": 2, "block_out_channels": (32, 32),
             "layers_per_block": 1, "norm_num_groups": 8, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
             "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
    "vae": {**published.VAE, "block_out_channels": (16,) * 4, "layers_per_block": 1, "norm_num_groups": 8},
    "text_encoder": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                     "projection_dim": 32},
    "scheduler": published.SCHEDULER}


def run_of(row: str, args: argparse.Namespace, out: Path) -> Run:
    """The recipe's run, as the row has it, on packaged pictures."""
    run = find("sd15-canny")()
    data = Data(split="test[:256]", validation="test[:256]", size=64 if args.tiny else 512)
    run = replace(run, out=out, data=data, batch=args.batch, accumulate=1, shard=1, device=args.device,
                  precision="bf16", steps=10**6, save_every=10**6, log_every=10**6, probe_every=0)
    if row == "plain":
        method = replace(run.method, fake=replace(run.method.fake, rank=0))
        return replace(run, checkpointing=False, compile=False, method=method)
    return replace(run, compile=row == "compiled")


@contextmanager
def stand_ins(run: Run, row: str, tiny: bool) -> Iterator[None]:
    """Context in which the recipe's model has random weights; frozen weights of the plain row stay in float32."""
    def at_random(name: str):
        with torch.device(run.device):
            return without_weights(name)

    kept = patch.object(execution, "_cast_frozen", lambda *_: None) if row == "plain" else nullcontext()
    configs = {run.model: TINY} if tiny else {}
    with patch.dict(published.PUBLISHED, configs), patch.object(loading, "load_model", at_random), kept:
        yield


def measured(row: str, args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step, FLOPs and peak memory of a row."""
    with tempfile.TemporaryDirectory() as folder:
        run = run_of(row, args, Path(folder))
        with stand_ins(run, row, args.tiny):
            trainer = Trainer(run)
            first = clocked(trainer, 0, run.device)
            for step in range(1, args.warmup):
                clocked(trainer, step, run.device)
            graphs = counters["stats"]["unique_graphs"]
            times = [clocked(trainer, args.warmup + k, run.device) for k in range(args.rounds)]
            seconds, peak = statistics.median(times), peak_memory(run.device)
            late = counters["stats"]["unique_graphs"] - graphs
            del trainer
            flops = estimate(replace(run, checkpointing=False, compile=False)).flops
    return {"seconds": seconds, "samples_per_second": run.batch / seconds, "flops": flops, "memory": peak,
            "first_step": first, "graphs": graphs, "graphs_after_warmup": late}


def clocked(trainer: Trainer, step: int, device: str) -> float:
    start = time.perf_counter()
    trainer.step(step)
    settled(device)
    return time.perf_counter() - start


def settled(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def peak_memory(device: str) -> float:
    """Peak memory in bytes: PyTorch's count on a GPU, the process's resident set on a CPU."""
    if torch.device(device).type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def matmul_rate(device: str, side: int) -> float:
    """FLOP/s of a bf16 product of two [side, side] matrices: the median of 20."""
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    times = []
    for _ in range(25):
        settled(device)
        start = time.perf_counter()
        torch.mm(a, b)
        settled(device)
        times.append(time.perf_counter() - start)
    return 2 * side**3 / statistics.median(times[5:])


def with_ratios(rows: dict[str, dict[str, float]], rate: float) -> dict[str, dict[str, float]]:
    """Adds to each row its utilisation, and its speed and memory relative to the first row."""
    first = next(iter(rows.values()))
    return {name: row | {"mfu": row["flops"] / row["seconds"] / rate,
                         "speed_ratio": row["samples_per_second"] / first["samples_per_second"],
                         "memory_ratio": row["memory"] / first["memory"]} for name, row in rows.items()}


def alone(fn, *args):
    """fn(*args), run in a separate process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(fn, *args).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10, help="timed steps")
    parser.add_argument("--warmup", type=int, default=4, help="untimed steps first, the first of which compiles")
    parser.add_argument("--tiny", action="store_true", help="narrow networks at 64 px, for a CPU")
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rate = alone(matmul_rate, args.device, 1024 if torch.device(args.device).type == "cpu" else 8192)
    rows = with_ratios({row: alone(measured, row, args) for row in args.only}, rate)
    print(f"{'samples/s':>10} {'ratio':>6} {'MFU':>7} {'GiB':>7} {'ratio':>6} {'first step':>11}")
    for name, r in rows.items():
        print(f"{r['samples_per_second']:10.3f} {r['speed_ratio']:6.2f} {r['mfu']:7.2%} {r['memory'] / 2**30:7.2f} "
              f"{r['memory_ratio']:6.2f} {r['first_step']:9.1f} s  {name}: {ROWS[name]}")
    chip = torch.cuda.get_device_name() if torch.device(args.device).type == "cuda" else platform.machine()
    print(f"bf16 products at {rate / 1e12:.3f} TFLOP/s, batch {args.batch}, {64 if args.tiny else 512} px, "
          f"{args.rounds} steps after {args.warmup}, torch {torch.__version__}, {chip}")
    if args.json:
        args.json.write_text(json.dumps({"rate": rate, "chip": chip, "batch": args.batch, "torch": torch.__version__,
                                         "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
