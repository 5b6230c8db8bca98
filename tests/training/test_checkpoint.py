"""Checkpoints on disk: damage is noticed, the newest whole one is taken, and nothing is left of a failed save."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from jdm.errors import RunError, UsageError
from jdm.training import checkpoint

FILE, INFO = checkpoint.WHOLE, checkpoint.INFO


@pytest.fixture
def out(tmp_path):
    """A run's folder with the checkpoints of steps 2 and 4."""
    for step in (2, 4):
        checkpoint.save(state(), tmp_path, step)
    return tmp_path


def state() -> checkpoint.State:
    net = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    return checkpoint.State({"net": net}, {"phase": optimizer}, {"net": checkpoint.trained(net)}, {})


def place(out: Path, step: int) -> Path:
    return out / "checkpoints" / checkpoint.name_of(step)


def changed(file: Path, at: int, content: bytes) -> None:
    with file.open("r+b") as opened:
        opened.seek(at)
        opened.write(content)


def bit(file: Path, at: int) -> None:
    changed(file, at, bytes([file.read_bytes()[at] ^ 0x40]))


HARMS = {
    "one bit of a weight": lambda p: bit(p / FILE, 20_000),
    "the last bit": lambda p: bit(p / FILE, (p / FILE).stat().st_size - 1),
    "a bit of the header": lambda p: bit(p / FILE, 30),
    "zeros": lambda p: changed(p / FILE, 9_000, b"\0" * 8_000),
    "cut": lambda p: os.truncate(p / FILE, 9_000),
    "empty": lambda p: os.truncate(p / FILE, 0),
    "longer": lambda p: (p / FILE).open("ab").write(b"more"),
    "no tensors": lambda p: (p / FILE).unlink(),
    "a FIFO": lambda p: ((p / FILE).unlink(), os.mkfifo(p / FILE)),
    "another run's": lambda p: checkpoint.save(state(), p.parents[1] / "b", 4) and shutil.copy(
        p.parents[1] / "b/checkpoints/step-0000004" / FILE, p / FILE),
    "no state.json": lambda p: (p / INFO).unlink(),
    "another step": lambda p: (p / INFO).write_text((p / INFO).read_text().replace('"step": 4', '"step": 5')),
    "a bit of state.json": lambda p: bit(p / INFO, 40),
    "state.json is a list": lambda p: (p / INFO).write_text("[1]"),
    "state.json is no JSON": lambda p: (p / INFO).write_text("{"),
    "state.json is deep": lambda p: (p / INFO).write_text("[" * 100_000),
    "no hashes": lambda p: (p / INFO).write_text(json.dumps({**json.loads((p / INFO).read_text()), "sha256": 3})),
    "bytes that are no text": lambda p: (p / INFO).write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.hostile("checkpoints")
def test_damage_is_kept_and_an_earlier_checkpoint_taken(harm, out, capsys):
    HARMS[harm](place(out, 4))
    assert checkpoint.damage_of(place(out, 4))
    assert checkpoint.newest_whole(out, aside=True) == place(out, 2)
    said = capsys.readouterr().err
    assert "step-0000004 is damaged" in said
    assert "going on from" in said
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["damaged-0000004", "step-0000002"]


@pytest.mark.hostile("checkpoints")
def test_damage_of_all_checkpoints_is_refused(out):
    for step in (2, 4):
        bit(place(out, step) / FILE, 9_000)
    with pytest.raises(UsageError, match=r"step-0000004 is damaged .*no checkpoint before it is whole; delete it"):
        checkpoint.newest_whole(out, aside=True)
    assert len(checkpoint.all_checkpoints(out)) == 2


@pytest.mark.hostile("checkpoints")
def test_damaged_twice_keeps_both(out):
    for _ in range(2):
        checkpoint.save(state(), out, 4)
        bit(place(out, 4) / FILE, 9_000)
        checkpoint.newest_whole(out, aside=True)
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"damaged-0000004", "damaged-0000004-2", "step-0000002"}


def test_a_whole_checkpoint_loads_what_was_saved(out):
    assert checkpoint.newest_whole(out) == place(out, 4)
    saved, other = state(), state()
    checkpoint.save(saved, out, 6)
    checkpoint.load(other, place(out, 6))
    assert all(torch.equal(a, b) for a, b in zip(saved.modules["net"].parameters(), other.modules["net"].parameters(),
                                                 strict=True))


def test_a_checkpoint_without_hashes_is_still_read(out):
    info = json.loads((place(out, 4) / INFO).read_text())
    (place(out, 4) / INFO).write_text(json.dumps({k: info[k] for k in checkpoint.UNSIGNED}))
    assert checkpoint.newest_whole(out) == place(out, 4)


@pytest.mark.hostile("trouble")
def test_a_failed_save_leaves_nothing(out, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_flush", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(state(), out, 6)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-0000002", "step-0000004"]


@pytest.mark.parametrize(("number", "said"), [(28, "free some space"), (13, "choose a folder that can be written"),
                                              (27, "ulimit -f"), (5, "mend the disk")])
@pytest.mark.hostile("trouble")
def test_a_failed_save_names_its_remedy(number, said, out, monkeypatch):
    def refused(tensors, path):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(checkpoint, "save_file", refused)
    with pytest.raises(RunError, match=rf"step 6 could not be written .*{said}.*step-0000004"):
        checkpoint.save(state(), out, 6)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_have_the_umask_permissions(mask, tmp_path):
    before = os.umask(mask)
    try:
        saved = checkpoint.save(state(), tmp_path, 1)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in saved.iterdir()} == {0o666 & ~mask}
