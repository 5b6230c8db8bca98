"""Frozen weights of UNets in 8 bits: what is kept so, how such a run trains and exports, what an estimate counts."""

from dataclasses import replace

import pytest
import torch

import tiny
from families import made
from jdm.cost.estimate import Rehearsal, overwriting
from jdm.errors import UsageError
from jdm.library import load_model
from jdm.models.execution import settle
from jdm.models.folder import save_pipeline
from jdm.recipes import find
from jdm.size import bytes_of
from jdm.training.product import write_model
from jdm.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("untrained_judge")


@pytest.mark.parametrize("kind", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_a_unets_frozen_weights_in_eight_bits_train(kind, tmp_path):
    """All but what lies between its blocks; the exported student is as near as three bits of mantissa are."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = save_pipeline(made(kind), tmp_path / "teacher")
    run = tiny.ranked(tiny.run(find("nano-canny")(), tmp_path / "run", teacher), student=2, fake=2)
    run = replace(run, precision="bf16", frozen="fp8", checkpointing=True)
    trainer = Trainer(run)
    backbone = trainer.task.frozen[0].backbone
    frozen = [p for p in backbone.parameters() if not p.requires_grad]
    small = [p for p in frozen if p.dtype == torch.float8_e4m3fn]
    assert sum(p.numel() for p in small) > 0.6 * sum(p.numel() for p in frozen)
    assert {p.ndim for p in small} == {2, 4}, "linear layers and convolutions"
    logs = trainer.step(0)
    assert all(torch.isfinite(torch.tensor(float(logs[f"{p}/gradient"]))) for p in ("fake", "posterior", "generator"))
    whole, exported = (load_model(str(place)).unet.state_dict() for place in (teacher, write_model(trainer)))
    apart = max(float((exported[k] - whole[k]).norm() / whole[k].norm().clamp(min=1e-3)) for k in whole)
    assert 0 < apart < 0.1


def test_an_estimate_counts_eight_bits(teacher, tmp_path):
    run = tiny.ranked(tiny.run(find("nano-canny")(), tmp_path, teacher), student=2, fake=2)
    counted = {}
    for kind in ("precision", "fp8"):
        rehearsal = Rehearsal(replace(run, precision="bf16", frozen=kind))
        with rehearsal.meter, overwriting():
            task = rehearsal.run.method.task(rehearsal.shapes)
            settle(rehearsal.run, *task.frozen)
        counted[kind] = bytes_of(rehearsal._parts(task)["teacher: unet"])
    backbone = Trainer(replace(run, precision="bf16", frozen="fp8")).task.frozen[0].backbone
    assert counted["fp8"] == bytes_of(p for name, p in backbone.named_parameters() if "lora_" not in name)
    assert counted["fp8"] < 0.65 * counted["precision"]


def test_eight_bits_need_bf16(teacher, tmp_path):
    with pytest.raises(UsageError, match="--frozen fp8 needs --precision bf16"):
        Trainer(replace(tiny.run(find("nano-canny")(), tmp_path, teacher), frozen="fp8"))
