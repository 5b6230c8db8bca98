"""`benchmarks/gpu.py` takes every part through on a CPU, ends what runs too long, and judges by its numbers."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


def fail(error):
    raise RuntimeError(error)


def step(seconds, memory, estimate=None):
    """A training step's outcome, of which the model needs 100 FLOPs."""
    outcome = {"state": "done", "commit": "abc", "asked": [{}], "found": {
        "samples_per_second": 4 / seconds, "seconds": seconds, "least": seconds, "most": seconds, "memory": memory,
        "first_step": 1.0}}
    return outcome | ({"estimate": {"memory": estimate, "model_flops": 100, "seconds": {"h100": 0.25}}} if estimate
                      else {})


@pytest.mark.slow
def test_smoke_takes_every_part_through(tmp_path):
    done = subprocess.run([sys.executable, BENCHMARKS / "gpu.py", tmp_path, "--smoke", "--commit", "abc"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    log = (tmp_path / "gpu.log").read_text()
    parts = {part: json.loads((tmp_path / f"{part}.json").read_text()) for part in "abcd"}
    states = {name: outcome["state"] for rows in parts.values() for name, outcome in rows.items()}
    skipped = states.pop("Z-Image")
    assert skipped == "skipped"
    assert set(states.values()) == {"done"}, log[-3000:]
    assert parts["c"]["pytest -m gpu"]["found"]["failed"] == 0 < parts["c"]["pytest -m gpu"]["found"]["passed"]
    page = (tmp_path / "gpu.md").read_text()
    assert "Toy sizes on a CPU" in page
    for outcome in parts["d"].values():
        assert f"{outcome['found']['seconds'] * 1e3:.1f} [" in page
    assert "estimate" in parts["a"]["plain, batch 2"]


@pytest.mark.parametrize(("make", "args", "state", "reason"), [
    (time.sleep, (60,), "out of time", "not finished after 1 s"),
    (fail, ("no luck",), "failed", "RuntimeError: no luck"),
    (os._exit, (7,), "failed", "its process ended with 7")])
def test_a_row_that_ends_badly_says_why(make, args, state, reason, tmp_path):
    import gpu

    start = time.monotonic()
    limit = 1 if make is time.sleep else 55
    outcome = gpu.taken(gpu.Row("a", "bad", make, args, 60), limit, tmp_path / "gpu.log")
    assert outcome["state"] == state
    assert outcome["reason"].startswith(reason)
    assert time.monotonic() - start < 50, "it was not waited for"


def test_without_a_gpu_nothing_is_taken(tmp_path):
    import gpu

    rows = [gpu.Row("a", gpu.gpu_page.RATE, fail, ("no CUDA",), 60), gpu.Row("b", "later", fail, (), 60)]
    with pytest.raises(SystemExit, match="--smoke runs on a CPU"):
        gpu.measure(tmp_path, rows, time.monotonic() + 100, "abc")
    assert json.loads((tmp_path / "a.json").read_text())[gpu.gpu_page.RATE]["reason"] == "RuntimeError: no CUDA"
    assert not (tmp_path / "b.json").exists()


def test_a_second_sitting_takes_what_is_missing(tmp_path, monkeypatch):
    import gpu

    taken = []
    monkeypatch.setattr(gpu, "taken", lambda row, seconds, log: taken.append((row.name, seconds)) or {
        "state": "failed" if row.name == "second" and len(taken) < 3 else "done", "reason": "", "found": {}})
    rows = [gpu.Row("c", name, fail, (), 50) for name in ("first", "second")]
    rows.append(gpu.Row("c", "third", fail, (), 50, "no such model"))
    for _ in range(2):
        gpu.measure(tmp_path, rows, time.monotonic() + 40, "abc")
    assert [name for name, _ in taken] == ["first", "second", "second"]
    assert max(seconds for _, seconds in taken) <= 40, "no row outlasts the sitting"
    assert json.loads((tmp_path / "c.json").read_text())["third"]["reason"] == "no such model"
    gpu.measure(tmp_path, [gpu.Row("c", "late", fail, (), 50)], time.monotonic(), "abc")
    assert json.loads((tmp_path / "c.json").read_text())["late"]["reason"] == "no time was left"


@pytest.mark.parametrize(("ours", "memory", "verdicts"), [
    (0.5, 114, ["met", "met", "met"]), (0.8, 116, ["missed", "missed", "missed"])])
def test_the_page_judges_by_its_numbers(ours, memory, verdicts):
    import gpu_page

    a = {gpu_page.RATE: {"state": "done", "commit": "abc", "asked": ["cuda", 1], "found": {
        "chip": "NVIDIA H100 80GB HBM3", "torch": "2", "cuda": "13", "processor": "16 cores", "python": "3",
        "rate": 400.0}}, "ours, batch 4": step(ours, 100, memory), "plain, batch 4": step(1.0, 200, 200)}
    page = gpu_page.markdown({"a": a, "b": {}, "c": {}, "d": {}})
    table = page.split("## What was asked")[1].split("##")[0].strip().splitlines()[2:]
    assert [line.split("|")[3].strip() for line in table] == verdicts
    assert f"| {4 / ours:.3g} " in page
    assert f"| {1 / ours:.2f} " in page
    assert f"{memory - 100:+d}%" in page
    assert "0.250" in page, "the estimate's seconds on this chip"
