"""Trackers: a missing one is refused at once; each that is installed gets every number, preview and step."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

import tiny
from jdm.errors import UsageError
from jdm.loading import Loaded
from jdm.recipes import find
from jdm.training import trackers
from jdm.training.loop import train

pytestmark = pytest.mark.usefixtures("untrained_judge")


def small(out, teacher, **changes):
    return tiny.run(find("nano-vae")(), out, teacher, **{"steps": 4, "save_every": 2, "preview_every": 2, **changes})


def rows(out) -> dict[int, dict[str, float]]:
    found = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    return {int(row.pop("step")): row for row in found}


def stopped(run, at) -> None:
    """The run, interrupted after a step."""
    def stop(done, _):
        if done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, stop)


@pytest.mark.parametrize("name", trackers.PACKAGES)
def test_a_missing_tracker_is_refused_before_loading(name, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda package: None)
    monkeypatch.setattr(Loaded, "__init__", lambda *_: pytest.fail("something was loaded"))
    with pytest.raises(UsageError, match=rf"--trackers {name} needs .* pip install 'jdm\[{name}\]'"):
        train(small(tmp_path / "run", teacher, trackers=("jsonl", name)))
    assert not (tmp_path / "run").exists()


def test_no_tracker_is_imported_unasked(teacher, tmp_path):
    for name in [name for name in sys.modules if name.split(".")[0] in ("tensorboard", "wandb")]:
        pytest.skip(f"{name} was imported by an earlier test of this process")
    train(small(tmp_path, teacher, trackers=("jsonl",)))
    assert not {"tensorboard", "wandb"} & set(sys.modules)
    assert list(rows(tmp_path)) == [1, 2, 3, 4]


def events(out) -> tuple[dict[str, dict[int, float]], list[int]]:
    """The numbers by name and step that TensorBoard would show, and the steps of its pictures."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(out / "tensorboard"), {"scalars": 0, "images": 0})
    read.Reload()
    tags = read.Tags()
    scalars = {name: {event.step: event.value for event in read.Scalars(name)} for name in tags["scalars"]}
    return scalars, [event.step for event in read.Images("preview")] if "preview" in tags["images"] else []


@pytest.fixture
def tensorboard():
    pytest.importorskip("tensorboard", reason="pip install 'jdm[tensorboard]'")


def test_tensorboard_has_every_number_and_preview(tensorboard, teacher, tmp_path):
    train(small(tmp_path, teacher, trackers=("tensorboard",)))
    scalars, pictures = events(tmp_path)
    logged = rows(tmp_path)
    assert set(scalars) == {key for row in logged.values() for key in row}
    for step, row in logged.items():
        assert all(scalars[key][step] == pytest.approx(value, rel=1e-6) for key, value in row.items())
    assert pictures == [0, 2, 4]


def test_tensorboard_shows_a_repeated_step_once(tensorboard, teacher, tmp_path):
    run = small(tmp_path, teacher, trackers=("tensorboard",))
    stopped(run, 3)
    train(run)
    scalars, pictures = events(tmp_path)
    assert list(scalars["vae/loss"]) == [1, 2, 3, 4]
    assert scalars["vae/loss"][3] == pytest.approx(rows(tmp_path)[3]["vae/loss"], rel=1e-6)
    assert pictures == [0, 2, 4]


class Kept:
    """A tracker that remembers what it was given."""

    def __init__(self):
        self.given, self.closed = [], []

    def numbers(self, step, values):
        self.given.append((step, dict(values)))

    def picture(self, step, image):
        self.given.append((step, image.size))

    def close(self, failed):
        self.closed.append(failed)


@pytest.mark.parametrize("fails", [False, True])
def test_trackers_are_closed_however_a_run_ends(fails, teacher, tmp_path, monkeypatch):
    kept, run = Kept(), small(tmp_path, teacher)
    monkeypatch.setattr(trackers, "opened", lambda run, start: [kept])
    (stopped if fails else lambda run, _: train(run))(run, 3)
    assert kept.closed == [fails]
    assert [step for step, _ in kept.given] == [0, 1, 2, 2, 3, *([] if fails else [4, 4])]
    assert dict(pair for pair in kept.given if isinstance(pair[1], dict)) == {
        step: row for step, row in rows(tmp_path).items() if not fails or step < 4}


def test_tracked_runs_train_as_others(teacher, tmp_path):
    names = tuple(name for name, package in trackers.PACKAGES.items() if importlib.util.find_spec(package))
    if not names:
        pytest.skip("no tracker is installed")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("WANDB_MODE", "offline")
        train(small(tmp_path / "tracked", teacher, trackers=names))
    train(small(tmp_path / "plain", teacher, preview_every=0))
    tracked, plain = ([{k: v for k, v in row.items() if k != "seconds"} for row in rows(tmp_path / name).values()]
                      for name in ("tracked", "plain"))
    assert tracked == plain


# W&B, offline: no network is used


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    return pytest.importorskip("wandb", reason="pip install 'jdm[wandb]'")


def test_wandb_has_every_number(wandb, teacher, tmp_path):
    train(small(tmp_path, teacher, trackers=("wandb",)))
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert (tmp_path / "wandb-id").read_text().strip() in file.name
    stored = file.read_bytes()
    for key in rows(tmp_path)[1]:
        assert key.encode() in stored
    assert len(list((tmp_path / "wandb").glob("offline-run-*/files/media/images/preview_*.png"))) == 3


def test_wandb_goes_on_with_the_same_run(wandb, teacher, tmp_path):
    run = small(tmp_path, teacher, trackers=("wandb",))
    stopped(run, 3)
    first = (tmp_path / "wandb-id").read_text()
    train(run)
    assert (tmp_path / "wandb-id").read_text() == first
    files = {file.name for file in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")}
    assert files == {f"run-{first.strip()}.wandb"}


def test_wandb_that_cannot_start_is_refused(wandb, teacher, tmp_path):
    run = ["train", "nano-vae", "--out", str(tmp_path / "run"), "--data.split", "test[:64]", "--data.validation",
           "test[64:128]", "--steps", "2", "--batch", "4", "--trackers", "wandb"]
    done = subprocess.run([sys.executable, "-m", "jdm", *run], capture_output=True, text=True, check=False,
                          env={**os.environ, "WANDB_MODE": "nonsense"})  # wandb reads it once in a process
    assert done.returncode == 2, done.stderr
    assert re.search(r"^jdm: W&B could not start .*WANDB_MODE=offline", done.stderr, re.M)
    assert "Traceback" not in done.stderr
