"""What is saved is finite: a checkpoint of NaN is never written, nor called the last good one."""

import pytest
import torch

import tiny
from jdm.errors import RunError
from jdm.training import checkpoint
from jdm.training.trainer import Trainer
from tiny import nano_canny


@pytest.mark.parametrize("where", ["weights", "average"])
@pytest.mark.hostile("trouble")
def test_weights_that_are_not_finite_are_not_saved(tmp_path, teacher, where):
    trainer = Trainer(tiny.run(nano_canny(), tmp_path, teacher, steps=3))
    good = trainer.save(1)
    held = trainer.averages["unet"] if where == "average" else dict(trainer.task.modules["unet"].named_parameters())
    with torch.no_grad():
        next(iter(held.values())).view(-1)[0] = float("nan")
    with pytest.raises(RunError, match=r"weights of unet.* after step 2; last good checkpoint: .*step-0000001"):
        trainer.save(2)
    assert checkpoint.last(tmp_path) == good
