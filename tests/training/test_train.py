"""The loop: what each phase moves, what a killed run loses, what a failed run says."""

import errno
import json
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from jdm import loading
from jdm.errors import RunError, UsageError
from jdm.loading import Loaded
from jdm.methods.jdm import JDM
from jdm.methods.networks import Networks
from jdm.models.stable_diffusion import StableDiffusion
from jdm.recipes import all_recipes, recorded
from jdm.run import Needs, Product, Run, Task
from jdm.training import checkpoint
from jdm.training.loop import train
from jdm.training.trainer import Trainer
from tiny import same

RECIPES = all_recipes()
pytestmark = pytest.mark.usefixtures("untrained_judge")


def canny(out: Path, teacher: Path, steps: int = 2, **changes) -> Run:
    return tiny.run(RECIPES["nano-canny"](), out, teacher, steps, **changes)


def tensors(out: Path) -> dict[str, torch.Tensor]:
    place = checkpoint.last(out)
    assert place is not None
    return load_file(place / "state.safetensors")


def test_a_record_makes_the_same_run_again(teacher, tmp_path):
    run = canny(tmp_path, teacher, steps=1)
    train(run)
    assert recorded(tmp_path / "run.json") == run


# What moves


@pytest.fixture
def frozen(monkeypatch):
    """Networks that no phase may move, by name, as a run loads or copies them: models, rewards, a student's UNet."""
    found: dict[str, torch.nn.Module] = {}
    load, made_of, reward = StableDiffusion.load.__func__, Networks.__init__, loading.load_reward  # type: ignore[attr-defined]

    def model(cls, path, *args):
        made = load(cls, path, *args)
        found.update({f"{Path(path).name}/{len(found)}/{k}": m for k, m in made.modules().items()})
        return made

    def networks(self, *args, **kwargs):
        made_of(self, *args, **kwargs)
        if self.settings.optimiser is None:
            found["student"] = self.student.backbone

    monkeypatch.setattr(StableDiffusion, "load", classmethod(model))
    monkeypatch.setattr(Networks, "__init__", networks)
    monkeypatch.setattr(loading, "load_reward", lambda *args: found.setdefault("reward", reward(*args)))
    return found


@pytest.mark.parametrize("name", [
    "nano-controlnet", "nano-canny", "nano-canny-own-t", "nano-diff-instruct", "nano-shared", "nano-controlled-fake",
    "nano-frozen-posterior", "nano-draws", "nano-fake-x0", "nano-clean-likelihood", "nano-implicit", "nano-posterior",
    "nano-controlled-teacher", "nano-dsm", "nano-nct", "nano-text-guided-blind", "nano-text-both"])
def test_each_phase_moves_only_its_own_parameters(name, frozen, teacher, tmp_path):
    trainer = Trainer(tiny.run(RECIPES[name](), tmp_path, teacher, steps=10))
    moving = tensors_of(trainer.task.modules)
    multiplier = moving.pop("multiplier.value", None)  # of NCT: what its loss moves, and no optimiser
    still = tensors_of(frozen)
    before = {k: v.detach().clone() for k, v in still.items()}
    assert not set(map(id, still.values())) & set(map(id, moving.values()))
    _check_phases(trainer, {**moving, **still})
    assert {k for k in still if not torch.equal(still[k], before[k])} == set()
    assert len(before) > 100
    assert multiplier is None or multiplier != trainer.run.method.multiplier


