"""Previews: what they show, that training takes no notice of them, and that a resumed run goes on with them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import tiny
from jdm.controls import Canny
from jdm.data.pictures import save_picture
from jdm.data.sources import load_pictures
from jdm.errors import RunError, UsageError
from jdm.evaluation.questions import Questions, answers
from jdm.evaluation.sampling import Sampler
from jdm.library import load_model
from jdm.models.stable_diffusion import StableDiffusion
from jdm.recipes import find
from jdm.run import Shown
from jdm.space import to_bytes
from jdm.training import checkpoint
from jdm.training.loop import train
from jdm.training.previews import FRAMES, MARGIN, about, film, kept, sheet
from jdm.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("untrained_judge")
# One of each kind: full copies, LoRAs in bfloat16, several steps, a frozen generator, no teacher, a multi-step model.
KINDS = ("nano-canny", "sd15-canny-lora", "nano-canny-4", "nano-nct", "nano-controlnet", "nano-teacher", "nano-vae",
         "nano-text-reward", "nano-controlled-teacher")


def log(run) -> list[dict]:
    rows = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def small(name, out, teacher, **changes):
    return tiny.run(find(name)(), out, teacher, **{"steps": 4, "save_every": 4, **changes})


def rows_of(file) -> dict[str, torch.Tensor]:
    """The rows of a preview as uint8 [N, 3, 32, 32]: each picture is drawn three times as large."""
    said, pixels = about(file), torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)
    assert said
    height, columns = pixels.shape[1] // len(said.rows), range(MARGIN + 2, pixels.shape[2], 98)
    return {name: torch.stack([pixels[:, k * height + 2 : k * height + 98 : 3, x : x + 96 : 3] for x in columns])
            for k, name in enumerate(said.rows)}


@pytest.mark.parametrize("name", KINDS)
def test_previews_leave_every_number_as_it_was(name, teacher, tmp_path):
    plain, shown = (small(name, tmp_path / str(every), teacher, preview_every=every) for every in (0, 2))
    train(plain)
    torch.rand(1)  # whatever the random state was before
    train(shown)
    assert log(plain) == log(shown)
    ends = [load_file(checkpoint.last(run.out) / checkpoint.WHOLE) for run in (plain, shown)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert not (plain.out / "previews").exists()
    assert list(kept(shown.out)) == [0, 2, 4]


def test_rows_are_control_student_and_teacher(teacher, tmp_path):
    run = small("nano-canny", tmp_path, teacher, preview_every=2)
    folder = train(run)
    first, last = (rows_of(kept(tmp_path)[step]) for step in (0, 4))
    asked = Questions.of(load_pictures("fashion-mnist", "test[64:128]", 32), Canny(), 8, 0)
    assert list(last) == ["control", "student", "teacher, 25 steps"]
    assert torch.equal(last["control"], to_bytes(Canny().image(asked.c) * 2 - 1))
    exported = answers(Sampler(load_model(str(folder))), asked, Canny())
    assert (last["student"].int() - exported.int()).abs().max() <= 1
    assert not torch.equal(first["student"], last["student"])
    assert torch.equal(first["control"], last["control"])
    assert torch.equal(first["teacher, 25 steps"], last["teacher, 25 steps"])
    assert about(kept(tmp_path)[4]).prompts == asked.y


def test_the_teacher_draws_from_the_students_noise(teacher, tmp_path):
    """At 25 steps of guidance 2 by hand: the row is the teacher's answer to the same z and prompt."""
    from jdm.generator import starting_noise
    from jdm.methods.references import ddim

    run = small("nano-text-reward", tmp_path, teacher, preview_every=4)
    trainer = Trainer(run)
    with trainer.averaged() as modules:
        shown = trainer.task.preview(modules)
    model = load_model(str(teacher))
    assert isinstance(model, StableDiffusion)
    score = model.score_of(model.text(one_by_one=True), model.denoiser(), 2.0)
    with torch.no_grad():
        x = ddim(score, starting_noise(model.latent_shape(8, 32), 0), shown.prompts, 25)
        expected = to_bytes(model.space.decode(x))
    assert list(shown.rows) == ["student", "teacher, 25 steps"]
    assert (shown.rows["teacher, 25 steps"].int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize(("asked", "drawn"), [(0.0, 0.0), (1.0, 2.0), (3.0, 3.0)])
def test_the_teachers_row_has_the_methods_guidance(asked, drawn, teacher, tmp_path, monkeypatch):
    """1 stands for the card's, which says none: 2."""
    networks, seen = tiny.networks(small("nano-text-reward", tmp_path, teacher, preview_every=1)), []
    monkeypatch.setattr(networks, "real_score", seen.append)
    networks.preview(asked)
    assert seen == [drawn]


def test_a_stopped_run_has_the_whole_runs_previews(teacher, tmp_path):
    whole, halves = (small("nano-canny", tmp_path / name, teacher, steps=6, save_every=3, preview_every=2)
                     for name in ("whole", "halves"))
    train(whole)

    def stop(done, _):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(halves, stop)
    assert list(kept(halves.out)) == [0, 2, 4]
    Trainer(halves)  # goes on after step 3
    assert list(kept(halves.out)) == [0, 2]
    train(halves)
    for name in ("step-0000000.png", "step-0000004.png", "step-0000006.png", "film.png"):
        assert (whole.out / "previews" / name).read_bytes() == (halves.out / "previews" / name).read_bytes()


def test_the_end_of_a_run_is_shown(teacher, tmp_path):
    train(small("nano-canny", tmp_path / "uneven", teacher, steps=3, preview_every=2))
    assert list(kept(tmp_path / "uneven")) == [0, 2, 3]
    early = small("nano-canny", tmp_path / "early", teacher, steps=9, preview_every=5, probe_every=1, best="judge",
                  patience=1)
    trainer = Trainer(early)
    trainer.task.probe = lambda modules: {"judge": 1.0}
    trainer.step(0)
    trainer.step(1)
    assert trainer.best.ended
    assert list(kept(early.out)) == [2]
    assert '<meta http-equiv=refresh' not in (early.out / "report.html").read_text()


@pytest.mark.parametrize("name", ["nano-classifier", "nano-reward", "nano-posterior"])
def test_a_run_without_pictures_is_refused_previews(name, teacher, tmp_path):
    with pytest.raises(UsageError, match=r"draws no pictures.*leave out --preview-every"):
        train(small(name, tmp_path / "run", teacher, preview_every=1))
    assert not (tmp_path / "run").exists()


def test_a_nan_picture_costs_one_preview(teacher, tmp_path, capsys, monkeypatch):
    draw = Sampler.__call__

    def broken(self, *given, **named):
        if next_step[0] == 2:
            raise RunError("a picture is not finite (NaN or infinity)")
        return draw(self, *given, **named)

    next_step = [0]
    monkeypatch.setattr(Sampler, "__call__", broken)
    train(small("nano-canny", tmp_path, teacher, preview_every=1), lambda done, _: next_step.__setitem__(0, done + 1))
    assert list(kept(tmp_path)) == [0, 1, 3, 4]
    assert "warning: step 2: no preview (a picture is not finite" in capsys.readouterr().err


def picture(value: int) -> torch.Tensor:
    return torch.full((2, 3, 100, 100), value, dtype=torch.uint8)


def written(out, steps, **rows) -> None:
    for step in steps:
        shown = Shown(["a", "b"], {"control": picture(9), "student": picture(step), **rows}, "student")
        notes = {"jdm": json.dumps({"rows": list(shown.rows), "prompts": shown.prompts, "trained": "student"})}
        save_picture(sheet(shown.rows), out / "previews" / f"step-{step:07}.png", notes)


def strips(image) -> list[int]:
    """The grey of the first picture of each row, at its middle."""
    return [image.getpixel((MARGIN + 52, 52 + 104 * k))[0] for k in range(image.height // 104)]


def test_a_film_shows_steps_between_the_still_rows(tmp_path):
    written(tmp_path, range(0, 250, 10), teacher=picture(255))
    shown = strips(film(tmp_path))
    assert len(shown) == FRAMES + 2
    assert shown[:2] == [9, 0]
    assert shown[-2:] == [240, 255]
    assert shown[1:-1] == sorted(shown[1:-1])


def test_a_film_needs_two_previews_of_one_kind(tmp_path):
    assert film(tmp_path) is None
    written(tmp_path, [1])
    assert film(tmp_path) is None
    written(tmp_path, [2, 3], teacher=picture(5))
    assert strips(film(tmp_path)) == [9, 2, 3, 5], "other rows than the last preview's are left out"


def test_damaged_previews_are_passed_over(tmp_path):
    written(tmp_path, [1, 2, 3])
    file = kept(tmp_path)[2]
    file.write_bytes(file.read_bytes()[:-200])
    Image.new("RGB", (10, 10)).save(tmp_path / "previews" / "step-0000004.png")
    (tmp_path / "previews" / "step-0000005.png").write_text("mine")
    assert strips(film(tmp_path)) == [9, 1, 3]


@pytest.mark.parametrize(("side", "drawn"), [((32, 32), (96, 96)), ((64, 64), (128, 128)), ((512, 512), (256, 256)),
                                             ((512, 768), (256, 384)), ((100, 100), (100, 100))])
def test_pictures_are_drawn_at_a_readable_size(side, drawn):
    image = sheet({"student": torch.zeros(2, 3, *side, dtype=torch.uint8)})
    assert (image.height - 4, (image.width - MARGIN - 6) // 2) == drawn


def test_a_run_of_one_picture_draws_none(teacher, tmp_path):
    run = small("nano-canny", tmp_path / "run", teacher, preview_every=1)
    run = replace(run, batch=1, data=replace(run.data, split="test[:1]", validation="test[:1]"))
    with pytest.raises(UsageError, match="fewer than two to ask about"):
        train(run)
