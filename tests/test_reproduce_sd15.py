"""The tables at SD1.5's scale, on tiny models of its format: its recipes, prompts and scores."""

import json
from dataclasses import replace

import pytest

import test_reproduce
from jdm.recipes import all_recipes, entries
from jdm.reproduce import scales
from jdm.reproduce.models import Setting, Trained, settled
from jdm.reproduce.page import markdown
from jdm.reproduce.sitting import reproduce
from jdm.reproduce.tables import TABLES, WEAK, Given

PROMPTS = {"anime": ["a cat", "a tree"], "concept-art": ["a town"], "paintings": ["a boat"],
           "photo": ["a coat", "a bag"]}
SCORE = """def hpsv2(images, prompts):
    return images.mean((1, 2, 3)) * 0.01 * images.new_tensor([float(len(p)) for p in prompts])
"""


@pytest.fixture
def small(teacher, tmp_path, monkeypatch):
    """SD1.5's scale on the tiny teacher, its recipes cut to two steps, its scores one function; prompts by style."""
    (tmp_path / "mine.py").write_text(SCORE)
    for style, prompts in PROMPTS.items():
        (tmp_path / "prompts").mkdir(exist_ok=True)
        (tmp_path / "prompts" / f"{style}.json").write_text(json.dumps(prompts))
    nano = test_reproduce.tiny_scale(teacher, tmp_path, monkeypatch)
    scale = scales.SD15.on(str(teacher), "fashion-mnist", str(teacher), (f"{tmp_path / 'mine.py'}:hpsv2",))
    controls = {"canny": "canny", "HED": "soft-edge", "depth": "silhouette", "8x SR": "lowres"}
    scale = replace(scale, controls=controls, extractors=(), split=nano.split, validation=nano.validation,
                    recipe=nano.recipe)
    return Setting(scale, tmp_path / "out", n=2, quick=True, prompts=str(tmp_path / "prompts"))


def sat(table, small, cells, folder):
    return reproduce(TABLES[table], small, patterns=cells, page=folder / "page", say=lambda line: None)


def test_text_to_image_rows_are_scored_on_prompts_by_style(small, tmp_path):
    data, failures = sat("table3", small, "weak,own", tmp_path)
    assert not failures
    own = next(r for r in data["rows"] if r["row"] == "own")["cells"]["text"]
    measured = own["records"][0]["measured"]
    assert measured["n"] == 6  # two of a style, or what it has
    styles = [measured[f"hpsv2_{style}"] for style in ("anime", "concept_art", "paintings", "photo")]
    assert measured["hpsv2"] == pytest.approx(sum(styles) / 4)
    assert len(set(styles)) == 4
    page = markdown(data)
    assert f"{measured['hpsv2_concept_art']:.2f}" in page
    assert "| animation | concept art | painting | photo" in page
    assert "HPSv2.1" in data["headline"]
    assert "Distance" not in page  # prompts alone have none
    weak = next(r for r in data["rows"] if r["row"] == "weak")["cells"]["text"]["records"][0]
    assert weak["training"] == []  # SD1.5 itself


def test_controlled_rows_are_measured_on_pictures_and_scored_too(small, tmp_path):
    data, failures = sat("table1", small, "canny/jdm", tmp_path)
    assert not failures
    (record,) = next(r for r in data["rows"] if r["row"] == "jdm")["cells"]["canny"]["records"]
    assert record["measured"]["consistency"] > 0
    assert record["measured"]["hpsv2"] > 0
    assert record["training"][-1]["name"] == "sd15-canny-canny-seed0"


def test_other_prompts_or_scores_make_other_cells(small, tmp_path):
    from jdm.reproduce.cells import cells, identity

    (cell,) = [c for c in cells(TABLES["table3"], small) if c.row.key == "weak"]
    whole = identity(cell, small)
    (tmp_path / "prompts" / "photo.json").write_text(json.dumps(["another"]))
    assert identity(cell, small) != whole
    other = replace(small, scale=replace(small.scale, scores=()))
    assert "scores" not in identity(cell, other)["asked"]


def test_the_weak_teacher_is_sd15_and_its_guide_sd21_or_what_the_user_names(small):
    setting = Setting(scales.SD15)
    assert settled(WEAK, setting, "", 0).path == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert settled(Given(guide=True), setting, "", 3).path == "stabilityai/stable-diffusion-2-1-base"
    assert settled(Given(guide=True), Setting(scales.NANO), "", 0).path == "nano-sd"
    mine = scales.SD15.on("my_model", None, "my_guide")
    assert settled(WEAK, Setting(mine), "", 0).path == "my_model"
    assert settled(Given(guide=True), Setting(mine), "", 0).path == "my_guide"


RIVALS = sorted(name for name, entry in entries().items() if entry.module.endswith((".sd15_rivals", ".sd15_text")))


@pytest.mark.parametrize("name", RIVALS)
def test_every_recipe_of_that_scale_trains_sd15_as_sd15_canny_is_trained(name):
    run, own = all_recipes()[name](), all_recipes()["sd15-canny"]()
    assert run == replace(own, method=run.method, out=run.out)
    assert run.out.name == name


def test_no_two_recipes_of_that_scale_train_the_same():
    methods = [(name, all_recipes()[name]().method) for name in entries() if name.startswith("sd15-")]
    assert [(a, b) for k, (a, one) in enumerate(methods) for b, other in methods[:k] if one == other] == []
    for row, name in (("jdm", "canny"), ("text-reward", "hfl"), ("text-guided-blind", "cfg21")):
        model = settled(Trained(row, control=""), Setting(scales.SD15), "", 0)
        assert (model.name, model.run.method) == (f"sd15-{name}-seed0", all_recipes()[f"sd15-{name}"]().method)
