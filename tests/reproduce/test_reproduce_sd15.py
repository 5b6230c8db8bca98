"""The tables at SD1.5's scale, on tiny models of its format: its recipes, prompts and scores."""

import inspect
import json
from dataclasses import replace

import pytest
import torch

import reproducing
from jdm.cli.parser import main, parsers
from jdm.cli.reproduce import invocation
from jdm.controls import Canny
from jdm.data.sources import load_pictures
from jdm.errors import UsageError
from jdm.evaluation import evaluate as evaluation
from jdm.evaluation.questions import Questions, answers
from jdm.evaluation.sampling import Sampler
from jdm.generator import starting_noise
from jdm.library import load_model
from jdm.recipes import all_recipes, entries
from jdm.reproduce import setups
from jdm.reproduce.cells import ASKED, _measured, cells, identity, selected
from jdm.reproduce.models import Given, Trained, settled
from jdm.reproduce.page import markdown
from jdm.reproduce.sitting import reproduce
from jdm.reproduce.tables import TABLES, WEAK
from jdm.space import from_bytes, unit

PROMPTS = {"anime": ["a cat", "a tree"], "concept-art": ["a town"], "paintings": ["a boat"],
           "photo": ["a coat", "a bag"]}
SCORE = """def hpsv2(images, prompts):
    return images.mean((1, 2, 3)) * 0.01 * images.new_tensor([float(len(p)) for p in prompts])
"""


def printed(pictures, prompts):
    """What a table prints of SCORE: a hundred times it, for each of the uint8 pictures."""
    return 100 * unit(from_bytes(pictures)).mean((1, 2, 3)) * 0.01 * torch.tensor([float(len(p)) for p in prompts])


@pytest.fixture
def small(teacher, tmp_path, monkeypatch):
    """SD1.5's scale on the tiny teacher, its recipes cut to two steps, its scores one function; prompts by style."""
    (tmp_path / "mine.py").write_text(SCORE)
    for style, prompts in PROMPTS.items():
        (tmp_path / "prompts").mkdir(exist_ok=True)
        (tmp_path / "prompts" / f"{style}.json").write_text(json.dumps(prompts))
    nano = reproducing.tiny_setup(teacher, tmp_path, monkeypatch)
    return replace(setups.SD15.on(str(teacher), "fashion-mnist"), guide=str(teacher), controls=nano.controls,
                   scores=(f"{tmp_path / 'mine.py'}:hpsv2",), extractors=(), split=nano.split, device="cpu",
                   validation=nano.validation, recipe=nano.recipe, out=tmp_path / "out", n=2, quick=True,
                   prompts=str(tmp_path / "prompts"))


def sat(table, small, cells, folder):
    return reproduce(TABLES[table], small, patterns=cells, folder=folder / "page", say=lambda line: None)


def test_text_rows_are_scored_by_style(small, tmp_path):
    data, failures = sat("table3", small, "weak,own", tmp_path)
    assert not failures
    measured = data.result("own", "text").records[0].measured
    asked = [prompt for prompts in PROMPTS.values() for prompt in prompts]  # two of a style, or what it has
    assert (measured["n"], measured["nfe"]) == (6, 1)
    model = load_model(str(small.out / "sd15-text-own-seed0" / "model"))
    values = printed(Sampler(model)(starting_noise(model.latent_shape(6, model.size), ASKED), asked), asked)
    styles = [float(v.mean()) for v in values.split([2, 1, 1, 2])]
    assert [measured[f"hpsv2_{s}"] for s in ("anime", "concept_art", "paintings", "photo")] == pytest.approx(styles)
    assert measured["hpsv2"] == pytest.approx(sum(styles) / 4)
    page = markdown(data)
    line = next(line for line in page.splitlines() if line.startswith("| its own guidance, no reward"))
    assert [part.strip() for part in line.split("|")[2:6]] == [f"{style:.2f}" for style in styles]
    head = next(line for line in page.splitlines() if line.startswith("| method"))
    assert [part.strip() for part in head.split("|")[2:6]] == ["animation", "concept art", "painting", "photo"]
    assert data.headline == ("of one-step students: best HPSv2.1 its own guidance, no reward "
                                f"({measured['hpsv2']:.3f})")
    assert "Distance" not in page  # prompts alone have none
    assert data.result("weak", "text").records[0].training == ()  # SD1.5 itself


