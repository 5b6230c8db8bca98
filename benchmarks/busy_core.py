"""Seconds of a training step, alone and beside a busy process, by how OpenMP's threads wait for one another.

    python benchmarks/busy_core.py [--rounds 5] [--busy 1] [--setting GOMP_SPINCOUNT=3000 ...] [--real-time]

A setting is environment variables, separated by spaces. Each has a process of its own, because OpenMP reads them once,
when it is loaded. The processes take turns, a step each, so that all meet the same load; rounds without and with the
busy process alternate. Beside each median stands how many cores all other processes took meanwhile. --real-time keeps
other programs away from the rounds without the busy process, where the machine has such. Linux only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

OWN = "as jdm starts"
# libgomp waits for 300,000 turns of its loop where no variable says otherwise.
SETTINGS = (OWN, "GOMP_SPINCOUNT=300000", "GOMP_SPINCOUNT=10000", "GOMP_SPINCOUNT=3000", "GOMP_SPINCOUNT=300",
            "OMP_WAIT_POLICY=PASSIVE", "OMP_NUM_THREADS=1")
STATES = ("alone", "busy")
Times = dict[str, dict[str, list[dict[str, float]]]]


def work(calls: Connection, model: str, split: str, batch: int) -> None:
    """Train one step for each call, answered with its seconds and CPU seconds; first sends the number of threads.

    A call says whether the step runs at real-time priority, or is None, which ends it.
    """
    from jdm.recipes import find  # before torch, as in the command line
    from jdm.training.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        run = find("nano-canny")()
        run = replace(run, out=Path(folder), model=model, batch=batch, probe_every=0, save_every=10**6, steps=10**6,
                      data=replace(run.data, split=split, validation=split))
        trainer, step = Trainer(run), 0
        calls.send(json.loads((run.out / "run.json").read_text())["threads"])
        while (first := calls.recv()) is not None:
            prioritise(first)
            start, cpu = time.perf_counter(), time.process_time()
            trainer.step(step)
            calls.send((time.perf_counter() - start, time.process_time() - cpu))
            step += 1


def prioritise(first: bool) -> None:
    """Put every thread of this process before all ordinary ones, or back among them."""
    policy = os.SCHED_RR if first else os.SCHED_OTHER
    for thread in os.listdir("/proc/self/task"):
        os.sched_setscheduler(int(thread), policy, os.sched_param(int(first)))


@contextmanager
def worker(setting: str, *args: object) -> Iterator[Connection]:
    """Context with the connection to a process that works under a setting and under no other OpenMP variable."""
    for name in [name for name in os.environ if name.startswith(("OMP_", "GOMP_"))]:
        del os.environ[name]
    if setting != OWN:
        os.environ.update(part.split("=", 1) for part in setting.split())
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=work, args=(there, *args), daemon=True)
    process.start()
    there.close()
    try:
        yield here
    finally:
        process.kill()
        process.join()


@contextmanager
def others(n: int) -> Iterator[None]:
    """Context in which n other processes keep a core busy each."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def timed(workers: dict[str, Connection], rounds: int, warmup: int, busy: int, real_time: bool) -> Times:
    """Every step's seconds and the cores that others took, by setting and state."""
    times: Times = {name: {state: [] for state in STATES} for name in workers}
    for calls in [*workers.values()] * warmup:
        stepped(calls, False)
    for _ in range(rounds):
        for state in STATES:
            with others(busy if state == "busy" else 0):
                for name, calls in workers.items():
                    times[name][state].append(stepped(calls, real_time and state == "alone"))
    return times


def stepped(calls: Connection, first: bool) -> dict[str, float]:
    before = cpu_seconds()
    calls.send(first)
    seconds, own = calls.recv()
    return {"seconds": seconds, "others": max(0.0, cpu_seconds() - before - own) / seconds}


def cpu_seconds() -> float:
    """CPU time of all processes since the machine started."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def table(times: Times, threads: dict[str, int]) -> str:
    """Markdown: the median step of each setting with its range, and the cores others took."""
    lines = ["| setting | threads | alone, s | others, cores | beside a busy process, s | others, cores |",
             "|---|---|---|---|---|---|"]
    for name, by_state in times.items():
        cells = [cell for state in STATES for cell in spread(by_state[state])]
        lines.append(f"| {name} | {threads[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(steps: Sequence[dict[str, float]]) -> tuple[str, str]:
    seconds = [step["seconds"] for step in steps]
    return (f"{statistics.median(seconds):.2f} [{min(seconds):.2f}, {max(seconds):.2f}]",
            f"{statistics.median(step['others'] for step in steps):.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", action="append", help=f"variables of one row; repeatable; {OWN!r}: none of them")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each setting and state")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps first; they encode prompts")
    parser.add_argument("--busy", type=int, default=1, help="other busy processes")
    parser.add_argument("--real-time", action="store_true", help="rounds without the busy process run at real-time "
                        "priority; needs root")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--model", default="nano-sd")
    parser.add_argument("--split", default="test")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with ExitStack() as stack:
        workers = {name: stack.enter_context(worker(name, args.model, args.split, args.batch))
                   for name in args.setting or SETTINGS}
        threads = {name: calls.recv() for name, calls in workers.items()}
        times = timed(workers, args.rounds, args.warmup, args.busy, args.real_time)
    print(table(times, threads))
    print(f"\nnano-canny, batch {args.batch}, {args.rounds} steps each, {args.busy} busy on {os.cpu_count()} cores, "
          f"{platform.machine()}; median [least, most]")
    if args.json:
        args.json.write_text(json.dumps({"threads": threads, "times": times}, indent=1) + "\n")


if __name__ == "__main__":
    main()
