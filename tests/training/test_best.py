"""The best averages of a run by its probe, and when it ends early."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import tiny
from jdm.cli.parser import main
from jdm.errors import UsageError
from jdm.recipes import all_recipes
from jdm.training import checkpoint
from jdm.training.best import Best
from jdm.training.loop import train
from jdm.training.trainer import Trainer

RECIPE = all_recipes()["nano-diff-instruct"]
JUDGED = {1: -3.0, 2: -1.0, 3: -2.0, 4: -1.5, 5: -4.0, 6: -0.5}  # by step


@pytest.fixture
def judged(monkeypatch):
    """Every probe measures JUDGED; what the averages were at each step is kept."""
    seen, step = {}, Trainer.step

    def watched(self, number):
        self.task.probe = lambda modules: {"judge": JUDGED[number + 1], "fd": -JUDGED[number + 1]}
        logs = step(self, number)
        seen[number + 1] = {k: v.clone() for k, v in self.averages["unet"].items()}
        return logs

    monkeypatch.setattr(Trainer, "step", watched)
    return seen


def run(out, teacher, steps=6, **changes):
    return replace(tiny.run(RECIPE(), out, teacher, steps=steps), probe_every=1, save_every=2, **changes)


def exported(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in b)


@pytest.mark.parametrize("best", ["judge", "fd"])  # more of one is better, less of the other
def test_the_best_averages_are_exported_not_the_last(judged, teacher, tmp_path, best):
    folder = train(run(tmp_path / "out", teacher, steps=5, best=best))
    assert same(exported(folder), judged[2])
    assert not same(judged[2], judged[5])


@pytest.mark.parametrize(("measure", "saved"), [("judge", [1, 3]), ("prompt_agreement", [1, 3]), ("fd", [1, 2]),
                                               ("consistency", [1, 2])])
def test_each_measure_is_better_one_way(measure, saved, tmp_path, monkeypatch):
    """The first of equal ones is kept, and what is compared is the mean over all processes."""
    steps, measured = [], {1: 0.5, 2: 0.2, 3: 0.9, 4: 0.9, 5: 0.2}
    monkeypatch.setattr(checkpoint, "save", lambda state, out, step: steps.append(step))
    monkeypatch.setattr("jdm.training.best.batch_mean", lambda value: value + 1)
    (tmp_path / "metrics.jsonl").write_text("")
    best = Best(replace(tiny.run(RECIPE(), tmp_path, tmp_path), best=measure, probe_every=1, patience=2),
                tmp_path / "metrics.jsonl")
    ended = []
    for step, value in measured.items():
        best.note(step, {measure: value}, {})
        ended.append(best.ended)
    assert steps == saved
    assert ended == [step >= saved[-1] + 2 for step in measured]
    assert [value for _, value in best.seen] == pytest.approx([value + 1 for value in measured.values()])


def test_without_best_the_last_averages_are_exported(judged, teacher, tmp_path):
    assert same(exported(train(run(tmp_path / "out", teacher, steps=5))), judged[5])


def test_a_run_ends_when_patience_is_out(judged, teacher, tmp_path):
    """The same command again adds no step."""
    asked = run(tmp_path / "out", teacher, best="judge", patience=3)
    train(asked)
    assert list(judged) == [1, 2, 3, 4, 5]  # the better one of step 6 is never seen
    assert same(exported(asked.out / "model"), judged[2])
    assert checkpoint.last(asked.out).name == "step-0000005"
    judged.clear()
    train(asked)
    assert not judged


def test_a_resumed_run_knows_its_best_probe(judged, teacher, tmp_path):
    asked = run(tmp_path / "out", teacher, best="judge", patience=3)
    with pytest.raises(KeyboardInterrupt):
        train(asked, lambda done, _: done < 3 or interrupt())
    assert checkpoint.last(asked.out).name == "step-0000002"
    best = judged[2]
    judged.clear()
    train(asked)
    assert list(judged) == [3, 4, 5]
    assert same(exported(asked.out / "model"), best)


def test_a_resumed_run_forgets_undone_best_steps(judged, teacher, tmp_path, monkeypatch):
    """Steps taken again after a checkpoint may have another best."""
    asked = run(tmp_path / "out", teacher, best="judge")
    with pytest.raises(KeyboardInterrupt):
        train(asked, lambda done, _: done < 6 or interrupt())
    assert [p.name for p in checkpoint.all_checkpoints(asked.out / "best")] == ["step-0000002", "step-0000006"]
    shutil.rmtree(checkpoint.last(asked.out))  # as if step 6 had not been saved
    monkeypatch.setitem(JUDGED, 6, -9.0)
    best = judged[2]
    train(asked)
    assert [p.name for p in checkpoint.all_checkpoints(asked.out / "best")] == ["step-0000002"]
    assert same(exported(asked.out / "model"), best)


def test_a_lost_best_is_looked_for_anew(judged, teacher, tmp_path):
    asked = run(tmp_path / "out", teacher, steps=5, best="judge")
    with pytest.raises(KeyboardInterrupt):
        train(asked, lambda done, _: done < 2 or interrupt())
    shutil.rmtree(asked.out / "best")
    train(asked)
    assert same(exported(asked.out / "model"), judged[4])  # the best after step 2


def interrupt():
    raise KeyboardInterrupt


def test_the_command_says_which_step_was_best(judged, teacher, tmp_path, capsys):
    (tmp_path / "recipe.py").write_text(
        "import json\nfrom pathlib import Path\nfrom jdm.recipes import recorded\nfrom jdm.run import Run\n\n"
        f"def recipe() -> Run:\n    return recorded(Path({str(tmp_path / 'asked.json')!r}))\n")
    from jdm.run import described

    (tmp_path / "asked.json").write_text(json.dumps({"run": described(run(tmp_path / "out", teacher))}))
    assert main(["train", str(tmp_path / "recipe.py"), "--best", "judge", "--patience", "2"]) == 0
    assert "the best by judge is exported: step-0000002 of step-0000004" in capsys.readouterr().err


@pytest.mark.parametrize(("changes", "said"), [
    ({"best": "beauty"}, "cannot be compared by 'beauty'; choose --best from judge, prompt_agreement, fd, consistency"),
    ({"patience": 2}, "patience 2 needs --best"),
    ({"best": "fd", "probe_every": 0}, "--best needs --probe-every of at least 1"),
])
def test_what_cannot_be_measured_is_refused_before_training(teacher, tmp_path, changes, said):
    log = tmp_path / "metrics.jsonl"
    log.write_text("")
    asked = replace(run(tmp_path / "out", teacher), **changes)
    with pytest.raises(UsageError, match=said):
        Best(asked, log)
    with pytest.raises(UsageError, match="no validation pictures"):
        Best(replace(asked, best="fd", patience=0, probe_every=1), log, measures=False)


def test_a_method_without_measurements_is_refused(teacher, tmp_path, monkeypatch):
    asked = run(tmp_path / "out", teacher, best="fd")
    task = type(asked.method).task
    monkeypatch.setattr(type(asked.method), "task", lambda self, run: replace(task(self, run), probe=None))
    with pytest.raises(UsageError, match="no validation pictures"):
        Trainer(asked)


def test_an_unmeasured_best_names_what_is_measured(teacher, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    best = Best(run(tmp_path, teacher, best="judge"), tmp_path / "metrics.jsonl")
    with pytest.raises(UsageError, match="does not measure judge; choose --best from fd"):
        best.note(1, {"fd": 1.0, "squared_error": 2.0}, {})
