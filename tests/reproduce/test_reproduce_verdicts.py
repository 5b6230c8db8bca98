"""What a reproduced table says: who wins, and its questions, from numbers."""

from dataclasses import replace

import numpy as np
import pytest

from jdm.reproduce.page import _course, _terms
from jdm.reproduce.results import Line, Result, Stage
from jdm.reproduce.verdicts import answered, best_rows
from reproducing import cell, record, table, with_row


def test_headline_says_what_it_compares():
    columns = {"canny": "canny", "lowres": "8x SR"}
    page = table("table1", columns, jdm={"canny": cell(consistency=(0.1, None), fd=(3.0, None)),
                                         "lowres": cell(consistency=(0.2, None), fd=(1.0, None))},
                 nct={"canny": cell(consistency=(0.05, None), fd=(1.0, None)),
                      "lowres": cell(consistency=(0.3, None), fd=(4.0, None))},
                 dsm={"canny": cell(consistency=(0.01, None), fd=(0.5, None))})
    # The arithmetic mean would have it the other way: .15 for jdm and .175 for nct.
    assert best_rows(page) == ("of 2 rows with canny, lowres: best consistency nct (geometric mean 0.1225), best "
                              "distance jdm (geometric mean 1.732)")
    many = {"canny": cell(consistency=(0.1, None), fd=(1.0, None)),
            "lowres": cell(consistency=(0.2, None), fd=(2.0, None))}
    yardstick = replace(page, rows=(*page.rows, Line("controlnet", "many", many)))
    assert best_rows(yardstick) == ("of 3 rows with canny, lowres: best consistency nct (x 0.866 many), best distance "
                                   "many (next jdm, x 1.225)")
    page = with_row(page, 1, cells={"canny": page.rows[1].cells["canny"]})
    assert best_rows(page) == "of 3 rows with canny: best consistency dsm (0.0100), best distance dsm (0.500)"
    assert best_rows(table("table1", columns)) == "nothing measured yet"


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
    (answer,) = answered(page)
    assert answer.verdict == verdict
    assert answer.numbers["jdm"]["consistency"]["ratio"] == pytest.approx(consistency / 0.1)
    assert answer.numbers["jdm"]["fd"]["errors"] == pytest.approx((fd[0] - 1) / 0.02**0.5)
    assert answer.text.startswith(f"jdm beside controlnet: consistency {consistency - 0.1:+.4f} "
                                  f"(x {consistency / 0.1:.2f}, ")
    assert answer.text.endswith(f"FD-EffLite0 {second - 5.5:+.1f} (x {second / 5.5:.2f}, no error known)")


def test_controls_are_compared_by_the_mean_ratio():
    columns = {"canny": "canny", "lowres": "8x SR"}

    def row(*values, seeds=1):
        def column(value):
            records = [record(k, measured={key: value * 2**k for key in ("consistency", "fd")}) for k in range(seeds)]
            return replace(cell(*records, consistency=(value, 0.1 * value), fd=(value, None)), asked=seeds)

        return {c: column(v) for c, v in zip(columns, values, strict=True)}

    page = table("table1", columns, controlnet=row(0.1, 0.01), jdm=row(0.05, 0.015))
    (answer,) = answered(page)
    found = answer.numbers["jdm"]["consistency"]
    assert found["ratio"] == pytest.approx(0.75**0.5), "of .5 and 1.5, where the ratio of the means is .59"
    assert found["ratios"] == pytest.approx({"canny": 0.5, "lowres": 1.5})
    # 10% of each of the four numbers: an error of a half of 20%.
    assert found["errors"] == pytest.approx(0.5 * np.log(0.75) / 0.1)
    assert answer.verdict == "no", "13% better, and edges dominate the 41% of the means"
    assert "x 0.87, the geometric mean of canny 0.50, lowres 1.50" in answer.text
    assert answer.numbers["jdm"]["fd"]["errors"] is None
    page = table("table1", columns, controlnet=row(0.1, 0.01, seeds=3), jdm=row(0.05, 0.015, seeds=3))
    errors = answered(page)[0].numbers["jdm"]["consistency"]["errors"]
    assert errors == pytest.approx(0.5 * np.log(0.75) / (np.log(2) * 2**0.5)), "seeds go together over controls"


def test_phase_2_counts_every_control_but_canny():
    columns = {"canny": "canny", "soft-edge": "HED", "lowres": "8x SR"}

    def cells_of(*values):
        return {c: cell(consistency=(v, 0.001), fd=(1.0, 0.1)) for c, v in zip(columns, values, strict=True)}

    for last, verdict in ((0.109, "yes"), (0.112, "no")):
        page = table("table1", columns, jdm=cells_of(0.5, 0.09, last), jdm_joint=cells_of(0.1, 0.1, 0.1))
        (answer,) = answered(page)
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
        (answer,) = answered(page)
        assert answer.text.partition("on unequal training, ")[2].partition(";")[0] == said


def test_clearly_worse_is_more_than_two_errors():
    for worse, verdict in ((0.1025, "no"), (0.1031, "yes")):  # the error of the difference is .00141
        page = table("table1", {"canny": "canny"}, jdm={"canny": cell(consistency=(0.1, 0.001), fd=(1.0, 0.1))},
                     frozen_di={"canny": cell(consistency=(worse, 0.001), fd=(1.0, 0.1))})
        (answer,) = answered(page)
        assert answer.verdict == verdict


