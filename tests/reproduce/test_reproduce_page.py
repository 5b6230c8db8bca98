"""What a reproduced table says: published numbers, verdicts from numbers, and figures."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from jdm.cli.parser import REPRODUCED, SCALES
from jdm.recipes import entries
from jdm.reproduce import scales
from jdm.reproduce.figures import LABEL, sheet
from jdm.reproduce.models import Setting, settled
from jdm.reproduce.page import ANCHORS, _course, _terms, aligned, number, pair
from jdm.reproduce.results import _average, _values
from jdm.reproduce.tables import JOINT, METHODS, SHARED, TABLES, TEXT_HEAD, TEXT_PUBLISHED, recipes
from jdm.reproduce.verdicts import answers, headline


def cell(**values):
    """Values of a cell: key=(mean, spread)."""
    return {"values": {k: {"mean": m, "spread": s, "of": None} for k, (m, s) in values.items()},
            "records": [{"seed": 0}]}


def table(name, columns, **rows):
    return {"table": name, "columns": columns, "rows": [
        {"row": row.replace("_", "-"), "title": row, "part": "", "cells": cells} for row, cells in rows.items()]}


# Data


def test_the_command_line_knows_the_tables_and_scales_there_are():
    assert tuple(TABLES) == REPRODUCED
    assert tuple(scales.SCALES) == SCALES


def test_every_recipe_of_the_tables_exists_and_nano_knows_its_pace():
    for each in TABLES.values():
        for name in recipes(each):
            assert f"nano-{name}" in entries()
            assert scales.NANO.seconds[name] > 0
            assert scales.SD15.full_name(name) in entries() or name in scales.SD15.given


@pytest.mark.parametrize("scale", scales.SCALES.values(), ids=scales.SCALES)
def test_a_row_beside_another_changes_one_field_of_its_method_and_nothing_of_its_run(scale):
    rows = {row.key: row for row in TABLES["table2"].rows}
    changed = {}
    for row in (r for r in rows.values() if r.beside):
        models = [settled(r.spec, Setting(scale), "canny", 0) for r in (row, rows[row.beside])]
        one, other = (m.run for m in models)
        assert one == replace(other, method=one.method, out=one.out)
        fields = {k for k in vars(one.method) if getattr(one.method, k) != getattr(other.method, k)}
        (changed[row.key],) = fields
    assert changed == {"low-t": "condition_range", "controlled-fake": "fake_sees_control", "draws": "draws",
                       "frozen-posterior": "frozen_posterior", "from-nct": "controlnet_start",
                       "one-t": "shared_noise", "unfrozen": "train_unet"}


@pytest.mark.parametrize("scale", scales.SCALES.values(), ids=scales.SCALES)
def test_clean_and_noisy_rewards_differ_in_where_and_strong_ones_in_weight_and_bound(scale):
    runs = {row.key: settled(row.spec, Setting(scale), "", 0).run for row in TABLES["fig6"].rows}
    methods = {key: run.method for key, run in runs.items()}
    assert len({(run.steps, run.batch, run.model) for run in runs.values()}) == 1
    for noisy, clean in (("reward", "reward-clean"), ("strong", "clean-strong")):
        assert methods[noisy].reward_on == "posterior"
        assert methods[clean] == replace(methods[noisy], reward_on="sample")
    assert methods["strong"] == replace(methods["reward"], reward_weight=20.0, reward_clip=4.0)
    assert methods["own"] == replace(methods["reward"], reward="")


def test_the_controlnet_that_jdm_goes_on_from_is_that_of_the_row_of_nct():
    for scale in scales.SCALES.values():
        rows = {row.key: settled(row.spec, Setting(scale), "canny", 0) for row in TABLES["table2"].rows}
        assert rows["from-nct"].needs["controlnet_start"] == rows["nct"]
        assert rows["from-nct"].needs["start"] == rows["nct"].needs["base"] == rows["no-warm-up"].needs["start"]


def test_joint_training_is_phase_2_with_its_unet_trained_on_from_the_same_start():
    for scale in scales.SCALES.values():
        phase_2, joint = (settled(row.spec, Setting(replace(scale, shipped={})), "lowres", 0)
                          for row in (SHARED, JOINT))
        assert joint.run.method == replace(phase_2.run.method, train_unet=True)
        assert joint.needs["start"] == phase_2.needs["start"]
        assert (joint.run.steps, joint.run.batch) == (phase_2.run.steps, phase_2.run.batch)


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


def test_the_published_text_to_image_table_is_whole():
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


def test_the_first_line_names_whoever_wins_over_the_columns_that_two_methods_have():
    columns = {"canny": "canny", "lowres": "8x SR"}
    data = table("table1", columns, jdm={"canny": cell(consistency=(0.1, None), fd=(3.0, None)),
                                         "lowres": cell(consistency=(0.2, None), fd=(1.0, None))},
                 nct={"canny": cell(consistency=(0.05, None), fd=(1.0, None)),
                      "lowres": cell(consistency=(0.3, None), fd=(4.0, None))})
    assert headline(data) == "best average consistency jdm (0.1500), best average distance jdm (2.000)"
    data["rows"][1]["cells"]["lowres"] = {"values": {}, "records": []}
    assert headline(data) == "best consistency over canny alone nct (0.0500), best distance nct (1.000)"
    assert headline(table("table1", columns)) == "nothing measured yet"


@pytest.mark.parametrize(("fd", "second", "consistency", "verdict"), [
    ((1.1, 0.1), 5.0, 0.07, "yes"),  # .9 errors of the difference farther
    ((1.4, 0.1), 5.0, 0.07, "no"),  # 2.8 errors
    ((1.1, 0.1), 6.0, 0.07, "no"),  # the second extractor sees it
    ((0.9, 0.1), 5.0, 0.08, "no"),  # 20% better only
])
def test_the_paper_s_claim_asks_for_both_consistency_and_distance(fd, second, consistency, verdict):
    data = table("table1", {"canny": "canny"},
                 controlnet={"canny": cell(consistency=(0.1, 0.001), fd=(1.0, 0.1), fd_efflite0=(5.5, None))},
                 jdm={"canny": cell(consistency=(consistency, 0.001), fd=fd, fd_efflite0=(second, None))})
    (answer,) = answers(data)
    assert answer["verdict"] == verdict
    assert answer["numbers"]["better"] == pytest.approx(1 - consistency / 0.1)
    assert answer["numbers"]["errors"] == pytest.approx((fd[0] - 1) / 0.02**0.5)


def test_phase_2_counts_no_primary_control_and_every_other_one():
    columns = {"canny": "canny", "soft-edge": "HED", "lowres": "8x SR"}

    def cells_of(*values):
        return {c: cell(consistency=(v, 0.001), fd=(1.0, 0.1)) for c, v in zip(columns, values, strict=True)}

    for last, verdict in ((0.109, "yes"), (0.112, "no")):
        data = table("table1", columns, jdm=cells_of(0.5, 0.09, last), jdm_joint=cells_of(0.1, 0.1, 0.1))
        (answer,) = answers(data)
        assert (answer["verdict"], answer["columns"]) == (verdict, ["soft-edge", "lowres"])
        assert answer["numbers"]["consistency"]["lowres"] == pytest.approx(last / 0.1 - 1)


@pytest.mark.parametrize(("row", "beside"), [("jdm", "jdm-joint"), ("frozen-di", "jdm"), ("nct", "frozen-di")])
def test_an_answer_says_where_two_rows_trained_on_unequal_numbers_of_samples(row, beside):
    def cells_of(*samples):
        return {column: {**cell(consistency=(0.1, 0.001), fd=(1.0, 0.1)), "records": [{"seed": 0, "training": [
            {"name": "what it needs", "samples": 7}, {"name": "own", "samples": n}] if n else []}]}
            for column, n in zip(("soft-edge", "lowres"), samples, strict=True)}

    for samples, said in (((48000, 16000), f"; on unequal training, samples of {row} and {beside}: soft-edge 48,000 "
                                           "and 16,000"), ((16000, 16000), ""), ((16000, 0), ""), ((0, 16000), "")):
        data = table("table1", {"soft-edge": "HED", "lowres": "super-resolution"}, first=cells_of(samples[0], 5),
                     second=cells_of(samples[1], 5))
        data["rows"][0]["row"], data["rows"][1]["row"] = row, beside
        (answer,) = answers(data)
        assert answer["text"].partition("; on")[1:] == said.partition("; on")[1:]


def test_clearly_worse_is_more_than_two_errors_of_the_difference():
    for worse, verdict in ((0.1025, "no"), (0.1031, "yes")):  # the error of the difference is .00141
        data = table("table1", {"canny": "canny"}, jdm={"canny": cell(consistency=(0.1, 0.001), fd=(1.0, 0.1))},
                     frozen_di={"canny": cell(consistency=(worse, 0.001), fd=(1.0, 0.1))})
        (answer,) = answers(data)
        assert answer["verdict"] == verdict


def test_the_rival_on_the_same_generator_wins_by_more_than_two_errors_or_nobody_does():
    for value, verdict in ((0.095, "NCT"), (0.105, "JDM"), (0.101, "neither clearly")):
        data = table("table1", {"canny": "canny"}, nct={"canny": cell(consistency=(value, 0.001), fd=(1.0, 0.1))},
                     frozen_di={"canny": cell(consistency=(0.1, 0.001), fd=(1.0, 0.1))})
        (answer,) = answers(data)
        assert answer["verdict"] == verdict


def test_a_control_that_is_ignored_scores_as_other_pictures_of_the_prompt():
    for value, verdict in ((0.1628, "yes"), (0.1571, "no"), (0.2, "no")):  # the error of the difference is .00141
        values = {"consistency": (value, 0.001), "consistency_chance": (0.2, None),
                  "consistency_same_prompt": (0.16, 0.001)}
        (answer,) = answers(table("table2", {"canny": "canny"}, implicit={"canny": cell(**values)}))
        assert answer["verdict"] == verdict
        assert answer["numbers"]["errors"]["canny"] == pytest.approx((value - 0.16) / 2**0.5 / 1e-3)


def test_where_no_prompt_comes_twice_a_control_that_is_ignored_is_within_two_errors_of_chance():
    for value, verdict in ((0.2015, "yes"), (0.197, "no")):
        data = table("table2", {"canny": "canny"},
                     implicit={"canny": cell(consistency=(value, 0.001), consistency_chance=(0.2, None))})
        (answer,) = answers(data)
        assert answer["verdict"] == verdict
        assert answer["numbers"]["errors"]["canny"] == pytest.approx((value - 0.2) / 1e-3)


@pytest.mark.parametrize(("consistency", "diversity", "error", "verdict"), [
    (0.101, 3.0, 0.2, "yes"), (0.103, 3.0, 0.2, "no"), (0.09, 1.9, 0.2, "no"),  # within 2% of .1; of 2.0
    (0.101, 2.5, 0.2, "no"), (0.101, 3.0, None, "not told"),  # 1.8 errors; none known
    (0.103, 3.0, None, "no"), (0.09, 1.9, None, "no")])  # whatever the error is
def test_a_change_stands_beside_the_row_it_changes(consistency, diversity, error, verdict):
    rows = {"jdm": cell(consistency=(0.5, 0.001), diversity=(9.0, None), fd=(7.0, 0.1)),
            "draws": cell(consistency=(consistency, 0.001), diversity=(diversity, error), fd=(2.0, 0.1)),
            "no_warm_up": cell(consistency=(0.1, 0.001), diversity=(2.0, 0.2), fd=(1.0, 0.1))}
    data = table("table2", {"canny": "canny"}, **{row: {"canny": own} for row, own in rows.items()})
    data["rows"][1]["beside"] = "no-warm-up"
    (answer,) = answers(data)
    assert answer["verdict"] == verdict
    ratios = {"diversity": diversity / 2, "consistency": consistency / 0.1, "fd": 2.0}
    assert answer["numbers"]["ratios"]["draws"] == pytest.approx(ratios)
    assert ("(diversity" in answer["text"]) == (error is not None)
    away = None if error is None else pytest.approx((diversity - 2) / (error**2 + 0.2**2) ** 0.5)
    assert answer["numbers"]["errors"]["draws"] == away
    clear = cell(consistency=(0.1, 0.001), diversity=(3.0, 0.2), fd=(2.0, 0.1))
    another = {"row": "one-t", "title": "", "part": "", "cells": {"canny": clear}, "beside": "no-warm-up"}
    assert answers({**data, "rows": [*data["rows"], another]})[0]["verdict"] == "yes"  # one is enough
    data["rows"][2]["cells"] = {"canny": {"values": {}, "records": []}}  # beside nothing, whatever else is there
    assert answers(data) == []


@pytest.mark.parametrize("base", [{}, {"diversity": (0.0, 0.0)}])  # not measured; z ignored
def test_a_change_beside_a_row_without_diversity_has_no_ratio_of_it(base):
    rows = {"draws": cell(consistency=(0.1, 0.001), fd=(2.0, 0.1), diversity=(3.0, 0.2)),
            "no_warm_up": cell(consistency=(0.1, 0.001), fd=(1.0, 0.1), **base)}
    data = table("table2", {"canny": "canny"}, **{row: {"canny": own} for row, own in rows.items()})
    data["rows"][0]["beside"] = "no-warm-up"
    (answer,) = answers(data)
    assert answer["verdict"] == "no"
    assert answer["numbers"]["ratios"]["draws"] == pytest.approx({"consistency": 1.0, "fd": 2.0})


COURSE = [{"step": step, "reward": reward, "judge": judge, "prompt_agreement": 0.9, "fd": fd}
          for step, reward, judge, fd in ((100, -0.5, -0.6, 4.0), (200, -0.3, -0.4, 4.5), (300, -0.1, -0.9, 9.0))]


def test_hacking_begins_where_the_judge_is_best_and_the_reward_still_rises():
    for last, verdict in ((-0.1, "yes"), (-0.35, "no")):
        course = [*COURSE[:2], {**COURSE[2], "reward": last}]
        text = {**cell(judge=(-0.9, None), fd=(9.0, 0.1)), "records": [{"seed": 0, "course": course}]}
        (answer,) = answers(table("fig6", {"text": "text"}, reward={"text": text}))
        assert answer["verdict"] == ("yes" if last > -0.3 else "no") == verdict
        found = answer["numbers"]["reward"]
        assert (found["step"], found["of"]) == (200, 300)
        assert found["judge"] == pytest.approx(-0.5)
        assert found["fd"] == pytest.approx(4.5)
        assert found["reward"] == pytest.approx(last + 0.3)


def test_a_probe_before_any_reward_was_logged_says_nothing_of_hacking():
    course = [{"step": 10, "judge": 0.0, "fd": 1.0}, *COURSE]
    text = {**cell(judge=(-0.9, None)), "records": [{"seed": 0, "course": course}]}
    (answer,) = answers(table("fig6", {"text": "text"}, reward={"text": text}))
    assert answer["numbers"]["reward"]["step"] == 200


@pytest.mark.parametrize(("noisy", "strong", "verdict"), [
    (-0.5, None, "yes"), (-0.7, None, "no"), (-0.5, -0.2, "yes"), (-0.5, -0.4, "no")])
@pytest.mark.parametrize("name", ["table3", "fig6"])
def test_clean_and_noisy_rewards_are_compared_by_the_judge_at_each_strength(noisy, strong, verdict, name):
    judged = {"reward": (noisy, 5.0), "reward_clean": (-0.6, 7.0)}
    if strong is not None:
        judged |= {"strong": (strong, 3.0), "clean_strong": (-0.3, 9.0)}
    rows = {row: {"text": cell(judge=(judge, None), fd=(fd, 0.1))} for row, (judge, fd) in judged.items()}
    (answer,) = answers(table(name, {"text": "text"}, **rows))
    assert answer["verdict"] == verdict
    assert answer["numbers"]["reward"] == pytest.approx({"judge": noisy + 0.6, "fd": -2.0})
    if strong is not None:
        assert answer["numbers"]["strong"] == pytest.approx({"judge": strong + 0.3, "fd": -6.0})


@pytest.mark.parametrize("key", ["prompt_agreement", "clip"])
def test_a_guides_agreement_is_the_classifiers_or_clips_and_the_best_of_them_is_said_first(key):
    for value, verdict in ((33.0, "yes"), (31.0, "no")):
        own = {"text": cell(**{key: (32.0, None), "hpsv2": (25.0, None)})}
        guided = {"text": cell(**{key: (value, None), "hpsv2": (26.0, None)})}
        data = table("table3", {"text": "text"}, own=own, guided=guided)
        for row in data["rows"]:
            row["steps"] = 1
        (answer,) = answers(data)
        assert answer["verdict"] == verdict
        assert answer["numbers"]["guided"] == {key: value - 32, "hpsv2": 1.0}
        name, best = {"prompt_agreement": "prompt agreement", "clip": "CLIP"}[key], "guided" if value > 32 else "own"
        assert f"best {name} {best} ({max(value, 32):.3f})" in headline(data)
        assert "best HPSv2.1 guided (26.000)" in headline(data)


def test_a_page_says_when_its_distance_is_fid_and_by_which_clip_it_was_scored():
    def terms(**measured):
        cells = {"text": {"records": [{"seed": 0, "measured": measured}]}}
        return _terms({**table("table3", {"text": "text"}, own=cells), "measures": []})

    said = terms(fd=1.0, fd_extractor="inception-2048", clip=30.0, clip_network="clip-vit-large-patch14")
    assert "on the features of inception-2048, which makes it FID;" in said
    assert "cosine of picture and prompt by clip-vit-large-patch14." in said
    assert "which makes it FID" not in terms(fd=1.0, fd_extractor="nano-classifier-45a9efd8")
    assert terms(hpsv2=25.0) == ""


def test_the_course_of_a_reward_is_printed_probe_by_probe_and_that_of_a_run_without_one_is_not():
    record = {"seed": 0, "course": COURSE}
    plain = {"seed": 0, "course": [{"step": 100, "fd": 3.0}]}
    data = table("table3", {"text": "text"}, reward={"text": {"records": [record]}}, own={"text": {"records": [plain]}})
    printed = _course(data)
    assert "| reward | 300  | -0.10  | -0.900      | 0.900            | 9.00     |" in printed
    assert "| own" not in printed
    assert _course(table("table3", {"text": "text"}, own={"text": {"records": [plain]}})) == ""


# Numbers


def test_the_spread_is_over_seeds_where_there_are_several_and_else_the_bootstrap():
    one = _values([{"fd": 2.0, "fd_spread": 0.5, "diversity": 3.0, "prompt_agreement": None}])
    assert one == {"fd": {"mean": 2.0, "spread": 0.5, "of": "bootstrap"},
                   "diversity": {"mean": 3.0, "spread": None, "of": None}}
    three = _values([{"fd": v, "fd_spread": 9.0} for v in (1.0, 2.0, 3.0)])
    assert three["fd"] == {"mean": 2.0, "spread": 1.0, "of": "3 seeds"}
    assert (number(one, "fd"), number(one, "diversity"), number(one, "judge")) == ("2.00 ± 0.50", "3.00", "–")


def test_the_anchors_of_a_consistency_stand_in_one_order_with_the_spread_that_is_known():
    found = _values([{"consistency_chance": 0.1985, "consistency_same_prompt": 0.17061, "consistency_blank": 0.128,
                      "consistency_same_prompt_spread": 0.00063, "consistency_round_trip": 0.022}])
    assert pair(found, ANCHORS) == "0.199 / 0.1706 ± 0.0006 / 0.128 / 0.022"


def test_an_average_is_of_every_column_or_is_not_there():
    def column(*values):
        measured = [{"seed": k, "measured": {"fd": v, "fd_spread": 0.3}} for k, v in enumerate(values)]
        return {"records": measured, "values": _values([m["measured"] for m in measured])}

    average = _average({"a": column(1.0), "b": column(3.0)})
    assert average is not None
    assert average["fd"] == {"mean": 2.0, "spread": pytest.approx((2 * 0.3**2) ** 0.5 / 2), "of": "columns"}
    seeds = _average({"a": column(1.0, 2.0), "b": column(3.0, 6.0)})  # averages 2 and 4 by seed
    assert seeds is not None
    assert seeds["fd"] == {"mean": 3.0, "spread": pytest.approx(2**0.5), "of": "2 seeds"}
    assert _average({"a": column(1.0), "b": {"records": [], "values": {}}}) is None


def test_a_table_is_aligned():
    assert aligned([("a", "bb"), ("ccc", 4)]) == "| a   | bb |\n|-----|----|\n| ccc | 4  |"
    assert aligned([("p(c|x)", "b")]) == "| p(c\\|x) | b |\n|---------|---|"


# Figures


def test_a_sheet_has_a_label_beside_every_row_of_pictures():
    pictures = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    image = np.asarray(sheet([("a row", pictures), ("a row that was not made", None)]).convert("L"))
    height = image.shape[0] // 2
    assert image.shape == (2 * (64 + 4), LABEL + 3 * 66 + 2)
    for row in (0, 1):
        assert image[row * height : (row + 1) * height, :LABEL].min() < 100
    assert image[:height, LABEL:].min() == 0
    assert image[height:, LABEL:].min() == 255
