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
from jdm.reproduce.page import ANCHORS, _course, _terms, aligned, markdown, number, pair
from jdm.reproduce.results import Line, Page, Record, Result, Stage, Value, load_page, over, values_of
from jdm.reproduce.tables import JOINT, METHODS, SHARED, TABLES, TEXT_HEAD, TEXT_PUBLISHED
from jdm.reproduce.verdicts import answers, headline

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def record(seed=0, **more):
    return Record(seed, "of its weights", more.pop("measured", {}), **more)


def cell(*records, **values):
    """A result with values, key=(mean, spread)."""
    return Result(records=records or (record(),), values={k: Value(*v) for k, v in values.items()})


def table(name, columns, **rows):
    """A page with a row for each keyword: {column: result}."""
    lines = tuple(Line(row.replace("_", "-"), row, cells) for row, cells in rows.items())
    return Page(name, "", "", "", "", "", "", "", "nano", "nano-sd", "", "", 1, 1, "", columns, (), "", lines)


def with_row(page, place, **changes):
    """The page with one of its rows changed."""
    rows = list(page.rows)
    rows[place] = replace(rows[place], **changes)
    return replace(page, rows=tuple(rows))


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
            assert setups.NANO.seconds[spec.recipe] > 0
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


# Verdicts


def test_headline_says_what_it_compares():
    columns = {"canny": "canny", "lowres": "8x SR"}
    page = table("table1", columns, jdm={"canny": cell(consistency=(0.1, None), fd=(3.0, None)),
                                         "lowres": cell(consistency=(0.2, None), fd=(1.0, None))},
                 nct={"canny": cell(consistency=(0.05, None), fd=(1.0, None)),
                      "lowres": cell(consistency=(0.3, None), fd=(4.0, None))},
                 dsm={"canny": cell(consistency=(0.01, None), fd=(0.5, None))})
    assert headline(page) == ("of 2 rows with canny, lowres: best average consistency jdm (0.1500), best average "
                              "distance jdm (2.000)")
    page = with_row(page, 1, cells={"canny": page.rows[1].cells["canny"]})
    assert headline(page) == "of 3 rows with canny: best consistency dsm (0.0100), best distance dsm (0.500)"
    assert headline(table("table1", columns)) == "nothing measured yet"


@pytest.mark.parametrize(("fd", "second", "consistency", "verdict"), [
    ((1.1, 0.1), 5.0, 0.07, "yes"),  # .9 errors of the difference farther
    ((1.4, 0.1), 5.0, 0.07, "no"),  # 2.8 errors
    ((1.1, 0.1), 6.0, 0.07, "no"),  # the second extractor sees it
    ((0.9, 0.1), 5.0, 0.08, "no"),  # 20% better only
])
def test_claim_asks_for_consistency_and_distance(fd, second, consistency, verdict):
    page = table("table1", {"canny": "canny"},
                 controlnet={"canny": cell(consistency=(0.1, 0.001), fd=(1.0, 0.1), fd_efflite0=(5.5, None))},
                 jdm={"canny": cell(consistency=(consistency, 0.001), fd=fd, fd_efflite0=(second, None))})
    (answer,) = answers(page)
    assert answer.verdict == verdict
    assert answer.numbers["jdm"]["consistency"]["ratio"] == pytest.approx(consistency / 0.1)
    assert answer.numbers["jdm"]["fd"]["errors"] == pytest.approx((fd[0] - 1) / 0.02**0.5)
    assert answer.text.startswith(f"jdm beside controlnet: consistency {consistency - 0.1:+.4f} "
                                  f"(x {consistency / 0.1:.2f}, ")
    assert answer.text.endswith(f"FD-EffLite0 {second - 5.5:+.1f} (x {second / 5.5:.2f}, no error known)")


