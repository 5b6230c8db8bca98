"""A batch that is computed in parts trains what the whole batch trains."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from jdm.errors import UsageError
from jdm.recipes import find
from jdm.training.trainer import Trainer
from several import in_double, run_of

# One recipe of each method, and JDM with what looks at the whole batch, has several phases, or has draws of its own.
RECIPES = ["nano-canny", "nano-draws", "nano-controlled-fake", "nano-text-reward", "nano-text-reward-clean",
           "nano-diff-instruct", "nano-implicit", "nano-controlled-teacher", "nano-nct", "nano-dsm", "nano-controlnet",
           "nano-posterior", "nano-teacher"]
BRIGHTNESS = f"{Path(__file__).parents[2] / 'examples' / 'my_rewards.py'}:brightness"
pytestmark = pytest.mark.usefixtures("untrained_judge")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny.family(tmp_path_factory.mktemp("family"))


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The gradient of each phase at the first step, flat."""
    begun = trainer._begun(0, 0) if trainer.run.accumulate == 1 else None
    found = {}
    for phase in trainer.task.phases:
        parts = trainer._gradients(phase, 0, 0, begun)[0]
        found[phase.name] = torch.cat([g.flatten() for g in parts if g is not None])
    return found


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], share: float = 1e-9) -> None:
    assert ours.keys() == theirs.keys()
    for phase, whole in theirs.items():
        assert whole.norm() > 0, phase
        assert (ours[phase] - whole).norm() < share * whole.norm(), phase


@pytest.mark.parametrize("recipe", RECIPES)
def test_parts_of_a_batch_give_its_gradient(recipe, tmp_path, teacher):
    found = []
    with in_double():
        for turns in (1, 2, 4):
            run = tiny.run(find(recipe)(), tmp_path / str(turns), teacher, accumulate=turns)
            if getattr(run.method, "reward", None):  # a classifier's weights are float32
                run = replace(run, method=replace(run.method, reward=replace(run.method.reward, model=BRIGHTNESS)))
            found.append(gradients(Trainer(run)))
    assert_equal(found[1], found[0])
    assert_equal(found[2], found[0])


def test_parts_give_the_gradient_of_loras(tmp_path, teacher):
    with in_double():
        found = [gradients(Trainer(run_of(tmp_path / str(turns), teacher, 1, "lora", accumulate=turns)))
                 for turns in (1, 2)]
    assert_equal(found[1], found[0])


def test_parts_give_the_gradient_of_an_autoencoder(tmp_path, teacher):
    found = [gradients(Trainer(tiny.run(find("nano-vae")(), tmp_path / str(turns), teacher, accumulate=turns)))
             for turns in (1, 2)]
    assert_equal(found[1], found[0], share=1e-5)  # in float32


def test_the_multiplier_moves_once_a_step(tmp_path, teacher):
    values = []
    with in_double():
        for turns in (1, 2, 4):
            trainer = Trainer(tiny.run(find("nano-nct")(), tmp_path / str(turns), teacher, accumulate=turns))
            trainer.step(0)
            values.append(float(trainer.task.modules["multiplier"].value))
    assert values[0] != 1
    assert values == pytest.approx([values[0]] * 3, abs=1e-9)


def test_parts_keep_the_number_of_updates(tmp_path, teacher):
    counts = []
    for turns in (1, 2):
        trainer = Trainer(tiny.run(find("nano-canny")(), tmp_path / str(turns), teacher, accumulate=turns))
        trainer.step(0)
        counts.append([int(next(iter(o.state.values()))["step"]) for o in trainer.optimizers.values()])
    assert counts[0] == counts[1]


def test_a_log_is_the_mean_of_the_parts(tmp_path, teacher):
    with in_double():
        logs = [Trainer(tiny.run(find("nano-canny")(), tmp_path / str(turns), teacher, accumulate=turns)).step(0)
                for turns in (1, 2)]
    assert float(logs[1]["generator/loss"]) == pytest.approx(float(logs[0]["generator/loss"]), rel=1e-9)
    assert float(logs[1]["cos_real_fake"]) == pytest.approx(float(logs[0]["cos_real_fake"]), rel=1e-9)


def test_a_classifier_in_parts_is_refused(tmp_path, teacher):
    run = tiny.run(find("nano-classifier")(), tmp_path, teacher, accumulate=2)
    with pytest.raises(UsageError, match="normalised over its whole batch"):
        Trainer(replace(run, batch=4))
