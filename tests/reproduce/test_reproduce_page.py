"""What a reproduced table says: published numbers, verdicts from numbers, and figures."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from jdm.cli.parser import REPRODUCED, SCALES
from jdm.files import fitted
from jdm.recipes import entries
from jdm.reproduce import setups
from jdm.reproduce.figures import LABEL, sheet
from jdm.reproduce.form import specs
from jdm.reproduce.models import Trained, differing, essence, replaced, settled
from jdm.reproduce.page import ANCHORS, against_yardstick, aligned, markdown, number, pair
from jdm.reproduce.results import Page, Result, Value, load_page, mean_over, values_of
from jdm.reproduce.tables import JOINT, METHODS, SHARED, TABLES, TEXT_HEAD, TEXT_PUBLISHED
from reproducing import cell, record, table

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def settle(row, setup, control=""):
    """A row's model at a setup, for the first seed."""
    return settled(row.spec, setup, control, 0)


# Data


def test_command_line_knows_tables_and_scales():
    assert tuple(TABLES) == REPRODUCED
    assert tuple(setups.SETUPS) == SCALES


def test_every_recipe_exists_and_nano_knows_its_pace():
    for each in TABLES.values():
        for spec in (spec for spec in specs(each) if isinstance(spec, Trained)):
            assert f"nano-{spec.recipe}" in entries()
            assert setups.NANO.seconds.get(spec.recipe, 0) > 0 or spec.recipe == "nct-4"  # not timed yet
            assert setups.SD15.full_name(spec.recipe) in entries() or spec.recipe in setups.SD15.untrained


@pytest.mark.parametrize("setup", setups.SETUPS.values(), ids=setups.SETUPS)
def test_row_beside_another_changes_one_part_of_method(setup):
    rows = {row.key: row for row in TABLES["table2"].rows}
    changed = {}
    for row in (r for r in rows.values() if r.beside):
        models = [settle(r, setup, "canny") for r in (row, rows[row.beside])]
        one, other = (m.run for m in models)
        assert one == replace(other, method=one.method, out=one.out)
        (changed[row.key],) = {k for k in vars(one.method) if getattr(one.method, k) != getattr(other.method, k)}
    assert changed == {"low-t": "condition", "controlled-fake": "fake", "draws": "condition",
                       "frozen-posterior": "condition", "from-nct": "controlnet", "one-t": "condition",
                       "unfrozen": "student"}


@pytest.mark.parametrize("setup", setups.SETUPS.values(), ids=setups.SETUPS)
def test_rewards_of_the_figure_differ_in_one_thing(setup):
    runs = {row.key: settle(row, setup).run for row in TABLES["fig6"].rows}
    rewards = {key: run.method.reward for key, run in runs.items()}
    assert len({(run.steps, run.batch, run.model) for run in runs.values()}) == 1
    assert all(replace(run.method, reward=None) == runs["own"].method for run in runs.values())
    assert rewards["own"] is None
    for noisy, clean in (("reward", "reward-clean"), ("strong", "clean-strong")):
        assert (type(rewards[noisy]).__name__, type(rewards[clean]).__name__) == ("Reward", "CleanReward")
        for same in ("model", "weight", "bound"):
            assert getattr(rewards[noisy], same) == getattr(rewards[clean], same)
    bound = replace(rewards["reward"].bound, early=4.0, late=4.0)
    assert rewards["strong"] == replace(rewards["reward"], weight=20.0, bound=bound)


def test_jdm_goes_on_from_the_row_of_nct():
    for setup in setups.SETUPS.values():
        rows = {row.key: settle(row, setup, "canny") for row in TABLES["table2"].rows}
        assert rows["from-nct"].needs["controlnet.start"] == rows["nct"]
        starts = [rows[key].needs["student.start"] for key in ("from-nct", "no-warm-up")]
        assert starts == [rows["nct"].needs["base"]] * 2


def test_joint_training_is_phase_2_with_backbone_trained():
    for setup in setups.SETUPS.values():
        phase_2, joint = (settle(row, replace(setup, shipped={}), "lowres") for row in (SHARED, JOINT))
        student = replace(phase_2.run.method.student, optimiser=joint.run.method.student.optimiser)
        assert joint.run.method == replace(phase_2.run.method, student=student)
        assert phase_2.run.method.student.optimiser is None
        assert student.optimiser is not None
        assert joint.needs["student.start"] == phase_2.needs["student.start"]
        assert (joint.run.steps, joint.run.batch) == (phase_2.run.steps, phase_2.run.batch)