def test_rival_wins_by_more_than_two_errors():
    for value, verdict in ((0.095, "NCT"), (0.105, "JDM"), (0.101, "neither clearly")):
        page = table("table1", {"canny": "canny"}, nct={"canny": cell(consistency=(value, 0.001), fd=(1.0, 0.1))},
                     frozen_di={"canny": cell(consistency=(0.1, 0.001), fd=(1.0, 0.1))})
        (answer,) = answered(page)
        assert answer.verdict == verdict


def test_ignored_control_scores_as_the_same_prompt():
    for value, verdict in ((0.1628, "yes"), (0.1571, "no"), (0.2, "no")):  # the error of the difference is .00141
        values = {"consistency": (value, 0.001), "consistency_chance": (0.2, None),
                  "consistency_same_prompt": (0.16, 0.001)}
        (answer,) = answered(table("table2", {"canny": "canny"}, implicit={"canny": cell(**values)}))
        assert answer.verdict == verdict
        assert answer.numbers["canny"] == pytest.approx((value - 0.16) / 2**0.5 / 1e-3)


def test_ignored_control_scores_chance_where_prompts_differ():
    for value, verdict in ((0.2015, "yes"), (0.197, "no")):
        page = table("table2", {"canny": "canny"},
                     implicit={"canny": cell(consistency=(value, 0.001), consistency_chance=(0.2, None))})
        (answer,) = answered(page)
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
    (answer,) = answered(page)
    assert answer.verdict == verdict
    found = answer.numbers["draws"]
    ratios = {"diversity": diversity / 2, "consistency": consistency / 0.1, "fd": 2.0}
    assert {k: v["ratio"] for k, v in found.items()} == pytest.approx(ratios)
    away = None if error is None else pytest.approx((diversity - 2) / (error**2 + 0.2**2) ** 0.5)
    assert found["diversity"]["errors"] == away
    clear = cell(consistency=(0.1, 0.001), diversity=(3.0, 0.2), fd=(2.0, 0.1))
    another = Line("one-t", "", {"canny": clear}, beside="no-warm-up")
    assert answered(replace(page, rows=(*page.rows, another)))[0].verdict == "yes"  # one is enough
    assert answered(with_row(page, 2, cells={"canny": Result()})) == ()  # beside nothing, whatever else is there


@pytest.mark.parametrize("base", [{}, {"diversity": (0.0, 0.0)}])  # not measured; z ignored
def test_change_beside_no_diversity_has_no_ratio(base):
    rows = {"draws": cell(consistency=(0.1, 0.001), fd=(2.0, 0.1), diversity=(3.0, 0.2)),
            "no_warm_up": cell(consistency=(0.1, 0.001), fd=(1.0, 0.1), **base)}
    page = table("table2", {"canny": "canny"}, **{row: {"canny": own} for row, own in rows.items()})
    (answer,) = answered(with_row(page, 0, beside="no-warm-up"))
    assert answer.verdict == "no"
    ratios = {k: v["ratio"] for k, v in answer.numbers["draws"].items() if v["ratio"] is not None}
    assert ratios == pytest.approx({"consistency": 1.0, "fd": 2.0})


COURSE = tuple({"step": step, "reward": reward, "judge": judge, "prompt_agreement": 0.9, "fd": fd}
               for step, reward, judge, fd in ((100, -0.5, -0.6, 4.0), (200, -0.3, -0.4, 4.5), (300, -0.1, -0.9, 9.0)))


def test_hacking_begins_where_the_judge_is_best():
    for last, verdict in ((-0.1, "yes"), (-0.35, "no")):
        course = (*COURSE[:2], {**COURSE[2], "reward": last})
        text = cell(record(course=course), judge=(-0.9, None), fd=(9.0, 0.1))
        (answer,) = answered(table("fig6", {"text": "text"}, reward={"text": text}))
        assert answer.verdict == ("yes" if last > -0.3 else "no") == verdict
        found = answer.numbers["reward"]
        assert (found["step"], found["of"]) == (200, 300)
        assert found["judge"] == pytest.approx(-0.5)
        assert found["fd"] == pytest.approx(4.5)
        assert found["reward"] == pytest.approx(last + 0.3)


def test_probe_before_any_reward_tells_no_hacking():
    course = ({"step": 10, "judge": 0.0, "fd": 1.0}, *COURSE)
    text = cell(record(course=course), judge=(-0.9, None))
    (answer,) = answered(table("fig6", {"text": "text"}, reward={"text": text}))
    assert answer.numbers["reward"]["step"] == 200


@pytest.mark.parametrize(("noisy", "strong", "verdict"), [
    (-0.5, None, "yes"), (-0.7, None, "no"), (-0.5, -0.2, "yes"), (-0.5, -0.4, "no")])
@pytest.mark.parametrize("name", ["table3", "fig6"])
def test_judge_compares_rewards_at_each_strength(noisy, strong, verdict, name):
    judged = {"reward": (noisy, 5.0), "reward_clean": (-0.6, 7.0)}
    if strong is not None:
        judged |= {"strong": (strong, 3.0), "clean_strong": (-0.3, 9.0)}
    rows = {row: {"text": cell(judge=(judge, None), fd=(fd, 0.1))} for row, (judge, fd) in judged.items()}
    (answer,) = answered(table(name, {"text": "text"}, **rows))
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
        (answer,) = answered(page)
        assert answer.verdict == verdict
        assert {k: v["more"] for k, v in answer.numbers["guided"].items()} == {key: value - 32, "hpsv2": 1.0}
        name, best = {"prompt_agreement": "prompt agreement", "clip": "CLIP"}[key], "guided" if value > 32 else "own"
        assert best_rows(page).startswith("of one-step students: best ")
        assert f"best {name} {best} ({max(value, 32):.3f})" in best_rows(page)
        assert "best HPSv2.1 guided (26.000)" in best_rows(page)


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