def test_controlled_rows_are_measured_and_scored(small, tmp_path):
    data, failures = sat("table1", small, "canny/jdm", tmp_path)
    assert not failures
    (record,) = data.result("jdm", "canny").records
    model, control = load_model(str(small.out / "sd15-canny-canny-seed0" / "model")), Canny()
    questions = Questions.of(load_pictures("fashion-mnist", small.split, 32), control, 2, ASKED)
    pictures = answers(Sampler(model), questions, control)
    seen = control.h(unit(from_bytes(pictures)))
    assert record.measured["consistency"] == pytest.approx((seen - questions.c).abs().mean().item(), abs=1e-6)
    assert record.measured["hpsv2"] == pytest.approx(float(printed(pictures, questions.y).mean()))
    assert record.training[-1].name == "sd15-canny-canny-seed0"


def test_a_cell_is_measured_as_its_setting_says(small, monkeypatch):
    setup = replace(small, device="cpu:0", extractors=("inception",))
    for name in ("evaluate", "evaluate_prompts"):
        bind = inspect.signature(getattr(evaluation, name)).bind
        monkeypatch.setattr(evaluation, name, lambda *args, _bind=bind: _bind(*args).arguments)
    table_1, table_3 = (selected(cells(TABLES[name], setup), cell)[0]
                        for name, cell in (("table1", "canny/jdm"), ("table3", "text/base")))
    common = {"n": 2, "seed": ASKED, "scored": setup.scores, "device": "cpu:0"}
    pictures = {"control": "canny", "source": "fashion-mnist", "split": setup.split, "guidance": None,
                "teacher": setup.teacher, "quick": True, "also": ("inception",), "steps": 1}
    assert _measured(table_1, setup, None) == {**common, **pictures, "model": table_1.model.path}
    assert _measured(table_3, setup, 2.0) == {**common, "model": table_3.model.path, "prompts": PROMPTS, "steps": 25,
                                                "guidance": 2.0}
    on_pictures = _measured(table_3, replace(setup, prompts=""), 2.0)
    assert on_pictures == {**common, **pictures, "model": table_3.model.path, "control": None, "steps": 25,
                           "guidance": 2.0}


def test_other_prompts_or_scores_make_other_cells(small, tmp_path):
    (cell,) = [c for c in cells(TABLES["table3"], small) if c.row.key == "weak"]
    whole = identity(cell, small)
    asked = whole["asked"]
    assert asked["scores"] == [f"{tmp_path / 'mine.py'}:hpsv2"]
    unscored = identity(cell, replace(small, scores=()))["asked"]
    assert unscored == {k: v for k, v in asked.items() if k != "scores"}
    unasked = identity(cell, replace(small, prompts=""))["asked"]
    assert unasked == {k: v for k, v in asked.items() if k != "prompts"}
    (tmp_path / "prompts" / "photo.json").write_text(json.dumps(["another"]))
    other = identity(cell, small)["asked"]
    assert other["prompts"] != asked["prompts"]
    assert other == {**asked, "prompts": other["prompts"]}


def test_a_cell_keeps_its_runs_measurements(small, tmp_path):
    recipe = small.recipe
    probed = replace(small, recipe=lambda name: replace(recipe(name), probe_every=1))
    data, failures = sat("table3", probed, "reward-clean", tmp_path)
    assert not failures
    (record,) = data.result("reward-clean", "text").records
    log = (small.out / "sd15-text-reward-clean-seed0" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in log]
    assert [at["step"] for at in record.course] == [1, 2]
    assert [(at["reward"], at["judge"]) for at in record.course] == [(r["reward"], r["probe/judge"]) for r in rows]
    assert "## The course of a reward" in markdown(data)


