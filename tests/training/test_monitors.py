"""Warnings of a run that goes wrong: each made to happen in a run of a tiny model, and kept silent in a sound one."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import tiny
from jdm.methods.decoupled_dmd import DecoupledDMD
from jdm.methods.engine import Distillation
from jdm.methods.networks import Fake, Student
from jdm.recipes import find
from jdm.run import Optimiser
from jdm.terms import CFGAugmentation
from jdm.training.loop import train
from jdm.training.monitors import WINDOW, Monitors

FAST = Optimiser(lr=1e-2, betas=(0.0, 0.95), warmup=0, decay="constant")
STILL = replace(FAST, lr=1e-12)


@dataclass(frozen=True)
class Pull:
    """A term with one answer: every sample is drawn to a picture of ones."""

    levels = None

    def direction(self, at: Any) -> torch.Tensor:
        return 1.0 - at.x


@dataclass(frozen=True)
class Pulled(DecoupledDMD):
    def distillation(self) -> Distillation:
        return replace(super().distillation(), terms={"pull": Pull()}, fake=None)


STUCK = DecoupledDMD(Student((625,), optimiser=FAST), Fake(optimiser=STILL))
FAILING = {  # with the steps it takes
    "guidance over-bakes": (replace(STUCK, matching=None, augmentation=CFGAugmentation(weight=50.0)), 30),
    "collapses and ignores z": (Pulled(Student((625,), optimiser=FAST)), 60),
}


def told(method, steps, teacher, tmp_path, capfd) -> str:
    run = replace(find("nano-ddmd-4")(), method=method)
    train(replace(tiny.run(run, tmp_path, teacher, steps=steps), save_every=steps, batch=8))
    return capfd.readouterr().err


@pytest.mark.parametrize("cause", sorted(FAILING))
def test_a_run_that_fails_is_told_why(cause, teacher, tmp_path, capfd, untrained_judge):
    method, steps = FAILING[cause]
    lines = [line for line in told(method, steps, teacher, tmp_path, capfd).splitlines() if cause in line]
    assert len(lines) == 1, "once, in one line"
    assert lines[0].startswith("warning: step ")


@pytest.mark.parametrize(("rate", "warned"), [(0.5, 0), (0.02, 1)])
def test_a_fake_that_lags_is_named(rate, warned):
    """A student N(m, 1) that moves, and a fake score N(f, 1) that follows; alpha^2 = sigma^2 = 1/2.

    E || eps_f(x_t) - eps ||^2 = alpha^2 + sigma^2 alpha^2 (m - f)^2: its floor is 1/2.
    """
    monitors, said, m, f = Monitors(), [], 0.0, 0.0
    for _ in range(60):
        m += 0.1
        f += rate * (m - f)
        said += monitors.note({"fake/loss": 0.5 + 0.25 * (m - f) ** 2})
    assert len(said) == warned
    assert all("no longer follows the student; raise --method.fake.updates" in text for text in said)


def test_a_sound_run_is_told_nothing(teacher, tmp_path, capfd, untrained_judge):
    slow = replace(FAST, lr=1e-5)
    sound = DecoupledDMD(Student((625,), optimiser=slow), Fake(optimiser=slow))
    assert "warning: step" not in told(sound, 20, teacher, tmp_path, capfd)


def test_a_resumed_run_is_compared_with_its_beginning(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"spread_x": 1.0}] * WINDOW + [{"spread_x": 0.6}] * WINDOW
    path.write_text("".join(f'{{"step": {k}, "spread_x": {row["spread_x"]}}}\n' for k, row in enumerate(rows)))
    resumed, fresh = Monitors(path), Monitors()
    said = [(resumed.note({"spread_x": 0.4}), fresh.note({"spread_x": 0.4})) for _ in range(2 * WINDOW)]
    assert sum(len(a) for a, _ in said) == 1
    assert not any(b for _, b in said)


def test_one_odd_value_says_nothing():
    monitors = Monitors()
    for k in range(40):
        assert not monitors.note({"fake/loss": 10.0 if k == 20 else 1.0, "spread_x": 1.0})
