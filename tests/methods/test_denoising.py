"""Denoising's batch: prompts dropped at random, each picture with its own level and noise."""

from types import SimpleNamespace
from typing import Any

import torch

from jdm.data.noise import Noise
from jdm.data.sources import load_pictures
from jdm.methods.denoising import denoising_batch
from jdm.schedule import NoiseSchedule

PICTURES = load_pictures("fashion-mnist", "test[:600]", 32)
SCORE: Any = SimpleNamespace(schedule=NoiseSchedule.scaled_linear())


def test_dropped_prompts_do_not_depend_on_captions():
    rows, noise = torch.arange(600), Noise(0, 0)
    uniform = noise.uniform("caption", 600)
    whole = PICTURES.prompts(rows, uniform)
    assert denoising_batch(rows[:, None].float(), PICTURES, rows, noise, SCORE, 0.0).y == whole
    batch = denoising_batch(rows[:, None].float(), PICTURES, rows, noise, SCORE, 0.5)
    assert all(ours in ("", own) for ours, own in zip(batch.y, whole, strict=True))
    dropped = torch.tensor([ours == "" for ours in batch.y]).float()
    early = uniform < 0.5
    # Three standard errors of a share of 300.
    assert abs(float(dropped[early].mean()) - 0.5) < 0.087
    assert abs(float(dropped[~early].mean()) - 0.5) < 0.087
    assert abs(float(dropped[batch.t < 0.5].mean()) - 0.5) < 0.1
