"""Several processes on one CPU against one: gradients, weights, memory, checkpoints, and what happens when one dies."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops

import tiny
from jdm.data.noise import Noise, rows_at
from jdm.errors import RunError, UsageError
from jdm.library import load_model
from jdm.sharing import sharing
from jdm.training import checkpoint, distributed, previews
from jdm.training.trainer import Trainer
from several import FOUR, endless_run, run_of
from tiny import nano_canny

SEVERAL = Path(__file__).parents[1] / "several.py"
OF_MORE = [pytest.param(name, marks=pytest.mark.slow) for name in ("lora-2x2", "full-4x2", "full-4x4")]
HANGS = 300  # seconds after which something hangs, on a machine however busy; gloo itself waits for ten minutes


def command(*arguments: object, torchrun: int = 0) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(torchrun)] if torchrun else []
    return [sys.executable, *launch, str(SEVERAL), *map(str, arguments)]


def environment() -> dict[str, str]:
    own = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return own | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    torch.manual_seed(0)
    return tiny.family(tmp_path_factory.mktemp("family"))


def computed(out: Path, teacher: Path, *actions: str) -> str:
    """What several.py prints while it does the actions."""
    ended = subprocess.run(command(out, teacher, *actions), capture_output=True, text=True, timeout=6 * HANGS,
                           env=environment(), check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout


@pytest.fixture(scope="module")
def done(tmp_path_factory, teacher):
    """The folder in which several.py has computed ALL."""
    out = tmp_path_factory.mktemp("several")
    (out / "said.txt").write_text(computed(out, teacher, "all"))
    return out


@pytest.fixture(scope="module")
def four(done, teacher):
    """The same folder after four processes have computed FOUR in it; minutes on two cores."""
    with (done / "said.txt").open("a") as said:
        said.write(computed(done, teacher, "forked:4", *FOUR))
    return done


@pytest.fixture(scope="module")
def more(done, teacher):
    """The same folder after several.py has computed MORE in it."""
    with (done / "said.txt").open("a") as said:
        said.write(computed(done, teacher, "more"))
    return done


def folder_of(request, name: str) -> Path:
    return request.getfixturevalue("four" if "four" in name or "-4x" in name else "more" if "lora" in name else "done")


def kept(done: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(done / f"{name}.pt")


@pytest.mark.parametrize("several", ["full-2x1", "full-2x2", *OF_MORE])
def test_gradients_are_those_of_one_process(request, several):
    done = folder_of(request, several)
    ours, theirs = kept(done, f"gradients-{several}"), kept(done, f"gradients-{several[:4]}-1x1")
    assert ours.keys() == theirs.keys()
    for phase in ("fake", "posterior", "generator"):
        a, b = (torch.cat([v.flatten() for k, v in g.items() if k.startswith(phase)]) for g in (ours, theirs))
        assert a.dtype == b.dtype == torch.float64
        assert b.norm() > 0
        assert (a - b).norm() <= 1e-9 * b.norm(), phase


@pytest.mark.slow
@pytest.mark.parametrize("several", ["gan-2x1", "gan-2x2"])
def test_a_terms_module_is_sharded_like_others(more, several):
    """To 1e-4, in float32: the order of sums differs."""
    ours, theirs = kept(more, f"gradients-{several}"), kept(more, "gradients-gan-1x1")
    assert ours.keys() == theirs.keys()
    for phase in ("fake", "regulariser", "generator"):
        a, b = (torch.cat([v.flatten() for k, v in g.items() if k.startswith(phase)]) for g in (ours, theirs))
        assert b.norm() > 0
        assert (a - b).norm() <= 1e-4 * b.norm(), phase


@pytest.mark.parametrize("name", ["replicated", "sharded"])
def test_several_processes_train_as_one(done, name):
    close(kept(done, name), kept(done, "whole"))


@pytest.mark.slow
def test_four_shards_train_as_one_process(four):
    close(kept(four, "sharded-over-four"), kept(four, "whole"))


@pytest.mark.parametrize("name", ["one-to-two", "two-to-one", pytest.param("two-to-four", marks=pytest.mark.slow)])
def test_a_run_resumes_at_another_process_count(request, name):
    done = folder_of(request, name)
    assert sorted(p.name for p in checkpoint.all_checkpoints(done / name)) == ["step-0000003", "step-0000005"]
    close(kept(done, name), kept(done, "whole"))


def close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Networks, averages and optimisers are equal."""
    assert ours.keys() == theirs.keys()
    assert sum(v.dtype == torch.float64 for v in theirs.values()) > 100
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key].double(), value.double(), atol=1e-9, rtol=0, msg=key)


@pytest.mark.parametrize("setting", ["full-2x1", "full-2x2", *OF_MORE])
def test_each_process_holds_its_share_of_the_parameters(request, setting):
    done, share = folder_of(request, setting), int(setting[-1])
    lines = re.findall(r"bytes gradients-(\S+) \d held (\d+) of (\d+)", (done / "said.txt").read_text())
    found = [int(held) / int(whole) for name, held, whole in lines if name == setting]
    assert len(found) == int(setting[5])
    assert all(abs(part * share - 1) < 0.1 for part in found)


def test_sharded_networks_probe_and_export_a_plain_folder(done):
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
    assert [row["step"] for row in rows] == [1]
    assert 0 < rows[0]["probe/consistency"] < 1