def test_dotted_path_replaces_a_nested_field():
    run = setups.NANO.run("frozen-posterior")
    changed = replaced(run.method, "condition.posterior.model", "mine")
    assert changed.condition.posterior.model == "mine"
    assert replaced(changed, "condition.posterior.model", run.method.condition.posterior.model) == run.method


# Identity


def test_identity_names_only_what_is_not_default():
    model = settle(TABLES["table2"].rows[-1], setups.NANO, "canny")  # unfrozen
    found = essence(model.run, model)
    assert found["method"] == "JDM"
    assert found["method.student"] == "Student"
    assert found["method.condition.bound.early"] == 2.0
    assert "method.condition.posterior.rank" not in found  # at its default
    assert not {"out", "device", "model", "probe_every", "method.student.start"} & found.keys()
    assert found == essence(replace(model.run, data=replace(model.run.data, prepared="there")), model)
    assert found != essence(replace(model.run, seed=1), model)


def test_field_added_at_its_default_leaves_identity():
    from dataclasses import make_dataclass

    before = make_dataclass("Settings", [("rate", float)])
    after = make_dataclass("Settings", [("rate", float), ("momentum", float, 0.0)])
    assert dict(differing(before(1.0))) == dict(differing(after(1.0)))
    assert dict(differing(after(1.0, 0.5))) == {"": "Settings", "rate": 1.0, "momentum": 0.5}


# Files


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*table*.json")), ids=lambda file: file.stem)
def test_pages_of_before_are_read(file):
    page, plain = load_page(str(file)), json.loads(file.read_text())
    records = [r for row in plain["rows"] for c in row["cells"].values() for r in c["records"]]
    assert [r.file for *_, r in page.records()] == [r["file"] for r in records]
    assert [r.measured for *_, r in page.records()] == [r["measured"] for r in records]
    assert fitted(json.loads(json.dumps(asdict(page))), Page, "", "") == page
    assert plain["title"] == page.title
    assert markdown(page).startswith("# Table")


def test_published_numbers_are_the_printed_ones():
    assert METHODS["controlnet"].cells["canny"] == (14.48, 0.113)
    assert METHODS["di-controlnet"].cells["8x SR"] == (15.57, 0.126)
    assert METHODS["jdm"].cells == {"average": (14.58, None)}
    assert METHODS["jdm-dagger"].cells["HED"] == (16.75, 0.055)
    assert METHODS["nct"].cells["average"] == (14.31, 0.078)
    assert TABLES["table2"].published["dsm"].cells["depth"] == (35.14, 0.094)
    assert TABLES["table2"].published["nct-no-boundary"].cells["canny"] == (216.93, 0.113)
    for printed in METHODS.values():  # the averages that were printed are those of the columns
        if len(printed.cells) == 5:
            columns = [v for k, v in printed.cells.items() if k != "average"]
            for place, digits in ((0, 0.011), (1, 0.0011)):
                mean = sum(c[place] for c in columns) / 4  # type: ignore[misc]
                assert mean == pytest.approx(printed.cells["average"][place], abs=digits)


def test_published_text_table_is_whole():
    rows = [dict(zip(TEXT_HEAD, row, strict=True)) for row in TEXT_PUBLISHED]
    assert len(rows) == 12
    by_name = {(r["model"], r["backbone"]): (r["HPS average"], r["aesthetic"], r["CLIP"]) for r in rows}
    assert by_name["Base model", "SD1.5"] == (25.50, 5.49, 33.03)
    assert by_name["DMD2", "SD1.5"] == (23.53, 5.82, 30.92)
    assert by_name["Hyper-SD", "SD1.5"] == (28.01, 5.64, 30.87)
    assert by_name["JDM with HFL", "SD1.5"] == (29.46, 5.89, 33.75)
    assert by_name["JDM with better CFG", "SD1.5"] == (29.75, 5.90, 33.97)
    for row in rows:
        styles = [row[k] for k in ("animation", "concept art", "painting", "photo")]
        assert sum(styles) / 4 == pytest.approx(row["HPS average"], abs=0.06)  # type: ignore[arg-type]