def test_phase_2_counts_every_control_but_canny():
    columns = {"canny": "canny", "soft-edge": "HED", "lowres": "8x SR"}

    def cells_of(*values):
        return {c: cell(consistency=(v, 0.001), fd=(1.0, 0.1)) for c, v in zip(columns, values, strict=True)}

    for last, verdict in ((0.109, "yes"), (0.112, "no")):
        page = table("table1", columns, jdm=cells_of(0.5, 0.09, last), jdm_joint=cells_of(0.1, 0.1, 0.1))
        (answer,) = answers(page)
        assert (answer.verdict, answer.columns) == (verdict, ("soft-edge", "lowres"))
        assert answer.numbers["lowres"]["consistency"]["ratio"] == pytest.approx(last / 0.1)


@pytest.mark.parametrize(("row", "beside"), [("jdm", "jdm-joint"), ("frozen-di", "jdm"), ("nct", "frozen-di")])
def test_answer_names_unequal_training(row, beside):
    def cells_of(*samples):
        return {column: cell(record(training=(Stage("what it needs", 7, 1), Stage("own", n, 1)) if n else ()),
                             consistency=(0.1, 0.001), fd=(1.0, 0.1))
                for column, n in zip(("soft-edge", "lowres"), samples, strict=True)}

    for samples, said in (((48000, 16000), f"samples of {row} and {beside}: soft-edge 48,000 and 16,000"),
                          ((16000, 16000), ""), ((16000, 0), ""), ((0, 16000), "")):
        page = table("table1", {"soft-edge": "HED", "lowres": "super-resolution"}, first=cells_of(samples[0], 5),
                     second=cells_of(samples[1], 5))
        page = with_row(with_row(page, 0, row=row), 1, row=beside)
        (answer,) = answers(page)
        assert answer.text.partition("on unequal training, ")[2].partition(";")[0] == said


def test_clearly_worse_is_more_than_two_errors():
    for worse, verdict in ((0.1025, "no"), (0.1031, "yes")):  # the error of the difference is .00141
        page = table("table1", {"canny": "canny"}, jdm={"canny": cell(consistency=(0.1, 0.001), fd=(1.0, 0.1))},
                     frozen_di={"canny": cell(consistency=(worse, 0.001), fd=(1.0, 0.1))})
        (answer,) = answers(page)
        assert answer.verdict == verdict


def test_rival_wins_by_more_than_two_errors():
    for value, verdict in ((0.095, "NCT"), (0.105, "JDM"), (0.101, "neither clearly")):
        page = table("table1", {"canny": "canny"}, nct={"canny": cell(consistency=(value, 0.001), fd=(1.0, 0.1))},
                     frozen_di={"canny": cell(consistency=(0.1, 0.001), fd=(1.0, 0.1))})
        (answer,) = answers(page)
        assert answer.verdict == verdict


def test_ignored_control_scores_as_the_same_prompt():
    for value, verdict in ((0.1628, "yes"), (0.1571, "no"), (0.2, "no")):  # the error of the difference is .00141
        values = {"consistency": (value, 0.001), "consistency_chance": (0.2, None),
                  "consistency_same_prompt": (0.16, 0.001)}
        (answer,) = answers(table("table2", {"canny": "canny"}, implicit={"canny": cell(**values)}))
        assert answer.verdict == verdict
        assert answer.numbers["canny"] == pytest.approx((value - 0.16) / 2**0.5 / 1e-3)


def test_ignored_control_scores_chance_where_prompts_differ():
    for value, verdict in ((0.2015, "yes"), (0.197, "no")):
        page = table("table2", {"canny": "canny"},
                     implicit={"canny": cell(consistency=(value, 0.001), consistency_chance=(0.2, None))})
        (answer,) = answers(page)
        assert answer.verdict == verdict
        assert answer.numbers["canny"] == pytest.approx((value - 0.2) / 1e-3)


@pytest.mark.parametrize(("consistency", "diversity", "error", "verdict"), [
    (0.101, 3.0, 0.2, "yes"), (0.103, 3.0, 0.2, "no"), (0.09, 1.9, 0.2, "no"),  # within 2% of .1; of 2.0
    (0.101, 2.5, 0.2, "no"), (0.101, 3.0, None, "not told"),  # 1.8 errors; none known
    (0.103, 3.0, None, "no"), (0.09, 1.9, None, "no")])  # whatever the error is
