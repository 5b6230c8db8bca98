"""Runs on pictures of three shapes: resumed, prepared, of a UNet that is told sizes and of a transformer, refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from families import made
from jdm.errors import UsageError
from jdm.library import load_model
from jdm.loading import Loaded
from jdm.models.folder import save_pipeline
from jdm.models.text import TextEncoder
from jdm.prepare import prepare
from jdm.recipes import find
from jdm.run import Data, Run
from jdm.training.checkpoint import last
from jdm.training.loop import train
from jdm.training.product import write_model
from jdm.training.record import measurements
from jdm.training.trainer import Trainer
from photos import of_three_shapes
from tiny import cached, same

pytestmark = pytest.mark.usefixtures("untrained_judge")
CUT = {"buckets": 8, "flip": 0.5, "crop": "random"}


def bucketed(recipe: str, out: Path, teacher: Path, place: Path, steps: int = 4, **changes) -> Run:
    data = Data(source=str(place), size=32, splits="held-out", **{**CUT, **changes})
    return tiny.run(find(recipe)(), out, teacher, steps, data=data)


def losses(run: Run) -> list[dict]:
    trainer = Trainer(run)
    return [{k: float(v) for k, v in trainer.step(s).items()} for s in range(trainer.start, run.steps)]


def tensors(out: Path) -> dict[str, torch.Tensor]:
    place = last(out)
    assert place is not None
    return load_file(place / "state.safetensors")


def test_a_resumed_run_equals_the_whole(teacher, tmp_path):
    place = of_three_shapes(tmp_path / "photos", captions=("a coat", "a left shoe"))
    whole = bucketed("nano-canny", tmp_path / "whole", teacher, place)
    train(whole)
    broken = Trainer(replace(whole, out=tmp_path / "broken"))
    for step in range(2):
        broken.step(step)
    train(replace(whole, out=tmp_path / "broken"))
    assert same(tensors(tmp_path / "whole"), tensors(tmp_path / "broken"))
    rows = [measurements(tmp_path / name / "metrics.jsonl") for name in ("whole", "broken")]
    assert [{**row, "seconds": 0} for row in rows[0]] == [{**row, "seconds": 0} for row in rows[1]]


@pytest.mark.parametrize("kind", ["sdxl", "sd35", pytest.param("z-image", marks=pytest.mark.slow)])
def test_families_train_at_every_buckets_size(kind, tmp_path):
    """And SDXL is told the size of the very batch."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = save_pipeline(made(kind), tmp_path / "teacher")
    run = bucketed("nano-canny", tmp_path / "run", teacher, of_three_shapes(tmp_path / "photos"))
    told, sizes, trainer = set(), set(), Trainer(run)

    def hear(module, args, named):
        if kind == "sdxl":
            told.add((tuple(args[0].shape[2:]), tuple(named["added_cond_kwargs"]["time_ids"][0].int().tolist())))

    for network in trainer.task.frozen:
        if hasattr(network, "backbone"):
            network.backbone.register_forward_pre_hook(hear, with_kwargs=True)
    begin = trainer.task.begin

    def begun(step):
        state = begin(step)
        sizes.add(tuple(state.z.shape[2:]))
        return state

    trainer.task.begin = begun
    for step in range(run.steps):
        assert all(torch.tensor(float(v)).isfinite() for v in trainer.step(step).values())
    assert sizes == {(8, 8), (10, 6), (6, 10)}
    assert told == ({(s, (4 * s[0], 4 * s[1], 0, 0, 4 * s[0], 4 * s[1])) for s in sizes} if kind == "sdxl" else set())
    exported = load_model(str(write_model(trainer))).controlnet.state_dict()
    for name, average in trainer.averages["controlnet"].items():
        assert torch.equal(exported[name], average), name


def test_prompts_alone_are_prepared(teacher, tmp_path, monkeypatch):
    """Pictures are cut anew in each step; the losses are the same."""
    run = bucketed("nano-canny", tmp_path / "plain", teacher, of_three_shapes(tmp_path / "photos"), steps=2)
    wanted = losses(run)
    parts = prepare(run, tmp_path / "cache")
    assert [name.partition("-")[0] for name in parts] == ["text"]
    monkeypatch.setattr(TextEncoder, "encode", None)
    monkeypatch.setattr("jdm.loading.Loaded.warn_of_misfits", lambda self: None)
    assert losses(cached(run, tmp_path / "cache", tmp_path / "quick")) == wanted


def test_prepared_pictures_are_mirrored(teacher, tmp_path, monkeypatch):
    how = {"buckets": 0, "crop": "centre"}
    run = bucketed("nano-canny", tmp_path / "plain", teacher, of_three_shapes(tmp_path / "photos"), 1, **how)
    wanted = losses(run)
    parts = prepare(run, tmp_path / "cache")
    assert {name.partition("-")[0] for name in parts} == {"pictures", "text"}
    monkeypatch.setattr("jdm.loading.Loaded.warn_of_misfits", lambda self: None)
    assert losses(cached(run, tmp_path / "cache", tmp_path / "quick")) == wanted
    assert losses(bucketed("nano-canny", tmp_path / "same", teacher, tmp_path / "photos", 1, flip=0, **how)) != wanted


@pytest.mark.parametrize(("recipe", "how", "said"), [
    ("nano-controlnet", {"flip": 0.5, "buckets": 0, "crop": "centre"}, "--data.flip 0.5 .* keeps its latents"),
    ("nano-controlnet", {"flip": 0, "crop": "centre"}, "--data.buckets 8 .* keeps its latents"),
    ("nano-nct", {"flip": 0, "buckets": 0}, "--data.crop random .* captions alone"),
    ("nano-canny", {"buckets": 5}, "--data.size 32 x 32 is not made of multiples of --data.buckets 5"),
    ("nano-canny", {"buckets": 2}, "--data.buckets 2: both sides .* multiples of 4, got 56 x 18; give other"),
    ("nano-canny", {"buckets": -8}, "--data.buckets must be >= 0, got -8"),
    ("nano-canny", {"flip": 1.5}, r"--data.flip must be in \[0, 1\], got 1.5")])
def test_what_cannot_be_is_refused(recipe, how, said, teacher, tmp_path):
    with pytest.raises(UsageError, match=said):
        _ = Loaded(bucketed(recipe, tmp_path / "run", teacher, of_three_shapes(tmp_path / "photos", 8), **how)).teacher


def test_handed_maps_are_not_mirrored(teacher, tmp_path):
    place, code = of_three_shapes(tmp_path / "photos", 8, maps=True), tmp_path / "mine.py"
    code.write_text("from jdm.controls import Control\n\n\nclass Pose(Control):\n"
                    "    name, channels, handed = 'pose', 3, True\n\n    def h(self, images):\n        return images\n")
    run = bucketed("nano-canny", tmp_path / "run", teacher, place, controls="maps")
    run = replace(run, method=replace(run.method, control=f"{code}:Pose"))
    with pytest.raises(UsageError, match="mirrored pose map is not the map of the mirrored picture"):
        _ = Loaded(run).control
    assert Loaded(replace(run, data=replace(run.data, flip=0))).control is not None
