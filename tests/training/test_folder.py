"""Whose folder a run writes to: others' files are kept, one process holds it, drafts of killed runs go."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import tiny
from jdm.errors import TerminatedError, UsageError
from jdm.files import LOCK, replaced
from jdm.training import checkpoint
from jdm.training.folder import claimed
from jdm.training.loop import train
from jdm.training.trainer import Trainer
from tiny import nano_canny

pytestmark = pytest.mark.usefixtures("untrained_judge")


@pytest.fixture
def run(teacher, tmp_path):
    return tiny.run(nano_canny(), tmp_path / "run", teacher, steps=1)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


FOREIGN = {
    "model folder": lambda out: ((out / "model").mkdir(), (out / "model/weights.pt").write_text("mine")),
    "another's model": lambda out: ((out / "model").mkdir(), (out / "model/model_index.json").write_text("{}")),
    "empty model folder": lambda out: (out / "model").mkdir(),
    "record": lambda out: (out / "run.json").write_text('{"mine": 1}'),
    "record of another program": lambda out: (out / "run.json").write_text('{"run": {"type": "Mine"}}'),
    "log": lambda out: (out / "metrics.jsonl").write_text('{"step": 1}\n'),
    "checkpoints": lambda out: ((out / "checkpoints").mkdir(), (out / "checkpoints/epoch-3.pt").write_text("mine")),
    "best": lambda out: (out / "best").write_text("mine"),
    "page": lambda out: (out / "report.html").write_text("mine"),
    "previews": lambda out: ((out / "previews").mkdir(), (out / "previews/step-0000001.png").write_text("mine")),
    "link": lambda out: (out / "metrics.jsonl").symlink_to(out / "nowhere"),
    "model beside a lock": lambda out: ((out / LOCK).touch(), (out / "model").mkdir(),
                                        (out / "model/weights.pt").write_text("mine")),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.hostile("folders")
def test_what_no_run_wrote_is_kept(kind, run):
    run.out.mkdir()
    FOREIGN[kind](run.out)
    before = contents(run.out)
    with pytest.raises(UsageError, match=r"(no run of jdm wrote|not written by a run of jdm).*choose another --out"):
        train(run)
    assert contents(run.out) == before


@pytest.mark.hostile("folders")
def test_a_folder_of_other_files_is_written_beside(run):
    run.out.mkdir()
    (run.out / "notes.txt").write_text("mine")
    train(run)
    assert (run.out / "notes.txt").read_text() == "mine"
    train(replace(run, steps=2))
    assert checkpoint.last(run.out).name == "step-0000002"


def test_a_run_of_an_earlier_version_goes_on(run):
    train(run)
    (run.out / LOCK).unlink()
    assert train(replace(run, steps=2)) == run.out / "model"


@pytest.mark.hostile("folders")
def test_what_a_run_reads_is_not_replaced(run, teacher):
    inside = run.out / "model"
    inside.parent.mkdir()
    shutil.copytree(teacher, inside)
    (run.out / LOCK).touch()
    with pytest.raises(UsageError, match=r"is read by this run and would be replaced"):
        train(replace(run, model=str(inside)))
    pictures = run.out.parent / "pictures"
    pictures.mkdir()
    with pytest.raises(UsageError, match=r"is the folder of the pictures"):
        train(replace(run, out=pictures, data=replace(run.data, source=str(pictures))))
    assert not any(pictures.iterdir())


@pytest.mark.hostile("folders")
def test_a_second_process_is_told_who_holds_it(run):
    code = ("import sys, time; from pathlib import Path; from jdm.files import alone\n"
            "with alone(Path(sys.argv[1]), print): print('held', flush=True); time.sleep(600)")
    holder = subprocess.Popen([sys.executable, "-c", code, run.out], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=rf"is in use by process {holder.pid} on .* since .*; wait for it to end"):
            train(run)
    finally:
        holder.kill()
        holder.wait()
    train(run)  # the lock of a killed process is free
    with (run.out / LOCK).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # and so is that of a run that ended


@pytest.mark.hostile("trouble")
def test_drafts_of_killed_runs_are_removed(run):
    train(run)
    left = [run.out / "checkpoints/.draft-0000007", run.out / "best/checkpoints/.draft-0000007",
            run.out / ".model.draft"]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "state.safetensors").write_bytes(b"x" * 1000)
    (run.out / ".run.json.draft").write_text("half")
    with claimed(run):
        pass
    assert not [p for p in run.out.rglob(".*") if p.name != LOCK]


@pytest.mark.hostile("trouble")
def test_a_model_moved_by_a_killed_run_returns(run):
    train(run)
    before = {file.name: file.read_bytes() for file in (run.out / "model").rglob("*.*")}
    (run.out / "model").rename(run.out / ".model.old")
    with claimed(run):
        assert {file.name: file.read_bytes() for file in (run.out / "model").rglob("*.*")} == before
        assert not (run.out / ".model.old").exists()


@pytest.mark.hostile("trouble")
def test_a_failed_replacement_keeps_the_old_folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/old").write_text("old")

    def failing():
        with replaced(tmp_path / "model") as draft:
            draft.mkdir()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert contents(tmp_path) == {"model/old": b"old"}
    with replaced(tmp_path / "model") as draft:
        draft.mkdir()
        (draft / "new").write_text("new")
    assert contents(tmp_path) == {"model/new": b"new"}


@pytest.mark.hostile("trouble")
def test_sigterm_in_a_step_that_saves_saves_once(run, monkeypatch):
    saved, save, step = [], checkpoint.save, Trainer.step
    monkeypatch.setattr(checkpoint, "save", lambda state, out, done: saved.append(done) or save(state, out, done))

    def terminated(self, number):
        os.kill(os.getpid(), 15)
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", terminated)
    with pytest.raises(TerminatedError, match=r"asked to end; saved .*step-0000001"):
        train(replace(run, steps=3))
    assert saved == [1]


@pytest.mark.hostile("checkpoints")
def test_a_flipped_bit_costs_one_checkpoint(run, capsys):
    train(replace(run, steps=3))
    whole = (run.out / "model/unet/diffusion_pytorch_model.safetensors").read_bytes()
    file = checkpoint.last(run.out) / checkpoint.WHOLE
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    train(replace(run, steps=3))
    assert "going on from" in capsys.readouterr().err
    assert (run.out / "model/unet/diffusion_pytorch_model.safetensors").read_bytes() == whole
    assert (run.out / "checkpoints/damaged-0000003" / checkpoint.WHOLE).read_bytes() == content, "it is kept aside"
    rows = [json.loads(line)["step"] for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 3]
