"""Several processes on one CPU against one: gradients, weights, memory, checkpoints, and what happens when one dies."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from jdm.data.noise import Noise, rows_at
from jdm.errors import UsageError
from jdm.levels import Bound
from jdm.library import load_model
from jdm.sharing import sharing
from jdm.training import checkpoint, distributed
from jdm.training.loop import Trainer
from several import run_of
from tiny import nano_canny

HERE = Path(__file__).parents[1]

def command(n: int, *arguments: object) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)] if n > 1 else []
    return [sys.executable, *launch, str(HERE / "several.py"), *map(str, arguments)]


def environment() -> dict[str, str]:
    own = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return own | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    torch.manual_seed(0)
    return tiny.family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def done(tmp_path_factory, teacher):
    """The folder in which several.py has computed ALL."""
    out = tmp_path_factory.mktemp("several")
    ended = subprocess.run(command(1, out, teacher, "all"), capture_output=True, text=True, timeout=600,
                           env=environment(), check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    (out / "said.txt").write_text(ended.stdout)
    return out


def kept(done: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(done / f"{name}.pt")


@pytest.mark.parametrize("several", ["full-2x1", "full-2x2", "full-4x2", "lora-2x2"])
def test_gradients_are_those_of_one_process(done, several):
    ours, theirs = kept(done, f"gradients-{several}"), kept(done, f"gradients-{several[:4]}-1x1")
    assert ours.keys() == theirs.keys()
    for phase in ("fake", "posterior", "generator"):
        a, b = (torch.cat([v.flatten() for k, v in g.items() if k.startswith(phase)]) for g in (ours, theirs))
        assert b.norm() > 0
        assert (a - b).norm() <= 1e-5 * b.norm(), phase


@pytest.mark.parametrize("name", ["replicated", "sharded", "sharded-over-four"])
def test_weights_averages_and_optimisers_are_those_of_one_process_after_ten_steps(done, name):
    close(kept(done, name), kept(done, "whole"))


@pytest.mark.parametrize("name", ["one-to-two", "two-to-four", "two-to-one"])
def test_a_run_goes_on_at_another_number_of_processes(done, name):
    assert sorted(p.name for p in checkpoint.all_checkpoints(done / name)) == ["step-0000008", "step-0000010"]
    close(kept(done, name), kept(done, "whole"))


def close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert sum(v.dtype == torch.float64 for v in theirs.values()) > 100
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key].double(), value.double(), atol=1e-9, rtol=0, msg=key)


@pytest.mark.parametrize(("setting", "share"), [("full-2x1", 1), ("full-2x2", 2), ("full-4x2", 2), ("lora-2x2", 2)])
def test_each_process_holds_its_share_of_the_parameters(done, setting, share):
    lines = re.findall(r"bytes gradients-(\S+) \d held (\d+) of (\d+)", (done / "said.txt").read_text())
    found = [int(held) / int(whole) for name, held, whole in lines if name == setting]
    assert len(found) == int(setting[5])
    assert all(abs(part * share - 1) < 0.1 for part in found)


def test_sharded_networks_train_probe_and_export_as_a_plain_folder(done):
    exported = load_model(str(done / "model" / "model"))
    place = checkpoint.last(done / "model")
    assert place
    assert not (place / checkpoint.WHOLE).exists()
    assert exported.levels == (625,)
    parts = {"unet": exported.unet, "controlnet": exported.controlnet}
    found = {f"{name}.{k}": v for name, part in parts.items() for k, v in part.state_dict().items()}
    averages = kept(done, "model")
    assert found.keys() == averages.keys()
    assert all(torch.equal(found[k], averages[k]) for k in averages)
    rows = [json.loads(line) for line in (done / "model" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(0 < row["probe/consistency"] < 1 for row in rows)


def test_processes_agree_on_the_best_probe_export_it_and_end_together(done):
    exported, best, last = load_model(str(done / "judged" / "model")), kept(done, "judged-2"), kept(done, "judged-3")
    parts = {"unet": exported.unet, "controlnet": exported.controlnet}
    found = {f"{name}.{k}": v for name, part in parts.items() for k, v in part.state_dict().items()}
    assert found.keys() == best.keys()
    assert all(torch.equal(found[k], best[k]) for k in best)
    assert not all(torch.equal(last[k], best[k]) for k in best)
    assert not (done / "judged-4.pt").exists()
    assert checkpoint.last(done / "judged").name == "step-0000003"


def started(tmp_path: Path, teacher: Path, n: int) -> tuple[subprocess.Popen, dict[int, int]]:
    """A run of n processes that has saved a checkpoint, and its processes by rank."""
    process = subprocess.Popen(command(n, tmp_path, teacher, f"endless:{n}:run"), stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, env=environment())
    assert process.stdout
    pids: dict[int, int] = {}
    while len(pids) < n:
        line = process.stdout.readline()
        assert line, "the run ended before it began"
        if line.startswith("pid "):
            pids[int(line.split()[1])] = int(line.split()[2])
    end = time.monotonic() + 120
    while checkpoint.last(tmp_path / "run") is None:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.1)
    return process, pids


def test_a_killed_process_ends_the_run_in_seconds_with_a_message_and_a_usable_checkpoint(tmp_path, teacher):
    process, pids = started(tmp_path, teacher, 2)
    os.kill(pids[1], signal.SIGKILL)
    clock = time.monotonic()
    said, _ = process.communicate(timeout=60)
    assert time.monotonic() - clock < 30
    assert process.returncode != 0
    assert "another process of this run was lost at step" in said
    assert "it goes on from" in said
    assert_goes_on(tmp_path / "run", teacher)


@pytest.mark.parametrize("full", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_disk_that_is_full_for_one_process_ends_the_run_with_a_message_and_a_usable_checkpoint(tmp_path, teacher,
                                                                                                 full):
    process, pids = started(tmp_path, teacher, 2)
    resource.prlimit(pids[full], resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))  # a shard is larger
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert re.search(rf"RunError: checkpoint of step \d+ could not be written \(process {full}: \w+Error: .*\); "
                     r"free some space and run the same command again to resume from \S*step-\d+\n", said)
    folder = tmp_path / "run" / "checkpoints"
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []
    assert_goes_on(tmp_path / "run", teacher)


@pytest.mark.parametrize("n", [1, 2])
def test_sigterm_finishes_the_step_saves_it_and_exits_as_schedulers_expect(tmp_path, teacher, n):
    process, pids = started(tmp_path, teacher, n)
    for pid in pids.values():
        os.kill(pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == (143 if n == 1 else 1)  # torchrun's own is 1 whatever its processes' was
    assert "TerminatedError: asked to end; saved" in said
    last = checkpoint.last(tmp_path / "run")
    assert last
    logged = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert last.name == f"step-{len(logged):07d}"  # every step that was logged
    assert_goes_on(tmp_path / "run", teacher)


def assert_goes_on(out: Path, teacher: Path) -> None:
    place = checkpoint.last(out)
    assert place
    trainer = Trainer(replace(run_of(out, teacher, 1), steps=100_000))
    assert trainer.start == int(place.name.removeprefix("step-")) > 0
    trainer.step(trainer.start)


@pytest.mark.parametrize("turns", [1, 2, 4])
def test_every_share_of_a_batch_has_the_rows_and_the_noise_of_the_whole(turns):
    whole_rows, whole = rows_at(100, 8, 3, 5), Noise(3, 5)
    rows, z, u = [], [], []
    for turn in range(turns):
        with sharing(turn, turns):
            rows.append(rows_at(100, 8, 3, 5))
            part = Noise(3, 5)
        z.append(part.normal("z", (8 // turns, 2, 2)))
        u.append(part.uniform("u", 8 // turns))
    assert torch.equal(torch.cat(rows), whole_rows)
    assert torch.equal(torch.cat(z), whole.normal("z", (8, 2, 2)))
    assert torch.equal(torch.cat(u), whole.uniform("u", 8))


@pytest.mark.parametrize(("changes", "message"), [
    ({"shard": 2}, "--shard 2 does not divide 1 processes"), ({"shard": 0}, "shard and accumulate must be at least 1"),
    ({"accumulate": 3}, "a batch of 4 does not divide into 1 processes times 3 accumulated parts")])
def test_a_batch_or_sharding_that_does_not_divide_is_refused(tmp_path, teacher, changes, message):
    with pytest.raises(UsageError, match=message):
        Trainer(tiny.run(nano_canny(), tmp_path, teacher, **changes))


@pytest.mark.parametrize("ranks", ["full", "lora"])
def test_accumulation_changes_no_gradient_where_no_bound_looks_at_the_batch(tmp_path, teacher, ranks):
    found = []
    for turns in (1, 2):
        run = run_of(tmp_path / str(turns), teacher, 1, ranks, accumulate=turns)
        condition = replace(run.method.condition, bound=Bound(0.0, 0.0))
        trainer = Trainer(replace(run, method=replace(run.method, condition=condition)))
        begun = trainer._begun(0, 0) if turns == 1 else None
        found.append([trainer._gradients(phase, 0, 0, begun)[0] for phase in trainer.task.phases])
    for whole, parts in zip(*found, strict=True):
        a, b = (torch.cat([g.flatten() for g in gradients if g is not None]) for gradients in (parts, whole))
        assert b.norm() > 0
        assert (a - b).norm() < 1e-5 * b.norm()


def test_accumulation_does_not_change_how_often_each_network_is_updated(tmp_path, teacher):
    counts = []
    for turns in (1, 2):
        trainer = Trainer(tiny.run(nano_canny(), tmp_path / str(turns), teacher, accumulate=turns))
        trainer.step(0)
        counts.append([int(next(iter(o.state.values()))["step"]) for o in trainer.optimizers.values()])
    assert counts[0] == counts[1]
    assert distributed.size() == 1
