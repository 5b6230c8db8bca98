"""Models whose parts do not fit each other, and runs that do not fit in memory: each is a one-line error."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel

import tiny
from jdm.cli.parser import main
from jdm.errors import RunError, UsageError
from jdm.library import load_model
from jdm.training import trainer as training
from jdm.training.loop import train
from jdm.training.memory import out_of_memory
from jdm.training.trainer import Trainer
from tiny import nano_canny


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    torch.manual_seed(0)
    return tiny.family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def folder(teacher, tmp_path):
    return shutil.copytree(teacher, tmp_path / "mixed")


@pytest.mark.hostile("parts")
def test_a_text_encoder_of_another_width(folder, capsys):
    config = CLIPTextConfig(hidden_size=24, num_attention_heads=2, num_hidden_layers=1, intermediate_size=16,
                            vocab_size=100, max_position_embeddings=16)
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    with pytest.raises(UsageError, match=r"the UNet reads text states of width \d+, its text encoder writes 24"):
        load_model(str(folder))
    assert main(["sample", str(folder), "--prompt", "a coat", "--out", str(folder / "out")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (folder / "out").exists()


@pytest.mark.hostile("parts")
def test_an_autoencoder_of_other_latents(folder):
    vae = AutoencoderKL(in_channels=3, out_channels=3, latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 3,
                        up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=(8, 8, 8), norm_num_groups=4)
    vae.save_pretrained(folder / "vae")
    with pytest.raises(UsageError, match="the UNet takes 8 channels, its autoencoder writes latents of 4"):
        load_model(str(folder))


@pytest.mark.hostile("parts")
def test_a_schedule_that_ends_without_signal(folder):
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rescale_betas_zero_snr": True}))
    with pytest.raises(UsageError, match="its schedule ends without signal"):
        load_model(str(folder))


@pytest.mark.hostile("trouble")
def test_out_of_memory_names_what_saves_memory(tmp_path, teacher, monkeypatch):
    run = tiny.run(nano_canny(), tmp_path, teacher, steps=3)

    def full(self, step):
        if step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(self, step)

    original = training.Trainer._phases
    monkeypatch.setattr(training.Trainer, "_phases", full)
    with pytest.raises(RunError, match="has no memory left") as caught:
        train(run)
    message = str(caught.value)
    assert "\n" not in message
    for switch in ("--checkpointing", "--precision bf16", "--method.fake.rank 64", "states 8bit", "--accumulate 2"):
        assert switch in message
    assert training.checkpoint.last(tmp_path).name == "step-0000002"


def test_memory_savings_match_the_runs_tensors(tmp_path, teacher, monkeypatch):
    monkeypatch.setattr("jdm.training.memory.GIB", 1)
    run = tiny.run(nano_canny(), tmp_path, teacher)
    trainer = Trainer(run)
    message = out_of_memory(run, trainer.task)
    networks = {id(m): m for m in trainer.task.frozen}.values()
    frozen = {id(p): p.nbytes for m in networks for p in m.parameters() if not p.requires_grad}
    fake = sum(p.nbytes for p in trainer.task.modules["fake"].parameters())
    assert f"bf16, {sum(frozen.values()) / 2:.1f} GiB" in message
    assert f"fake.rank 64, about {3 * fake:.1f} GiB" in message
    trainer.step(0)
    moments = sum(v.nbytes for o in trainer.optimizers.values() for s in o.state.values() for k, v in s.items()
                  if k != "step")
    assert f"and the others), {0.75 * moments:.1f} GiB" in message
    lean = replace(run, checkpointing=True, precision="bf16", batch=1)
    assert "--checkpointing" not in out_of_memory(lean, trainer.task)
    assert "bf16" not in out_of_memory(lean, trainer.task)
    assert "--accumulate" not in out_of_memory(lean, trainer.task)
