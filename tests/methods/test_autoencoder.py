"""The autoencoder's loss in two precisions."""

import math

import pytest
import torch

import tiny
from jdm.recipes import find
from jdm.training.trainer import Trainer


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny.family(tmp_path_factory.mktemp("family"))


def test_bfloat16_changes_the_loss_by_its_rounding(teacher, tmp_path):
    logs = {}
    for precision in ("fp32", "bf16"):
        trainer = Trainer(tiny.run(find("nano-vae")(), tmp_path / precision, teacher, precision=precision))
        logs[precision] = trainer.step(0)
        assert all(p.dtype == torch.float32 for p in trainer.task.modules["vae"].parameters())
    exact, rounded = (float(logs[p]["vae/loss"]) for p in ("fp32", "bf16"))
    assert 0 < abs(rounded - exact) < 0.01 * exact
    assert math.isclose(float(logs["bf16"]["kl"]), float(logs["fp32"]["kl"]), rel_tol=0.02)