def tensors_of(modules: dict[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Parameters and buffers."""
    return {f"{n}.{k}": v for n, m in modules.items() for k, v in (*m.named_parameters(), *m.named_buffers())}


def _check_phases(trainer: Trainer, everything: dict[str, torch.Tensor]) -> None:
    names = {id(p): k for k, p in everything.items()}
    whole = list(trainer.task.phases)
    moved: dict[str, set[str]] = {phase.name: set() for phase in whole}
    for step in range(3):  # zero convolutions and LoRAs wake one after the other
        for phase in whole:
            before = {k: p.detach().clone() for k, p in everything.items()}
            trainer.task.phases = [phase]
            trainer._phases(step)
            own = {names[id(p)] for p in phase.parameters}
            changed = {k for k, p in everything.items() if not torch.equal(p, before[k])}
            assert changed <= own, f"{phase.name} moved {sorted(changed - own)[:3]}"
            assert all(p.grad is None for p in everything.values())
            moved[phase.name] |= changed
    for phase in whole:
        assert len(moved[phase.name]) > 0.9 * len(phase.parameters), f"{phase.name} leaves parameters where they are"
    lists = [id(p) for phase in whole for p in phase.parameters]
    assert len(lists) == len(set(lists)), "two phases share a parameter"


# Going on


@pytest.mark.hostile("trouble")
def test_a_killed_run_ends_with_the_same_weights(teacher, tmp_path):
    done = subprocess.run([sys.executable, Path(__file__).parents[1] / "killing.py", tmp_path, teacher],
                          capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [0, -9, -9, 0], done.stderr
    assert same(tensors(tmp_path / "alone"), tensors(tmp_path / "killed"))
    for part in ("unet", "controlnet"):
        file = Path("model", part, "diffusion_pytorch_model.safetensors")
        assert (tmp_path / "alone" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes()
    steps = [[json.loads(line)["step"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
             for run in ("alone", "killed")]
    assert steps[0] == steps[1] == [*range(1, 9)]


def test_a_stopped_run_goes_on_where_it_stopped(teacher, tmp_path):
    run, seen = canny(tmp_path, teacher, steps=3), []

    def stop(done: int, _: dict) -> None:
        seen.append(done)
        if seen == [1, 2]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, stop)
    train(run, stop)
    assert seen == [1, 2, 3]


def test_only_the_last_checkpoints_are_kept(teacher, tmp_path):
    train(canny(tmp_path, teacher, steps=4))
    assert [p.name for p in checkpoint.all_checkpoints(tmp_path)] == ["step-0000003", "step-0000004"]
    assert not list((tmp_path / "checkpoints").glob(".draft*"))


@pytest.mark.hostile("checkpoints")
def test_another_recipes_checkpoint_is_refused(teacher, tmp_path):
    run = canny(tmp_path, teacher, steps=1)
    train(run)
    with pytest.raises(UsageError, match="holds a run with another seed"):
        train(replace(run, seed=1))
    with pytest.raises(UsageError, match="belongs to another recipe"):
        train(tiny.ranked(run, student=4))
    assert recorded(tmp_path / "run.json") == run


@pytest.mark.hostile("checkpoints")
def test_a_damaged_checkpoint_is_named(teacher, tmp_path):
    run = canny(tmp_path, teacher, steps=1)
    train(run)
    place = checkpoint.last(tmp_path)
    assert place is not None
    (place / "state.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(UsageError, match=f"{place.name} is damaged .* delete it"):
        train(run)


# Going wrong


@dataclass(frozen=True)
class Poisoned:
    """JDM whose one phase gives NaN at one step."""

    phase: str
    at: int
    method: JDM

    def needs(self, run: Run) -> Needs:
        return self.method.needs(run)

    def product(self, loaded: Loaded) -> Product:
        return self.method.product(loaded)

    def task(self, loaded: Loaded) -> Task:
        task, now = self.method.task(loaded), [0]
        begin = task.begin

        def begun(step: int):
            now[0] = step
            return begin(step)

        for phase in task.phases:
            if phase.name == self.phase:
                phase.loss = self._poisoned(phase.loss, now)
        task.begin = begun
        return task

    def _poisoned(self, loss, now):
        def poisoned(state, repeat):
            value, logs = loss(state, repeat)
            return value * (math.nan if now[0] == self.at else 1.0), logs

        return poisoned


@pytest.mark.parametrize("phase", ["fake", "posterior", "generator"])
@pytest.mark.hostile("trouble")
def test_a_nan_stops_the_run_losing_nothing(phase, teacher, tmp_path):
    run = canny(tmp_path, teacher, steps=2)
    with pytest.raises(RunError, match=rf"phase {phase} .*not finite at step 1.*step-0000001"):
        train(replace(run, method=Poisoned(phase, 1, run.method)))
    assert all(t.isfinite().all() for t in tensors(tmp_path).values() if t.is_floating_point())
    train(run)
    assert [p.name for p in checkpoint.all_checkpoints(tmp_path)] == ["step-0000001", "step-0000002"]


@pytest.mark.hostile("trouble")
def test_a_full_disk_keeps_the_last_checkpoint(teacher, tmp_path, monkeypatch):
    run, original = canny(tmp_path, teacher, steps=3), checkpoint.save_file

    def full(tensors, path):
        if "0000002" in str(path):
            Path(path).write_bytes(b"half a file")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunError, match=r"step 2 .*No space left.*free some space.*step-0000001"):
        train(run)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-0000001"]
    monkeypatch.setattr(checkpoint, "save_file", original)
    train(run)
    train(again := replace(run, out=tmp_path / "again"))
    assert same(tensors(tmp_path), tensors(again.out))


@pytest.mark.hostile("trouble")
def test_an_unwritable_log_fails_the_run(teacher, tmp_path, monkeypatch):
    from jdm.training import trainer as module

    def full(self, step, values):
        raise OSError(errno.ENOSPC, "No space left on device", str(self.path))

    monkeypatch.setattr(module.Log, "write", full)
    with pytest.raises(RunError, match=r"metrics\.jsonl: No space left on device.*the start"):
        train(canny(tmp_path, teacher))
