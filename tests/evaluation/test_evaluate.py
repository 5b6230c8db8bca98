"""Measurements of whole models: what is asked, what is answered, what is reported."""

import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import tiny
from jdm.controls import Canny
from jdm.data.sources import load_pictures
from jdm.errors import UsageError
from jdm.evaluation import evaluate as evaluation
from jdm.evaluation import html as report
from jdm.evaluation.chart import chart
from jdm.evaluation.evaluate import evaluate, noise_diversity
from jdm.evaluation.questions import Questions, answers, controls_of, in_parts
from jdm.evaluation.reference import Reference, references
from jdm.evaluation.sampling import Drawing, Sampler, generator
from jdm.files import ASSETS
from jdm.generator import starting_noise
from jdm.library import load_model
from jdm.metrics.consistency import chance
from jdm.metrics.extractors import ClassifierFeatures
from jdm.metrics.frechet import Statistics, frechet_distance
from jdm.metrics.prompts import prompt_agreement
from jdm.metrics.spread import bootstrap
from jdm.models.classifier import Classifier
from jdm.models.folder import save_pipeline
from jdm.models.stable_diffusion import StableDiffusion
from jdm.rewards.classifier import nano_judge
from jdm.run import Data
from jdm.space import from_bytes, to_bytes, unit
from jdm.training.loop import train
from tiny import nano_canny, nano_diff_instruct

PICTURES = load_pictures("fashion-mnist", "test[:40]", 32)


@pytest.fixture
def student(tmp_path):
    torch.manual_seed(0)
    return tiny.student(tiny.model(), tmp_path / "student")


@pytest.fixture
def classifier(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluation, "judge", tiny.judge)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tiny.judge()


def sampler() -> Sampler:
    torch.manual_seed(0)
    return Sampler(tiny.model(), steps=2, guidance=2.0)


def test_prompt_and_control_come_from_one_picture():
    questions = Questions.of(PICTURES, Canny(), 12, seed=0)
    for i in range(12):
        grey = PICTURES.batch(torch.tensor([i]))[0, 0].numpy()
        assert np.array_equal(questions.c[i, 0].numpy() * 255, cv2.Canny(grey, 100, 200))
        assert questions.y[i] in PICTURES.captions[questions.labels[i]]


def test_picture_i_is_the_same_in_any_batch():
    questions, same = Questions.of(PICTURES, None, 7, seed=3), sampler()
    one, many = (answers(same, questions, None, batch=b) for b in (1, 7))
    assert (one.int() - many.int()).abs().max() <= 1


def test_answers_have_the_size_of_the_pictures():
    wide = Questions.of(load_pictures("fashion-mnist", "test[:4]", (32, 40)), None, 4, seed=0)
    assert answers(sampler(), wide, None).shape == (4, 3, 32, 40)


def test_guidance_counts_two_evaluations_a_step():
    model = tiny.model()
    assert [Sampler(model, s, w).nfe for s, w in ((50, 2.0), (50, 1.0), (1, 2.0))] == [100, 50, 1]


def test_floors_are_interpolated_linearly_in_1_over_n():
    statistics = Statistics(torch.zeros(2), torch.eye(2), 9, "x", {"floors": json.dumps({"100": 3.0, "200": 2.0})})
    reference = Reference(statistics)
    assert reference.floor(100) == 3.0
    assert reference.floor(200) == 2.0
    assert reference.floor(400) == 2.0
    assert reference.floor(50) == pytest.approx(6.0)
    assert reference.floor(150) == pytest.approx(1.0 + 200 / 150)  # 3 = a + b/100, 2 = a + b/200: a = 1, b = 200


