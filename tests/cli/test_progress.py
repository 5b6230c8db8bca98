"""Progress: a line a minute where there is no terminal, and rate, time left and peak memory wherever it is shown."""

import io
import re

import pytest
from rich.console import Console

from jdm.cli import progress
from jdm.cli.progress import PartsProgress, TrainingProgress
from jdm.metrics.timing import peak_memory_mb


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def plain() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


def test_a_line_a_minute_without_a_terminal(clock, capsys):
    with TrainingProgress(1000, console=plain()) as shown:
        for done in range(1, 301):  # two steps a second
            shown(done, {"fidelity": 0.5, "condition": 0.25, "generator/loss": 9.0})
            clock[0] += 0.5
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/1000", "step 121/1000", "step 241/1000"]
    assert "  2 steps/s  440 s left  " not in lines[1]
    assert "  2 steps/s  7 min left  " in lines[1]
    assert "fidelity 0.5  condition 0.25" in lines[1]
    assert "generator" not in lines[1]


def test_probes_and_the_end_are_said_at_once(clock, capsys):
    with TrainingProgress(4, console=plain()) as shown:
        for done in range(1, 5):
            shown(done, {"vae/loss": 1.0} | ({"probe/fd": 7.0} if done == 2 else {}))
            clock[0] += 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/4", "step 2/4", "step 4/4"]
    assert all("fd 7" in line for line in lines[1:])
    assert "0 s left" in lines[-1]


def test_a_resumed_run_counts_from_where_it_began(clock, capsys):
    with TrainingProgress(1000, console=plain()) as shown:
        shown(901, {})
        clock[0] += 100
        shown(911, {})
    first, second = capsys.readouterr().err.splitlines()
    assert "steps/s" not in first
    assert "0.1 steps/s  15 min left" in second


def test_peak_memory_is_the_processs(clock, capsys):
    shown = TrainingProgress(10, console=plain())
    shown(1, {})
    said = re.search(r"peak ([\d.]+) GiB", capsys.readouterr().err)
    assert said
    assert float(said[1]) == pytest.approx(peak_memory_mb() / 1024, abs=0.02)


def test_a_terminal_gets_a_bar(clock, capsys):
    file = io.StringIO()
    with TrainingProgress(10, console=Console(file=file, force_terminal=True, width=160, color_system=None)) as shown:
        for done in range(1, 11):
            shown(done, {"fidelity": 0.5})
            clock[0] += 1
    drawn = file.getvalue()
    assert re.search(r"10/10 1 steps/s  0 s left  peak [\d.]+ GiB  fidelity 0.5", drawn)
    assert capsys.readouterr().err == ""


def test_a_dumb_terminal_gets_lines(clock, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with TrainingProgress(10, console=Console(file=io.StringIO(), force_terminal=True)) as shown:
        shown(1, {})
    assert capsys.readouterr().err.startswith("step 1/10  peak")


def test_parts_are_counted_each(clock, capsys):
    with PartsProgress(console=plain()) as shown:
        for done in range(0, 5000, 10):
            shown("pictures", done, 5000)
            clock[0] += 0.5
        shown("pictures", 5000, 5000)
        shown("texts", 1, 1)
        shown("train shards", 0, 0)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "pictures 0/5000", "pictures 1200/5000", "pictures 2400/5000", "pictures 3600/5000", "pictures 4800/5000",
        "pictures 5000/5000", "texts 1/1", "train shards"]
    assert "20 items/s  3 min left  peak" in lines[1]


def test_a_log_that_is_gone_ends_no_run(clock, monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("sys.stderr", Full())
    TrainingProgress(10, console=plain())(1, {})


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (7140, "119 min"),
                                               (7200, "2 h 0 min"), (100_000, "27 h 47 min")])
def test_times_are_spelled(seconds, text):
    assert progress._spelled(seconds) == text
