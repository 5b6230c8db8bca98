"""The benchmarks run, on the tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_an_iteration_is_timed_beside_its_bare_passes(teacher, tmp_path):
    out = tmp_path / "step.json"
    done = subprocess.run([sys.executable, BENCHMARKS / "step_time.py", "--model", teacher, "--batch", "2", "--rounds",
                           "1", "--warmup", "1", "--split", "test[:64]", "--json", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    times = json.loads(out.read_text())
    full, bare, ratio = (times.pop(key) for key in ("full iteration", "bare", "ratio"))
    assert times.pop("optimiser steps") > 0
    assert len(times) == 7, "the passes of one iteration of JDM"
    assert min(times.values()) > 0
    assert bare == pytest.approx(sum(times.values()))
    assert ratio == pytest.approx(full / bare)
    assert f"ratio of the full iteration to the bare passes: {ratio:.3f};" in done.stdout


@pytest.mark.slow
def test_sd15_step_is_timed_against_the_chips_rate(tmp_path):
    out = tmp_path / "step.json"
    done = subprocess.run([sys.executable, BENCHMARKS / "sd15_step.py", "--device", "cpu", "--tiny", "--batch", "2",
                           "--rounds", "2", "--warmup", "1", "--only", "plain", "ours", "--json", out],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    rows, rate = found["rows"], found["rate"]
    assert list(rows) == ["plain", "ours"]
    for row in rows.values():
        assert row["samples_per_second"] == pytest.approx(2 / row["seconds"])
        assert row["mfu"] == pytest.approx(row["flops"] / row["seconds"] / rate)
        assert 0 < row["mfu"] < 1
        assert row["memory"] > 2**20
        assert row["graphs"] == row["graphs_after_warmup"] == 0
    plain, ours = rows.values()
    assert plain["speed_ratio"] == plain["memory_ratio"] == 1
    assert ours["speed_ratio"] == pytest.approx(ours["samples_per_second"] / plain["samples_per_second"])
    assert ours["memory_ratio"] == pytest.approx(ours["memory"] / plain["memory"])
    assert f"{ours['mfu']:7.2%}" in done.stdout


def test_choosing_page_is_of_the_results():
    docs = BENCHMARKS.parent / "docs"
    done = subprocess.run([sys.executable, BENCHMARKS / "choosing.py", "/dev/stdout"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    page = (docs / "choosing.md").read_text()
    assert done.stdout.removesuffix("/dev/stdout\n") == page
    whole = json.loads((docs / "results" / "2026-11-20-table1.json").read_text())
    for row in (row for row in whole["rows"] if row["row"] == "nct"):
        for column, cell in row["cells"].items():
            if cell["records"]:
                value = cell["values"]["fd"]
                (line,) = [line for line in page.splitlines() if line.startswith("| 1 ") and f"| {column} " in line
                           and "| NCT " in line]
                assert f"{value['mean']:.2f} ± {value['spread']:.2f}" in line