def test_sharded_networks_draw_one_processs_preview(done, teacher, tmp_path):
    file = previews.kept(done / "model")[1]
    exported = load_model(str(done / "model" / "model"))
    trainer = Trainer(run_of(tmp_path / "alone", teacher, 1, preview_every=1))
    trainer.task.modules["unet"].load_state_dict(exported.unet.state_dict())
    trainer.task.modules["controlnet"].load_state_dict(exported.controlnet.state_dict())
    expected = previews.sheet(trainer.task.preview({}).rows)
    with Image.open(file) as image:
        apart = ImageChops.difference(image.convert("RGB"), expected)
    assert max(high for _, high in apart.getextrema()) <= 2  # the order of sums, over 25 steps
    assert (done / "model" / "report.html").is_file()


def test_processes_agree_on_the_best_and_end_together(done):
    exported, best, last = load_model(str(done / "judged" / "model")), kept(done, "judged-2"), kept(done, "judged-3")
    parts = {"unet": exported.unet, "controlnet": exported.controlnet}
    found = {f"{name}.{k}": v for name, part in parts.items() for k, v in part.state_dict().items()}
    assert found.keys() == best.keys()
    assert all(torch.equal(found[k], best[k]) for k in best)
    assert not all(torch.equal(last[k], best[k]) for k in best)
    assert not (done / "judged-4.pt").exists()
    assert checkpoint.last(done / "judged").name == "step-0000003"


@pytest.fixture
def start(tmp_path, teacher):
    """Starts endless processes: (the process that waits for them, their ids by rank), once they have saved."""
    waiting: list[subprocess.Popen] = []
    pids: dict[int, int] = {}

    def started(n: int, torchrun: bool = False) -> tuple[subprocess.Popen, dict[int, int]]:
        action = f"endless:{n}:run"
        asked = (command(tmp_path, teacher, action, torchrun=n) if torchrun
                 else command(tmp_path, teacher, f"forked:{n}", action))
        process = subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   env=environment())
        waiting.append(process)
        assert process.stdout
        while len(pids) < n:
            line = process.stdout.readline()
            assert line, "the run ended before it began"
            if line.startswith("pid "):
                pids[int(line.split()[1])] = int(line.split()[2])
        end = time.monotonic() + HANGS
        while checkpoint.last(tmp_path / "run") is None:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.1)
        return process, pids

    yield started
    for process in waiting:
        if process.poll() is None:  # the test failed: nothing is left running
            process.kill()
            for pid in pids.values():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@pytest.mark.hostile("trouble")
def test_a_killed_process_ends_the_run_with_advice(start, tmp_path, teacher):
    process, pids = start(2, torchrun=True)
    os.kill(pids[1], signal.SIGKILL)
    said, _ = process.communicate(timeout=HANGS)
    assert process.returncode != 0
    assert "another process of this run was lost at step" in said
    assert "it goes on from" in said
    assert_goes_on(tmp_path / "run", teacher)


def test_a_failing_process_outlives_torchruns_sigterm(monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 2)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(RunError), distributed.Terminator():
            raise RunError("a peer is lost")
        os.kill(os.getpid(), signal.SIGTERM)  # as torchrun does to those that are left
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("full", [pytest.param(0, marks=pytest.mark.slow), 1])
@pytest.mark.hostile("trouble")
def test_one_process_full_disk_ends_the_run(start, tmp_path, teacher, full):
    process, pids = start(2)
    resource.prlimit(pids[full], resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))  # a shard is larger
    said, _ = process.communicate(timeout=HANGS)
    assert process.returncode != 0
    assert re.search(rf"RunError: checkpoint of step \d+ could not be written \(process {full}: \w+Error: .*\); "
                     r"\w.* and run the same command again to resume from \S*step-\d+\n", said)
    folder = tmp_path / "run" / "checkpoints"
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []
    assert_goes_on(tmp_path / "run", teacher)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.hostile("trouble")
def test_sigterm_finishes_the_step_and_saves_it(start, tmp_path, teacher, n):
    process, pids = start(n)
    for pid in pids.values():
        os.kill(pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=HANGS)
    assert process.returncode == 143  # as schedulers expect; the worst of the processes
    assert "TerminatedError: asked to end; saved" in said
    last = checkpoint.last(tmp_path / "run")
    assert last
    logged = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert last.name == f"step-{len(logged):07d}"  # every step that was logged
    assert_goes_on(tmp_path / "run", teacher)


def assert_goes_on(out: Path, teacher: Path) -> None:
    place = checkpoint.last(out)
    assert place
    trainer = Trainer(endless_run(out, teacher, 1))
    assert trainer.start == int(place.name.removeprefix("step-")) > 0
    trainer.step(trainer.start)


@pytest.mark.parametrize("turns", [1, 2, 4])
def test_shares_have_the_wholes_rows_and_noise(turns):
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
    ({"shard": 2}, "--shard 2 does not divide 1 process;"),
    ({"accumulate": 3}, "a batch of 4 does not divide into 1 process times 3 accumulated parts")])
def test_an_uneven_batch_or_sharding_is_refused(tmp_path, teacher, changes, message):
    with pytest.raises(UsageError, match=message):
        Trainer(tiny.run(nano_canny(), tmp_path, teacher, **changes))