def test_change_is_judged_beside_what_it_changes(consistency, diversity, error, verdict):
    rows = {"jdm": cell(consistency=(0.5, 0.001), diversity=(9.0, None), fd=(7.0, 0.1)),
            "draws": cell(consistency=(consistency, 0.001), diversity=(diversity, error), fd=(2.0, 0.1)),
            "no_warm_up": cell(consistency=(0.1, 0.001), diversity=(2.0, 0.2), fd=(1.0, 0.1))}
    page = table("table2", {"canny": "canny"}, **{row: {"canny": own} for row, own in rows.items()})
    page = with_row(page, 1, beside="no-warm-up")
    (answer,) = answers(page)
    assert answer.verdict == verdict
    found = answer.numbers["draws"]
    ratios = {"diversity": diversity / 2, "consistency": consistency / 0.1, "fd": 2.0}
    assert {k: v["ratio"] for k, v in found.items()} == pytest.approx(ratios)
    away = None if error is None else pytest.approx((diversity - 2) / (error**2 + 0.2**2) ** 0.5)
    assert found["diversity"]["errors"] == away
    clear = cell(consistency=(0.1, 0.001), diversity=(3.0, 0.2), fd=(2.0, 0.1))
    another = Line("one-t", "", {"canny": clear}, beside="no-warm-up")
    assert answers(replace(page, rows=(*page.rows, another)))[0].verdict == "yes"  # one is enough
    assert answers(with_row(page, 2, cells={"canny": Result()})) == ()  # beside nothing, whatever else is there


@pytest.mark.parametrize("base", [{}, {"diversity": (0.0, 0.0)}])  # not measured; z ignored
def test_change_beside_no_diversity_has_no_ratio(base):
    rows = {"draws": cell(consistency=(0.1, 0.001), fd=(2.0, 0.1), diversity=(3.0, 0.2)),
            "no_warm_up": cell(consistency=(0.1, 0.001), fd=(1.0, 0.1), **base)}
    page = table("table2", {"canny": "canny"}, **{row: {"canny": own} for row, own in rows.items()})
    (answer,) = answers(with_row(page, 0, beside="no-warm-up"))
    assert answer.verdict == "no"
    ratios = {k: v["ratio"] for k, v in answer.numbers["draws"].items() if v["ratio"] is not None}
    assert ratios == pytest.approx({"consistency": 1.0, "fd": 2.0})


COURSE = tuple({"step": step, "reward": reward, "judge": judge, "prompt_agreement": 0.9, "fd": fd}
               for step, reward, judge, fd in ((100, -0.5, -0.6, 4.0), (200, -0.3, -0.4, 4.5), (300, -0.1, -0.9, 9.0)))


def test_hacking_begins_where_the_judge_is_best():
    for last, verdict in ((-0.1, "yes"), (-0.35, "no")):
        course = (*COURSE[:2], {**COURSE[2], "reward": last})
        text = cell(record(course=course), judge=(-0.9, None), fd=(9.0, 0.1))
        (answer,) = answers(table("fig6", {"text": "text"}, reward={"text": text}))
        assert answer.verdict == ("yes" if last > -0.3 else "no") == verdict
        found = answer.numbers["reward"]
        assert (found["step"], found["of"]) == (200, 300)
        assert found["judge"] == pytest.approx(-0.5)
        assert found["fd"] == pytest.approx(4.5)
        assert found["reward"] == pytest.approx(last + 0.3)


def test_probe_before_any_reward_tells_no_hacking():
    course = ({"step": 10, "judge": 0.0, "fd": 1.0}, *COURSE)
    text = cell(record(course=course), judge=(-0.9, None))
    (answer,) = answers(table("fig6", {"text": "text"}, reward={"text": text}))
    assert answer.numbers["reward"]["step"] == 200


