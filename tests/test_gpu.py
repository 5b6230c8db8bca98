"""What only a GPU can show: its numbers are the CPU's, with its own kernels, compiler and memory."""

import json
import os
from dataclasses import replace

import pytest
import torch

import tiny
from jdm.controls import Canny
from jdm.data.sources import load_pictures
from jdm.evaluation.questions import Questions, answers
from jdm.evaluation.sampling import Sampler
from jdm.library import load_model
from jdm.training.loop import train
from jdm.training.trainer import Trainer

DEVICE = os.environ.get("JDM_TEST_DEVICE", "cuda")  # benchmarks/gpu.py --smoke takes these through on a CPU
ON_GPU = torch.device(DEVICE).type == "cuda"

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="no CUDA device is here")]


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch):
    """Convolutions in float32, as on a CPU, and not in TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def logged(teacher, out, device=DEVICE, steps=2, stop=0, **changes):
    """Every step's numbers of a tiny run, but for the times; it stops after `stop` steps and goes on, where asked."""
    run = tiny.run(tiny.nano_canny(), out, teacher, steps, **{"device": device, **changes})
    if stop:
        trainer = Trainer(run)
        for step in range(stop):
            trainer.step(step)
    train(run)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def close(one, other, share):
    """Whether two logs have the same numbers, each within a share of its own size."""
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert a == pytest.approx(b, rel=share, abs=1e-5)


def test_steps_on_the_gpu_log_the_cpus_numbers(teacher, tmp_path):
    # 1%: kernels sum in another order, and Adam's first step turns a tiny gradient's sign into a whole step.
    close(logged(teacher, tmp_path / "gpu"), logged(teacher, tmp_path / "cpu", "cpu"), 0.01)


def test_stopped_gpu_run_goes_on(teacher, tmp_path):
    whole, parts = (logged(teacher, tmp_path / str(stop), steps=4, stop=stop) for stop in (0, 2))
    close(parts, whole, 0.01 if ON_GPU else 0)  # 1%: atomic sums of a GPU's backward have no fixed order


def test_bf16_with_checkpointing_keeps_the_losses(teacher, tmp_path):
    full = logged(teacher, tmp_path / "full", steps=1)
    half = logged(teacher, tmp_path / "half", steps=1, precision="bf16", checkpointing=True)
    for key in ("fidelity", "condition"):
        assert half[0][key] == pytest.approx(full[0][key], rel=0.1)  # bfloat16 has 8 bits, and a dozen layers add up


def test_eight_bit_moments_train_on_the_gpu(teacher, tmp_path):
    run = tiny.nano_canny()
    small = replace(run.method.student, optimiser=replace(run.method.student.optimiser, states="8bit"))
    out = train(tiny.run(replace(run, method=replace(run.method, student=small)), tmp_path, teacher, device=DEVICE))
    assert all(p.isfinite().all() for p in load_model(str(out)).backbone.parameters())


def test_gpu_student_draws_on_both_devices(teacher, tmp_path):
    out = train(tiny.run(tiny.nano_canny(), tmp_path, teacher, device=DEVICE))
    pictures, drawn = load_pictures("fashion-mnist", "test[:8]", 32), []
    for device in (DEVICE, "cpu"):
        questions = Questions.of(pictures, Canny(), 8, 0, device)
        drawn.append(answers(Sampler(load_model(str(out)).to(device)), questions, Canny()).cpu().int())
    assert (drawn[0] - drawn[1]).abs().max() <= 1, "a grey level may be rounded either way"
    assert drawn[0].float().std() > 1


def test_memory_of_a_step_is_given_back(teacher, tmp_path):
    if not ON_GPU:
        pytest.skip("a CPU does not count its tensors")
    trainer = Trainer(tiny.run(tiny.nano_canny(), tmp_path, teacher, 10**3, save_every=10**3, device=DEVICE))
    held = []
    for step in range(12):
        trainer.step(step)
        held.append(torch.cuda.memory_allocated())
    assert held[-1] <= held[5] + 2**20  # a prompt that is met for the first time is remembered


def test_compiled_steps_log_the_eager_numbers(teacher, tmp_path):
    if not ON_GPU:
        pytest.skip("compiling on a CPU takes minutes; tests/models/test_compile.py holds its graphs")
    close(logged(teacher, tmp_path / "compiled", steps=1, compile=True), logged(teacher, tmp_path / "eager", steps=1),
          0.01)  # 1%: fused kernels round once where eager ones round several times
