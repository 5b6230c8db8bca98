"""Denoising's batch: prompts dropped at random, each picture with its own level and noise."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import families
import tiny
from jdm.data.noise import Noise
from jdm.data.sources import load_pictures
from jdm.errors import UsageError
from jdm.library import load_model
from jdm.methods.denoising import denoising_batch
from jdm.models.folder import save_pipeline
from jdm.recipes import find
from jdm.schedule import NoiseSchedule
from jdm.training.loop import train
from jdm.training.trainer import Trainer

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


def test_training_goes_on_from_a_folder(tmp_path):
    teacher = tiny.family(tmp_path)
    run = tiny.run(find("nano-teacher")(), tmp_path / "run", teacher, steps=1)
    run = replace(run, method=replace(run.method, vae=str(teacher), start=str(teacher)))
    trainer, own = Trainer(run), load_model(str(teacher))
    for name, network in trainer.task.modules.items():
        for key, value in getattr(own, name).state_dict().items():
            assert torch.equal(network.state_dict()[key], value), key
        assert all(p.requires_grad for p in network.parameters())
    train(run)
    made = load_model(str(tmp_path / "run" / "model"))
    assert made.tokenizer.get_vocab() == own.tokenizer.get_vocab()
    assert made.scheduler == own.scheduler
    assert not torch.equal(made.unet.conv_in.weight, own.unet.conv_in.weight)


def test_a_transformer_is_no_start_for_a_unet(tmp_path):
    save_pipeline(families.sd3(), tmp_path / "flow")
    teacher = tiny.family(tmp_path)
    run = tiny.run(find("nano-teacher")(), tmp_path / "run", teacher)
    run = replace(run, method=replace(run.method, vae=str(teacher), start=str(tmp_path / "flow")))
    with pytest.raises(UsageError, match=r"is not in Stable Diffusion's format, which --method.start takes"):
        Trainer(run)
