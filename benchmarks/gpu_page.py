"""The page of `gpu.py`: markdown made from OUT/a.json to OUT/d.json and from nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from gpu_step import ROWS

from jdm import files
from jdm.cost.gpus import GPUS
from jdm.reproduce.page import aligned

RATE = "bf16 products"
NEAR, UTILISED, FASTER = 0.15, 0.45, 2.0  # what is asked: of the estimate's memory, of the chip's rate, of a plain step
GIB = 2.0**30
NONE = "–"
Rows = dict[str, dict[str, Any]]


def written(out: Path) -> Path:
    """Writes OUT/gpu.md anew."""
    parts = {part: files.read_json(out / f"{part}.json", dict[str, Any]) for part in "abcd"}
    return files.write(out / "gpu.md", markdown(parts))


def markdown(parts: dict[str, Rows]) -> str:
    """The page: what was asked and whether it is met, then each part's table, then what is missing and why."""
    a = parts["a"]
    steps = {name: outcome for part in "ab" for name, outcome in parts[part].items() if name != RATE}
    rate = found(a.get(RATE, {})).get("rate")
    body = [f"# What a GPU measured: {found(a.get(RATE, {})).get('chip', 'no chip yet')}", about(parts),
            "## What was asked\n\n" + aligned([["asked", "measured", "verdict"], *verdicts(a, steps, rate)]),
            "## A training step\n\n" + aligned([STEP_HEAD, *(step_row(*item, a, rate) for item in steps.items())])
            if steps else "", tests(parts["c"]), pictures(parts["d"]), missing(parts)]
    return "\n\n".join(part for part in body if part) + "\n"


def found(outcome: dict[str, Any]) -> dict[str, Any]:
    """What a row measured; empty where it measured nothing."""
    return outcome.get("found", {})


def about(parts: dict[str, Rows]) -> str:
    chip = found(parts["a"].get(RATE, {}))
    commits = sorted({outcome["commit"] or "not known" for rows in parts.values() for outcome in rows.values()})
    text = f"{date.today()}, source {', '.join(commits)}."
    if any("dirty" in name for name in commits):
        text += " **Made from changes that are in no commit: not a result.**"
    if any(asked.get("toy") for rows in parts.values() for outcome in rows.values()
           for asked in outcome.get("asked", []) if isinstance(asked, dict)):
        text += " **Toy sizes on a CPU: a trial of the benchmark, not a result.**"
    if chip:
        text += (f" {chip['chip']}, {chip['processor']}, torch {chip['torch']}, CUDA {chip['cuda'] or 'none'}, Python "
                 f"{chip['python']}. bf16 products of square matrices run at {chip['rate'] / 1e12:.3g} TFLOP/s here; "
                 "utilisation is of that rate, with the FLOPs of a step without recomputation.")
    return text + " Weights are random; times are medians. Made by `python benchmarks/gpu.py`."


# Training steps

STEP_HEAD = ("step", "pictures / s", "x plain", "s a step", "utilisation", "peak, GiB", "estimated, GiB", "off by",
             "estimated s", "first step, s")


def step_row(name: str, outcome: dict[str, Any], a: Rows, rate: float | None) -> Sequence[str]:
    own, estimate = found(outcome), outcome.get("estimate", {})
    title = f"{name}: {ROWS[name.split(',')[0]]}" if name.split(",")[0] in ROWS else name
    memory = f"{estimate['memory'] / GIB:.1f}" if estimate else NONE
    if not own:
        return (title, outcome["state"], *[NONE] * 4, memory, *[NONE] * 3)
    faster, used, off = against_plain(name, outcome, a), utilisation(outcome, rate), memory_off(outcome)
    return (title, f"{own['samples_per_second']:.3g}", NONE if faster is None else f"{faster:.2f}",
            f"{own['seconds']:.3f} [{own['least']:.3f}, {own['most']:.3f}]", NONE if used is None else f"{used:.0%}",
            f"{own['memory'] / GIB:.1f}", memory, NONE if off is None else f"{off:+.0%}",
            seconds_estimated(outcome, a), f"{own['first_step']:.1f}")