def test_a_reference_is_measured_once_then_read(classifier, tmp_path, monkeypatch):
    torch.manual_seed(0)
    folder = tmp_path / "teacher"
    save_pipeline(tiny.model(), folder)
    extractor = ClassifierFeatures(classifier)
    moved, to = [], StableDiffusion.to
    monkeypatch.setattr(StableDiffusion, "to", lambda model, place: moved.append(place) or to(model, place))
    made = references(str(folder), [extractor], PICTURES, steps=2, samples=30, device="cpu:0")[extractor.name]
    assert moved == ["cpu:0"]
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.safetensors")}
    again = references(str(folder), [extractor], PICTURES, steps=2, samples=30)[extractor.name]
    assert len(files) == 1
    assert files == {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.safetensors")}
    assert frechet_distance(made.statistics, again.statistics) < 1e-4
    assert made.floor(30) > 0


def test_a_reference_belongs_to_one_picture_size(classifier, tmp_path, monkeypatch):
    torch.manual_seed(0)
    folder, extractor = str(save_pipeline(tiny.model(), tmp_path / "teacher")), ClassifierFeatures(classifier)
    wide = load_pictures("fashion-mnist", "test[:40]", (32, 40))
    a, b = (references(folder, [extractor], pictures, steps=2, samples=30)[extractor.name].statistics
            for pictures in (PICTURES, wide))
    assert (a.extra["size"], b.extra["size"]) == ("32 x 32", "32 x 40")
    assert a.extra["sha256_of_samples"] != b.extra["sha256_of_samples"]
    monkeypatch.setattr("jdm.evaluation.reference._measured",
                        lambda _, extractors, *more: dict.fromkeys(extractors, "measured"))
    shipped = ClassifierFeatures(Classifier.load(ASSETS / "nano-classifier"))
    whole, taller = (load_pictures("fashion-mnist", "test", size) for size in (32, 36))
    assert references("nano-sd", [shipped], whole)[shipped.name].statistics.n == 5000
    assert references("nano-sd", [shipped], taller) == {shipped: "measured"}


def test_evaluate_reports_what_the_pictures_hold(student, classifier, tmp_path, monkeypatch):
    teacher = tmp_path / "teacher"
    torch.manual_seed(0)
    save_pipeline(tiny.model(), teacher)
    monkeypatch.setattr(evaluation, "references", lambda t, e, p, **_: references(t, e, p.part("[:30]"), 2, samples=30))
    row = evaluate(str(student), "canny", n=60, seed=5, teacher=str(teacher), quick=True, scored=["nano-judge"])
    questions = Questions.of(load_pictures("fashion-mnist", "test", 32), Canny(), 60, seed=5)
    sampler_ = Sampler(StableDiffusion.load(str(student)))
    pictures = answers(sampler_, questions, Canny())
    seen = Canny().h(unit(from_bytes(pictures)))
    assert row["consistency"] == pytest.approx((seen - questions.c).abs().mean().item(), abs=1e-6)
    each = (seen - questions.c).abs().mean((1, 2, 3))
    assert row["consistency_spread"] == pytest.approx(bootstrap(each)[1], abs=1e-6)
    space = StableDiffusion.load(str(student)).space
    trip = Canny().h(unit(from_bytes(to_bytes(space.decode(space.encode(2 * questions.images - 1))))))
    assert row["consistency_round_trip"] == pytest.approx((trip - questions.c).abs().mean().item(), abs=1e-5)
    extractor, whole = ClassifierFeatures(classifier), load_pictures("fashion-mnist", "test", 32)
    (kept,) = references(str(teacher), [extractor], whole.part("[:30]"), 2, samples=30).values()
    own = Statistics.of(extractor.features(pictures), extractor.name)
    assert (row["n"], row["nfe"], row["fd_extractor"]) == (60, 1, extractor.name)
    assert row["fd"] == pytest.approx(frechet_distance(own, kept.statistics))
    assert row["fd_floor"] == pytest.approx(kept.floor(60))
    assert row["prompt_agreement"] == prompt_agreement(classifier, pictures, questions.labels)
    other = nano_judge()  # not the classifier of distances, and no reward
    said = other(unit(from_bytes(pictures)), questions.y)
    assert row["judge"] == pytest.approx(said.mean().item(), abs=1e-5)
    assert row["nano_judge"] == pytest.approx(row["judge"], abs=1e-5)
    assert row["judge_accuracy"] == prompt_agreement(other.classifier, pictures, questions.labels)
    assert min(row["seconds_per_image"], row["seconds_per_image_batch1"]) > 0
    assert row["consistency_chance"] + row["consistency_blank"] > 0.15
    alike = chance(questions.c, seen, prompts=questions.y)  # most prompts come once among 60 pictures
    assert 1 < len(alike) < 60
    assert row["consistency_same_prompt"] == pytest.approx(alike.mean().item())
    assert row["consistency_same_prompt_spread"] == pytest.approx(bootstrap(alike)[1])
    differing = noise_diversity(sampler_, questions, Canny(), extractor, 16)
    assert row["diversity"] == pytest.approx(differing.mean)
    assert row["diversity_spread"] == pytest.approx(bootstrap(differing.per_group)[1])
    groups = []
    monkeypatch.setattr(evaluation, "noise_diversity", lambda *given: groups.append(given[4]) or differing)
    for quick in (True, False):
        evaluation.measured(pictures, questions, Canny(), {extractor.name: kept}, [extractor], sampler_, quick)
    assert groups == [16, evaluation.DIVERSITY_GROUPS]


def test_an_evaluation_runs_on_the_device_asked_for(student, classifier, monkeypatch):
    device, on = "cpu:0", {}  # a name that nothing has by default

    class StopError(Exception):
        pass

    def spy(name, at, function):
        def called(*args, **named):
            on.setdefault(name, set()).add(named.get("device", args[at] if len(args) > at else None))
            return function(*args, **named)
        return called

    def target(teacher, extractors, pictures, **_):
        (extractor,) = extractors
        features = extractor.features(PICTURES.batch(torch.arange(40)))
        return {extractor.name: Reference(Statistics.of(features, extractor.name, {"floors": '{"250": 1.0}'}))}

    def scored(specs, pictures, prompts, place="cpu", styles=(), taken=()):
        on["scores"] = {place}
        assert {"consistency", "nfe"} <= set(taken)
        raise StopError

    monkeypatch.setattr(StableDiffusion, "to", spy("model", 1, StableDiffusion.to))
    monkeypatch.setattr(evaluation, "extractors", spy("extractors", 3, lambda *_: [ClassifierFeatures(classifier)]))
    monkeypatch.setattr(evaluation, "controls_of", spy("controls", 2, controls_of))
    monkeypatch.setattr("jdm.evaluation.questions.controls_of", spy("questions", 2, controls_of))
    monkeypatch.setattr(evaluation, "references", spy("references", 6, target))
    monkeypatch.setattr(evaluation, "cost", lambda *_, **__: {"nfe": 1})
    monkeypatch.setattr(evaluation, "scores", scored)
    with pytest.raises(StopError):
        evaluate(str(student), "canny", n=4, quick=True, scored=["clip"], device=device)
    assert on.pop("controls") == {torch.device("cpu")}  # named, where the model's weights are
    assert on == {key: {device} for key in ("model", "extractors", "questions", "references", "scores")}


def test_pictures_are_measured_in_parts_of_equal_pixels():
    assert [len(part) for part in in_parts(torch.zeros(301, 1, 32, 32))] == [250, 51]
    assert [len(part) for part in in_parts(torch.zeros(3, 1, 512, 512))] == [1, 1, 1]
    images = unit(from_bytes(PICTURES.batch(torch.arange(20))))
    assert torch.equal(controls_of(Canny(), images), Canny().h(images))


def test_a_run_is_judged_as_it_trains(teacher, classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "PROBE_SAMPLES", 8)
    run = tiny.run(nano_diff_instruct(), tmp_path, teacher, steps=1, probe_every=1)
    model = StableDiffusion.load(str(train(run)))
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    held_out = load_pictures(run.data.source, run.data.validation, 32)
    questions = Questions.of(held_out, None, min(500, len(held_out)), 0)
    pictures, other = answers(Sampler(model), questions, None), nano_judge()
    said = other(unit(from_bytes(pictures)), questions.y).mean().item()
    assert row["probe/judge"] == pytest.approx(said, abs=1e-3)
    assert row["probe/judge_accuracy"] == prompt_agreement(other.classifier, pictures, questions.labels)


def test_evaluate_refuses_a_model_without_a_control_branch(tmp_path, classifier):
    save_pipeline(tiny.model(), tmp_path / "teacher")
    with pytest.raises(UsageError, match="no ControlNet"):
        evaluate(str(tmp_path / "teacher"), "canny", n=4)


def test_a_generator_ignoring_z_has_no_diversity(classifier):
    sampler_ = sampler()
    questions = Questions.of(PICTURES, None, 3, seed=0)
    sampler_.x = lambda z, y, control=None, renoise=None: torch.zeros_like(z)  # type: ignore[method-assign]
    assert noise_diversity(sampler_, questions, None, ClassifierFeatures(classifier), 3, 4).mean < 1e-5


class Asked:
    """A sampler whose pictures are black, and what it was asked for."""

    nfe = 1

    def __init__(self):
        self.model, self.asked = sampler().model, []

    def __call__(self, z, y, control=None, batch=64, seed=0):
        self.asked.append((z, y, control, seed))
        return torch.zeros(len(z), 3, 32, 32, dtype=torch.uint8)


def test_diversity_varies_noise_alone_within_a_group(classifier):
    questions, asked = Questions.of(PICTURES, Canny(), 5, seed=3), Asked()
    noise_diversity(asked, questions, Canny(), ClassifierFeatures(classifier), groups=4, draws=3)
    ((z, y, shown, seed),) = asked.asked
    assert y == [caption for caption in questions.y[:4] for _ in range(3)]
    assert torch.equal(shown, torch.stack([c.expand(3, -1, -1) for c in questions.c[:4] for _ in range(3)]))
    assert seed == 4
    assert torch.equal(z, starting_noise(tuple(z.shape), 4))  # not the noise of the pictures, which are of seed 3
    assert len({tuple(row) for row in z.flatten(1).tolist()}) == 12


def test_answers_are_drawn_from_the_questions_seed():
    questions, asked = Questions.of(PICTURES, Canny(), 5, seed=3), Asked()
    answers(asked, questions, Canny())
    ((z, y, shown, seed),) = asked.asked
    assert torch.equal(z, starting_noise(tuple(z.shape), 3))
    assert (y, seed) == (questions.y, 3)
    assert torch.equal(shown, questions.c.expand(-1, 3, -1, -1))


def test_the_floor_is_that_of_n_pictures(classifier):
    questions, extractor = Questions.of(PICTURES, None, 12, seed=0), ClassifierFeatures(classifier)
    pictures, others = PICTURES.batch(torch.arange(12)), PICTURES.batch(torch.arange(24))
    floors = {"floors": json.dumps({"6": 4.0, "12": 3.0, "24": 2.0, "1000": 1.0})}
    target = Reference(Statistics.of(extractor.features(others), extractor.name, floors))
    row = evaluation.measured(pictures, questions, None, {extractor.name: target}, [extractor], Asked(), quick=True)
    assert (row["n"], row["fd_floor"]) == (12, 3.0)


def test_timing_includes_reading_the_prompts():
    questions, asked = Questions.of(PICTURES, None, 6, seed=0), Asked()
    asked.net, asked.text = asked.model.unet, SimpleNamespace(forget=lambda: asked.asked.append("forgot"))
    row = evaluation.cost(asked, questions, None, batches=(4, 1), repeats=1)
    assert asked.asked[0::2] == ["forgot"] * (len(asked.asked) // 2)
    assert {len(call[1]) for call in asked.asked[1::2]} == {4, 1}
    assert min(row["seconds_per_image"], row["seconds_per_image_batch1"]) > 0


@pytest.mark.parametrize(("asked", "expected"), [(None, 3.0), (0.0, 0.0), (1.0, 1.0)])
def test_a_guidance_of_zero_is_one(asked, expected, tmp_path):
    model = load_model(str(save_pipeline(tiny.model(), tmp_path / "guided", card={"guidance": 3.0})))
    found = evaluation.sampler_of(model, 2, asked)
    assert found.guidance == found.score.guidance == expected
    assert evaluation._run_as(found) == {"steps": 2, "guidance": expected}


@pytest.mark.parametrize(("asked", "expected"), [(None, 3.0), (0.0, 0.0), (1.0, 1.0)])
def test_a_drawing_takes_a_guidance_of_zero(asked, expected):
    model = tiny.model().with_parts(card={"guidance": 3.0})
    assert Drawing(model, steps=2, guidance=asked).sampler.score.guidance == expected


def test_a_generators_pictures_depend_on_the_seed(student):
    draw = generator(str(student), Canny())
    picture = PICTURES.batch(torch.tensor([0]))[0]
    first, same, other = (draw("coat", picture, n=3, seed=s) for s in (0, 0, 1))
    assert first.shape == (3, 3, 32, 32)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    with pytest.raises(UsageError, match="give a control and a picture"):
        draw("coat")


def test_a_report_is_self_contained_and_escaped():
    text = report.page("A <b>", report.picture(Image.new("RGB", (4, 4)), "p"), report.table(["x"], [["<1>"]]),
                       chart("loss", {"a": [(0, 1.0), (5, 0.5)]}, "nats"))
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "A &lt;b&gt;" in text
    assert "&lt;1&gt;" in text
    assert "<polyline" in text


def trained_on_a_folder(place, teacher, n):
    """The exported model and the one row of the log of a step on n pictures of a folder."""
    for i in range(n):  # every 20th validates, as does every 20th test
        picture = np.random.default_rng(i).integers(0, 255, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(picture).resize((50, 40)).save(place / f"{i:02d}.png")
        (place / f"{i:02d}.txt").write_text("a coat")
    run = replace(tiny.run(nano_canny(), place / "out", teacher, steps=1), data=Data(str(place)), batch=2)
    folder = train(replace(run, probe_every=1))
    (row,) = [json.loads(line) for line in (place / "out" / "metrics.jsonl").read_text().splitlines()]
    return folder, row


def test_a_tiny_folder_trains_without_measurements(tmp_path, teacher, classifier):
    folder, row = trained_on_a_folder(tmp_path, teacher, 4)
    state = load_file(tmp_path / "out" / "checkpoints" / "step-0000001" / "state.safetensors")
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(v, state[f"average.unet.{k}"]) for k, v in unet.items())
    assert not all(torch.equal(v, state[f"module.unet.{k}"]) for k, v in unet.items())
    assert [k for k in row if "probe" in k] == []


def test_two_validation_pictures_are_enough_to_measure(tmp_path, teacher, classifier):
    folder, row = trained_on_a_folder(tmp_path, teacher, 22)
    questions = Questions.of(load_pictures(str(tmp_path), "validation", 32), Canny(), 2, seed=0)
    pictures = answers(Sampler(StableDiffusion.load(str(folder))), questions, Canny())
    seen = Canny().h(unit(from_bytes(pictures)))
    assert row["probe/consistency"] == pytest.approx((seen - questions.c).abs().mean().item(), abs=1e-3)
    assert 0 < row["probe/consistency"] < 0.9
    assert 0 < row["probe/fd"] < math.inf
    assert "probe/prompt_agreement" not in row, "nothing knows the classes of a folder"
