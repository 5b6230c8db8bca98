"""The benchmarks run, on the tiny model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jdm.data.batches import Batches
from jdm.data.sources import load_pictures

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


def test_settings_of_openmp_are_timed_alone_and_busy(teacher, tmp_path):
    out = tmp_path / "busy.json"
    done = subprocess.run([sys.executable, BENCHMARKS / "busy_core.py", "--model", teacher, "--batch", "2", "--split",
                           "test[:64]", "--rounds", "1", "--warmup", "1", "--setting", "OMP_NUM_THREADS=1",
                           "--setting", "as jdm starts", "--json", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert found["threads"]["OMP_NUM_THREADS=1"] == 1
    for name, states in found["times"].items():
        (alone,), (busy,) = states["alone"], states["busy"]
        assert min(alone["seconds"], busy["seconds"]) > 0
        assert busy["others"] > 0, "the busy process takes a core"
        assert f"| {name} | {found['threads'][name]} | {alone['seconds']:.2f} [" in done.stdout


def test_memory_holds_what_files_hold(tmp_path, monkeypatch):
    """The reading benchmark's yardstick: the same batches, and no file is opened for them."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from reading import in_memory, write_pictures

    write_pictures(tmp_path / "pictures", 12, 40, "png")
    pictures = load_pictures(str(tmp_path / "pictures"), "train", 32)
    wanted = [Batches(pictures, 4, 0)(step).images for step in range(3)]
    memory = in_memory(pictures, 4, 0)
    shutil.rmtree(tmp_path / "pictures")
    assert all(torch.equal(memory(step).images, images) for step, images in enumerate(wanted))
    assert not torch.equal(wanted[0], wanted[1])


def test_steps_from_files_are_timed_beside_memory(teacher, tmp_path):
    out = tmp_path / "reading.json"
    done = subprocess.run([sys.executable, BENCHMARKS / "reading.py", "--model", teacher, "--batch", "2", "--pictures",
                           "40", "--doctor", "30", "--rounds", "3", "--warm-up", "1", "--json", out],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert len(found["memory"]) == len(found["files"]) == 3
    assert min(*found["memory"], *found["files"], found["doctor"]) > 0
    assert f"jdm doctor on 30 such pictures: {found['doctor']:.0f} s" in done.stdout


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
