"""The time of one JDM iteration compared with that of the network passes it consists of.

    python benchmarks/step_time.py [--batch 64] [--rounds 7] [--model nano-sd]

Full iterations (data, control, losses, clipping, optimisers, EMA, logging) alternate with the bare passes, so that
both run under the same conditions. Prints each pass by name, their sum, the optimiser steps, and the ratio of medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from jdm.loading import Loaded
from jdm.methods.networks import Networks
from jdm.methods.step import Step
from jdm.recipes import find
from jdm.run import Run
from jdm.space import unit
from jdm.training.trainer import Trainer


def bare_passes(run: Run) -> dict[str, Callable[[], object]]:
    """The minimal list for one iteration of JDM: each x once, cond and uncond in one batch."""
    loaded = Loaded(run)
    declared = run.method.distillation()
    nets = Networks(loaded, declared.student, declared.branch, declared.fake)
    settings = declared.posteriors[0]
    nets.add_posterior(settings)
    control = loaded.control
    step = Step(nets, loaded.batches(), control, 0)
    assert control is not None
    x_t, t, _ = step.noised("bench", nets.schedule, 0.02, 0.98)
    index, text = nets.schedule.timestep(t), nets.text(step.y)
    both_x, both_index = torch.cat([x_t, x_t]), torch.cat([index, index])
    both_text = torch.cat([text, nets.text([""] * len(step.y))])
    shown = control.image(step.c)
    at = nets.schedule.timestep(nets.schedule.t(nets.generator.levels[0]).expand(len(x_t)))
    student, posterior = [*nets.student.parameters()], nets.posteriors[settings].score.net
    fake = [p for parameters, _ in nets.fake_groups(declared.fake) for p in parameters]
    lora = list(nets.adapters["posterior"].parameters())

    def generator() -> None:
        out = nets.student(step.z, at, text, shown)
        torch.autograd.grad(out, student, x_t, allow_unused=True)

    def real() -> None:
        with torch.no_grad():
            nets.real(both_x, both_index, both_text)

    def fake_forward() -> None:
        with torch.no_grad():
            nets.fake.net(x_t, index, text)

    def condition() -> None:
        noisy = x_t.clone().requires_grad_()
        out = posterior(noisy, index, text)
        pixels = nets.space.decode(out)
        torch.autograd.grad(control.log_prob(unit(pixels), step.c, step.images).sum(), noisy)

    def fake_training() -> None:
        torch.autograd.grad(nets.fake.net(x_t, index, text), fake, x_t, allow_unused=True)

    def target() -> None:
        with torch.no_grad():
            posterior(x_t, index, text)

    def posterior_training() -> None:
        out = posterior(x_t, index, text)
        torch.autograd.grad(out, lora, x_t, allow_unused=True)

    return {
        "generator: UNet + ControlNet, forward and backward": generator,
        "real score: cond and uncond in one batch, forward": real,
        "fake score: forward": fake_forward,
        "posterior, decoder and likelihood: forward, backward to x_t": condition,
        "fake score's training: forward and backward": fake_training,
        "posterior's target: forward": target,
        "posterior's training: forward and backward": posterior_training,
    }


def optimiser_steps(trainer: Trainer) -> Callable[[], object]:
    """Returns a function that steps every optimiser once, at a learning rate of 0."""
    optimizers = trainer.optimizers.values()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for p in group["params"]:
                p.grad = torch.zeros_like(p)

    def steps() -> None:
        for optimizer in optimizers:
            optimizer.step()

    return steps


def clocked(fn: Callable[[], object]) -> float:
    start = time.perf_counter()
    fn()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=20, help="untimed full iterations first; they encode prompts")
    parser.add_argument("--model", default="nano-sd")
    parser.add_argument("--split", default="test")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = find("nano-canny")()
        run = replace(run, out=Path(folder), batch=args.batch, model=args.model, log_every=1, probe_every=0,
                      data=replace(run.data, split=args.split, validation=args.split))
        passes = bare_passes(run)
        trainer = Trainer(run)
        times: dict[str, list[float]] = {name: [] for name in [*passes, "optimiser steps", "full iteration"]}
        for step in range(args.warmup):
            trainer.step(step)
        for round_number in range(args.rounds + 1):
            for name, fn in passes.items():
                times[name].append(clocked(fn))
            times["full iteration"].append(clocked(lambda n=round_number: trainer.step(args.warmup + n)))
            times["optimiser steps"].append(clocked(optimiser_steps(trainer)))
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    bare = sum(medians[name] for name in passes)
    full = medians["full iteration"]
    for name, value in medians.items():
        print(f"{value * 1e3:9.1f} ms  {name}")
    print(f"{bare * 1e3:9.1f} ms  sum of the bare passes")
    print(f"ratio of the full iteration to the bare passes: {full / bare:.3f}; "
          f"with the optimiser steps included: {full / (bare + medians['optimiser steps']):.3f}")
    print(f"batch {args.batch}, {args.rounds} rounds, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"{platform.machine()}")
    if args.json:
        args.json.write_text(json.dumps(medians | {"bare": bare, "ratio": full / bare}, indent=1) + "\n")


if __name__ == "__main__":
    main()