# Numbers


def test_spread_is_over_seeds_else_the_bootstrap():
    one = values_of([record(measured={"fd": 2.0, "fd_spread": 0.5, "diversity": 3.0, "prompt_agreement": None})])
    assert one == {"fd": Value(2.0, 0.5), "diversity": Value(3.0)}
    three = values_of([record(k, measured={"fd": v, "fd_spread": 9.0}) for k, v in enumerate((1.0, 2.0, 3.0))])
    assert three["fd"] == Value(2.0, 1.0)
    assert (number(one, "fd"), number(one, "diversity"), number(one, "judge")) == ("2.00 ± 0.50", "3.00", "–")


def test_anchors_of_consistency_stand_in_one_order():
    found = values_of([record(measured={
        "consistency_chance": 0.1985, "consistency_same_prompt": 0.17061, "consistency_blank": 0.128,
        "consistency_same_prompt_spread": 0.00063, "consistency_round_trip": 0.022})])
    assert pair(found, ANCHORS) == "0.199 / 0.1706 ± 0.0006 / 0.128 / 0.022"


def test_page_has_each_controls_ratio_and_their_mean():
    def row(*values):
        return {c: cell(consistency=(v, 0.1 * v), fd=(v, None)) for c, v in zip(columns, values, strict=False)}

    columns = {"canny": "canny", "lowres": "8x SR"}

    page = table("table1", columns, controlnet=row(0.1, 0.01), jdm=row(0.05, 0.015), nct=row(0.2))
    lines = [[part.strip() for part in line.split("|")[1:-1]] for line in against_yardstick(page).splitlines()]
    assert ["jdm", "0.500 ± 0.071", "1.500 ± 0.212", "0.866 ± 0.087"] in lines
    assert ["jdm", "0.500", "1.500", "0.866"] in lines, "distances without an error"
    assert ["nct", "2.000", "–", "–"] in lines
    assert not any("controlnet" in line[:1] for line in lines)
    assert against_yardstick(replace(page, rows=page.rows[1:])) == ""


def test_page_marks_uncommitted_source():
    page = table("table1", {"canny": "canny"}, jdm={"canny": cell(consistency=(0.1, None), fd=(1.0, None))})
    for commit, said in (("abc123", False), ("abc123-dirty", True), ("", False)):
        assert ("in no commit" in markdown(replace(page, commit=commit))) == said


@pytest.mark.parametrize(("guidance", "printed"), [(None, "–"), (0.0, "0"), (2.5, "2.5")])
def test_page_prints_a_guidance_of_zero(guidance, printed):
    measured = cell(record(measured={"guidance": guidance}), fd=(1.0, None))
    page = markdown(table("table1", {"canny": "canny"}, jdm={"canny": measured}))
    row = next(line for line in page.split("## Every measurement")[1].splitlines() if line.startswith("| jdm"))
    assert row.split("|")[-3].strip() == printed


def test_average_is_of_every_column_or_none():
    def column(*values):
        records = [record(k, measured={"fd": v, "fd_spread": 0.3}) for k, v in enumerate(values)]
        return Result(records=tuple(records), values=values_of(records))

    assert mean_over([column(1.0), column(3.0)], "fd") == Value(2.0, pytest.approx((2 * 0.3**2) ** 0.5 / 2))
    # Averages 2 and 4 by seed.
    assert mean_over([column(1.0, 2.0), column(3.0, 6.0)], "fd") == Value(3.0, pytest.approx(2**0.5))
    assert mean_over([column(1.0), Result()], "fd") is None


def test_table_is_aligned():
    assert aligned([("a", "bb"), ("ccc", 4)]) == "| a   | bb |\n|-----|----|\n| ccc | 4  |"
    assert aligned([("p(c|x)", "b")]) == "| p(c\\|x) | b |\n|---------|---|"


# Figures


def test_sheet_labels_every_row_of_pictures():
    pictures = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    image = np.asarray(sheet([("a row", pictures), ("a row that was not made", None)]).convert("L"))
    height = image.shape[0] // 2
    assert image.shape == (2 * (64 + 4), LABEL + 3 * 66 + 2)
    for row in (0, 1):
        assert image[row * height : (row + 1) * height, :LABEL].min() < 100
    assert image[:height, LABEL:].min() == 0
    assert image[height:, LABEL:].min() == 255