def test_flags_choose_what_tables_are_made_with(monkeypatch):
    from jdm.reproduce import sitting

    seen = []
    monkeypatch.setattr(sitting, "listed", lambda table, setup, *_: seen.append((table.name, setup)) or "")
    flags = ["--scale", "sd15", "--model", "mine", "--guide", "better", "--source", "pictures", "--scores",
             "hpsv2:A, clip", "--prompts", "B", "--known", "one.json", "--known", "two.json"]
    assert main(["reproduce", "table3", "--dry-run", *flags]) == 0
    assert main(["reproduce", "table3", "--dry-run", "--device", "cpu"]) == 0
    (_, asked), (_, usual) = seen
    assert (asked.teacher, asked.guide, asked.source) == ("mine", "better", "pictures")
    assert (asked.scores, asked.prompts, asked.known) == (("hpsv2:A", "clip"), "B", ("one.json", "two.json"))
    assert (asked.device, usual) == ("cuda", setups.NANO)
    given = parsers()[0].parse_args(["reproduce", "table3", *flags, "--device", "cuda:1"])
    assert invocation(given) == ("jdm reproduce table3 --scale sd15 --model mine --guide better --source pictures "
                             "--prompts B --scores 'hpsv2:A, clip' --device cuda:1")


def test_fetched_or_named_weights_are_not_missing(monkeypatch, tmp_path):
    missing = ["hpsv2's weights", "clip's weights", "aesthetic's weights"]

    def said(setup, fetched):
        monkeypatch.setattr(setups, "_fetched", lambda place, file: (place, file) in fetched)
        with pytest.raises(UsageError) as caught:
            setups.check(setup, guided=True)
        return [name for name in missing if name in str(caught.value)]

    models = {(name, "model_index.json") for name in (setups.SD15.teacher, setups.SD15.guide)}
    hpsv2 = ("xswu/HPSv2", "HPS_v2.1_compressed.pt")
    assert said(setups.SD15, models) == missing
    assert said(setups.SD15, {*models, hpsv2, ("openai/clip-vit-large-patch14", "config.json")}) == missing[2:]
    named = replace(setups.SD15, scores=("hpsv2:FOLDER", "my_rewards.py:taste"))
    assert said(named, models) == []  # pictures and torch-fidelity are still missing


def test_weak_teacher_is_sd15_and_guide_sd21(small):
    assert settled(WEAK, setups.SD15, "", 0).path == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert settled(Given(guide=True), setups.SD15, "", 3).path == "stabilityai/stable-diffusion-2-1-base"
    assert settled(Given(guide=True), setups.NANO, "", 0).path == "nano-sd"
    mine = replace(setups.SD15.on("my_model"), guide="my_guide")
    rows = {row.key: settled(row.spec, mine, "", 0) for row in TABLES["table3"].rows}
    assert rows["base"].path == "my_guide"
    guided = ("guided", "guided-blind", "both")
    assert {k: (rows[k].run.model, rows[k].run.method.guidance.teacher) for k in guided} == dict.fromkeys(
        guided, ("my_model", "my_guide"))
    assert settled(WEAK, mine, "", 0).path == "my_model"
    assert settled(Given(guide=True), mine, "", 0).path == "my_guide"


RIVALS = sorted(name for name, entry in entries().items() if entry.scale == "sd15" and name != "sd15-canny")


@pytest.mark.parametrize("name", RIVALS)
def test_sd15_recipes_share_one_budget(name):
    run, own = all_recipes()[name](), all_recipes()["sd15-canny"]()
    assert run == replace(own, method=run.method, out=run.out)
    assert run.out.name == name


def test_recipes_that_train_the_same_are_known():
    methods = [(name.removeprefix("sd15-"), all_recipes()[name]().method) for name in RIVALS]
    equal = {one: other for k, (other, a) in enumerate(methods) for one, b in methods[k + 1:] if a == b}
    assert equal == {"text-dmd": "diff-instruct"}
    assert setups.SD15.same == {"jdm": "canny", **equal}
    for name, own in setups.SD15.same.items():
        model = settled(Trained(name, control=""), setups.SD15, "", 0)
        assert (model.name, model.run.method) == (f"sd15-{own}-seed0", all_recipes()[f"sd15-{own}"]().method)