def utilisation(outcome: dict[str, Any], rate: float | None) -> float | None:
    """The share of the chip's rate; None without an estimate of the FLOPs."""
    if not rate or not found(outcome) or "estimate" not in outcome:
        return None
    return outcome["estimate"]["model_flops"] / found(outcome)["seconds"] / rate


def memory_off(outcome: dict[str, Any]) -> float | None:
    """How far the estimate's memory is from the measured, as a share of the latter."""
    if not found(outcome) or "estimate" not in outcome:
        return None
    return outcome["estimate"]["memory"] / found(outcome)["memory"] - 1


def against_plain(name: str, outcome: dict[str, Any], a: Rows) -> float | None:
    """Samples per second over those of the plain step at the same batch."""
    plain = found(a.get(f"plain, {name.partition(', ')[2]}", {}))
    return found(outcome)["samples_per_second"] / plain["samples_per_second"] if plain and found(outcome) else None


def seconds_estimated(outcome: dict[str, Any], a: Rows) -> str:
    """`jdm estimate`'s seconds, at the utilisation it assumes of the data sheet of a chip it knows."""
    chip = found(a.get(RATE, {})).get("chip", "").lower()
    name = next((key for key in GPUS if key in chip.replace(" ", "")), "")
    seconds = outcome.get("estimate", {}).get("seconds", {}).get(name)
    return NONE if seconds is None else f"{seconds:.3f}"


def verdicts(a: Rows, steps: Rows, rate: float | None) -> Iterator[Sequence[str]]:
    """Each aim with what was measured: of the rows that use our step, the best; of the estimates, the worst."""
    off = [value for outcome in steps.values() if (value := memory_off(outcome)) is not None]
    ours = {name: outcome for name, outcome in a.items() if name.startswith(("ours", "compiled"))}
    used = [value for outcome in ours.values() if (value := utilisation(outcome, rate)) is not None]
    faster = [value for item in ours.items() if (value := against_plain(*item, a)) is not None]
    yield aim(f"every step's memory within {NEAR:.0%} of jdm estimate's", max(off, key=abs, default=None), "{:+.0%}",
              lambda value: abs(value) <= NEAR)
    yield aim(f"at least {UTILISED:.0%} of the chip's bf16 rate", max(used, default=None), "{:.0%}",
              lambda value: value >= UTILISED)
    yield aim(f"at least {FASTER:g} times a plain step", max(faster, default=None), "{:.2f} times",
              lambda value: value >= FASTER)


def aim(asked: str, value: float | None, form: str, met: Any) -> Sequence[str]:
    return (asked, NONE, "not measured") if value is None else (asked, form.format(value),
                                                              "met" if met(value) else "missed")


# The other parts


def tests(rows: Rows) -> str:
    lines = []
    for name, outcome in rows.items():
        if own := found(outcome):
            failures = "".join(f"; FAILED {test}" for test in own["failures"])
            lines.append(f"`{name}`: {own['passed']} passed, {own['failed']} failed, {own['skipped']} skipped, "
                         f"exit code {own['exit_code']}{failures}.")
    return "## Tests\n\n" + "\n\n".join(lines) if lines else ""


def pictures(rows: Rows) -> str:
    """Part d; how many times quicker than the 50 steps."""
    base = next((found(outcome) for name, outcome in rows.items() if name.startswith("50 ")), {})
    body = [[name, own["passes"], f"{own['seconds'] * 1e3:.1f} [{own['least'] * 1e3:.1f}, {own['most'] * 1e3:.1f}]",
             f"{base['seconds'] / own['seconds']:.1f}" if base else NONE, f"{own['first']:.1f}",
             f"{own['memory'] / GIB:.1f}"] for name, outcome in rows.items() if (own := found(outcome))]
    head = ["SD1.5 with a ControlNet, bf16, batch 1", "passes", "ms", "x 50 steps", "first, s", "peak, GiB"]
    return "## A picture\n\n" + aligned([head, *body]) if body else ""


def missing(parts: dict[str, Rows]) -> str:
    lines = [f"- ({part}) {name}: {outcome['state']}; {outcome['reason']}."
             for part, rows in parts.items() for name, outcome in rows.items() if not found(outcome)]
    return "## Not here\n\n" + "\n".join(lines) if lines else ""