@pytest.mark.parametrize(("noisy", "strong", "verdict"), [
    (-0.5, None, "yes"), (-0.7, None, "no"), (-0.5, -0.2, "yes"), (-0.5, -0.4, "no")])
@pytest.mark.parametrize("name", ["table3", "fig6"])
def test_judge_compares_rewards_at_each_strength(noisy, strong, verdict, name):
    judged = {"reward": (noisy, 5.0), "reward_clean": (-0.6, 7.0)}
    if strong is not None:
        judged |= {"strong": (strong, 3.0), "clean_strong": (-0.3, 9.0)}
    rows = {row: {"text": cell(judge=(judge, None), fd=(fd, 0.1))} for row, (judge, fd) in judged.items()}
    (answer,) = answers(table(name, {"text": "text"}, **rows))
    assert answer.verdict == verdict
    more = {row: {k: v["more"] for k, v in found.items()} for row, found in answer.numbers.items()}
    assert more["reward"] == pytest.approx({"judge": noisy + 0.6, "fd": -2.0})
    assert f"reward beside reward-clean: judge {noisy + 0.6:+.3f} (no error known), distance -2.00" in answer.text
    if strong is not None:
        assert more["strong"] == pytest.approx({"judge": strong + 0.3, "fd": -6.0})


@pytest.mark.parametrize("key", ["prompt_agreement", "clip"])
def test_guides_agreement_is_by_classifier_or_clip(key):
    for value, verdict in ((33.0, "yes"), (31.0, "no")):
        own = {"text": cell(**{key: (32.0, None), "hpsv2": (25.0, None)})}
        guided = {"text": cell(**{key: (value, None), "hpsv2": (26.0, None)})}
        page = table("table3", {"text": "text"}, own=own, guided=guided, base=guided)
        page = with_row(page, 2, steps=25)  # no student
        (answer,) = answers(page)
        assert answer.verdict == verdict
        assert {k: v["more"] for k, v in answer.numbers["guided"].items()} == {key: value - 32, "hpsv2": 1.0}
        name, best = {"prompt_agreement": "prompt agreement", "clip": "CLIP"}[key], "guided" if value > 32 else "own"
        assert headline(page).startswith("of one-step students: best ")
        assert f"best {name} {best} ({max(value, 32):.3f})" in headline(page)
        assert "best HPSv2.1 guided (26.000)" in headline(page)


def test_page_says_what_measured_it():
    def terms(**measured):
        return _terms(table("table3", {"text": "text"}, own={"text": cell(record(measured=measured))}))

    said = terms(fd=1.0, fd_extractor="inception-2048", clip=30.0, clip_network="clip-vit-large-patch14")
    assert "on the features of inception-2048, which makes it FID;" in said
    assert "cosine of picture and prompt by clip-vit-large-patch14." in said
    assert "which makes it FID" not in terms(fd=1.0, fd_extractor="nano-classifier-45a9efd8")
    assert terms(hpsv2=25.0) == ""


def test_course_of_a_reward_is_printed_by_probe():
    plain = {"text": cell(record(course=({"step": 100, "fd": 3.0},)))}
    printed = _course(table("table3", {"text": "text"}, reward={"text": cell(record(course=COURSE))}, own=plain))
    assert "| reward | 300  | -0.10  | -0.900      | 0.900            | 9.00     |" in printed
    assert "| own" not in printed
    assert _course(table("table3", {"text": "text"}, own=plain)) == ""


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


def test_average_is_of_every_column_or_none():
    def column(*values):
        records = [record(k, measured={"fd": v, "fd_spread": 0.3}) for k, v in enumerate(values)]
        return Result(records=tuple(records), values=values_of(records))

    assert over([column(1.0), column(3.0)], "fd") == Value(2.0, pytest.approx((2 * 0.3**2) ** 0.5 / 2))
    # Averages 2 and 4 by seed.
    assert over([column(1.0, 2.0), column(3.0, 6.0)], "fd") == Value(3.0, pytest.approx(2**0.5))
    assert over([column(1.0), Result()], "fd") is None


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
