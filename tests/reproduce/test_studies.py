"""The tables of students in few steps: their rows, the verdicts on papers' findings, and their plots."""

from dataclasses import replace

import numpy as np
import pytest

from jdm.levels import RENOISING
from jdm.recipes.scales import FOUR
from jdm.regularisers import Adversarial, MeanVariance
from jdm.reproduce.cells import cells, measuring_seconds, selected
from jdm.reproduce.findings import FINDINGS, Beside, Turn, findings
from jdm.reproduce.form import Plot
from jdm.reproduce.models import growth
from jdm.reproduce.plots import LEFT, TOP, plots, series, ticks
from jdm.reproduce.results import Line, Page, Record, Result, Value, load_page
from jdm.reproduce.setups import NANO, SD15
from jdm.reproduce.sitting import _file, listed
from jdm.reproduce.studies import ALPHAS, BANDS, CONTROL, DDMD, LEVELS
from jdm.reproduce.verdicts import best_rows
from reproducing import cell_of, sit, tiny_setup, written


@pytest.fixture
def setup(teacher, tmp_path, monkeypatch):
    return replace(tiny_setup(teacher, tmp_path, monkeypatch), probes=DDMD.probes)


def runs(table, column, setup=NANO):
    """The run of each row."""
    found = {c.row.key: c.model.run for c in cells(table, setup) if c.column == column}
    return {key: run for key, run in found.items() if run is not None}


def page(of="ddmd", columns=None, **rows):
    lines = tuple(Line(key.replace("_", "-"), key, {next(iter(columns or {"text": "text"})): result})
                  for key, result in rows.items())
    return Page(of, "", "", "", "", "", "", "", "nano", "nano-sd", "", "", 1, 1, "", columns or {"text": "text"}, (),
                "", lines)


def result(course=(), **values):
    return Result(records=(Record(0, "", {}, course=course),), values={k: Value(*v) for k, v in values.items()})


# Rows


@pytest.mark.parametrize("table", [DDMD, CONTROL], ids=lambda t: t.name)
def test_each_row_has_a_folder_of_its_own(table):
    for setup in (NANO, SD15):
        found = {c.model.name: str(c.model.run.method) for c in cells(table, setup) if c.model.run is not None}
        assert len(found) == len(set(found.values())) == sum(c.model.run is not None for c in cells(table, setup))


def test_schedules_differ_in_levels_alone():
    found = {key: run.method for key, run in runs(DDMD, "text").items()}
    for name, (dm, ca) in RENOISING.items():
        method = found[f"{name}-4"]
        assert (method.matching.levels, method.augmentation.levels) == (dm, ca)
        levels = {"matching": replace(method.matching, levels=RENOISING["decoupled-hybrid"][0]),
                  "augmentation": replace(method.augmentation, levels=RENOISING["decoupled-hybrid"][1])}
        assert replace(method, **levels) == found["decoupled-hybrid-4"]
    assert {len(m.student.levels) for key, m in found.items() if key.endswith("-4")} == {4}
    assert {m.student.levels for key, m in found.items() if key.endswith("-1")} == {LEVELS[1]}


def test_rows_leave_out_or_replace_a_branch():
    found = {key: run.method for key, run in runs(DDMD, "text").items()}
    for steps in (4, 1):
        assert found[f"ca-{steps}"].matching is None
        assert found[f"dm-{steps}"].augmentation is None
        assert found[f"ca-mean-variance-{steps}"].regulariser == MeanVariance()
        assert found[f"ca-gan-{steps}"].regulariser == Adversarial()
        for alpha in ALPHAS[2:]:
            assert found[f"alpha-{alpha}-{steps}"].augmentation.weight == alpha - 1
        for low, high in BANDS:
            levels = found[f"ca-band-{low:g}-{high:g}-{steps}"].augmentation.levels
            assert (levels.low, levels.high) == (low, high)
            levels = found[f"dm-band-{low:g}-{high:g}-{steps}"].matching.levels
            assert (levels.low, levels.high) == (low, high)
    assert found["decoupled-hybrid-4"].augmentation.weight == 1  # alpha 2


def test_controls_are_learnt_in_one_two_four():
    for column in NANO.controls.values():
        found = {key: run for key, run in runs(CONTROL, column).items() if key != "controlnet"}
        for steps, levels in LEVELS.items():
            coupled, hybrid, rival = (found[f"{name}-{steps}"].method for name in ("coupled", "hybrid", "nct"))
            assert coupled.student.levels == hybrid.student.levels == rival.base_levels == levels
            assert (coupled.augmentation, coupled.fidelity.guidance) == (None, 2.0)
            assert (hybrid.augmentation.levels.within, hybrid.fidelity.guidance) == ("input", 1.0)
            assert coupled.control == hybrid.control == rival.control == column
            assert rival.base.endswith(f"nano-ddmd-4-decoupled-hybrid-{steps}-seed0/model")
    assert LEVELS[4] == FOUR


def test_a_setup_has_its_tables_budget(tmp_path):
    setup = replace(NANO, out=tmp_path).for_table("ddmd", DDMD.probes, 2000)
    run = runs(DDMD, "text", setup)["ca-4"]
    assert (run.steps, run.probe_every, run.log_every) == (500, 50, 10)
    assert _file(DDMD, setup).endswith("-ddmd")
    assert _file(DDMD, setup.for_table("ddmd", 0, 2000, 9)).endswith("-ddmd-9steps")
    assert SD15.for_table("ddmd", 10, 2000).steps is None
    text = listed(DDMD, setup, patterns="ca-4")
    (cell,) = selected(cells(DDMD, setup), "ca-4")
    assert measuring_seconds(cell, setup) == pytest.approx(0.001 * 4 * (2000 + 512 + 256) + 22 + 10)
    assert "train nano-ddmd-4-ca-4-seed0-500steps, 500 x 32" in text


# Findings


def verdict(number, **rows):
    return findings(page(**rows))[number].verdict


def test_unmeasured_findings_say_which_rows_they_need():
    found = findings(page(ca_4=result(fd=(1.0, 0.1))))
    assert {answer.verdict for answer in found} == {"not measured"}
    assert len(found) == len(FINDINGS)
    assert found[1].text == "it needs dm-4, decoupled-hybrid-4"


@pytest.mark.parametrize(("fd", "agreement", "said"), [
    (2.0, 0.5, "confirmed"), (0.5, 0.5, "refuted"), (1.1, 0.5, "not told"), (2.0, 0.8, "refuted")])
def test_weakness_is_told_by_more_than_two_errors(fd, agreement, said):
    """An error of the difference is .14 of distance and .014 of agreement."""
    rows = {"dm_4": result(fd=(fd, 0.1), prompt_agreement=(agreement, 0.01)),
            "decoupled_hybrid_4": result(fd=(1.0, 0.1), prompt_agreement=(0.7, 0.01))}
    assert verdict(1, **rows) == said


def test_growth_needs_a_turn_and_variance():
    course = ({"step": 10, "fd": 5.0}, {"step": 20, "fd": 3.0}, {"step": 30, "fd": 9.0})
    hybrid = result(std_growth=(1.1, 0.05))
    grown = result(course, std_growth=(2.0, 0.1))
    assert verdict(0, ca_4=grown, decoupled_hybrid_4=hybrid) == "confirmed"
    assert verdict(0, ca_4=result(course[:2], std_growth=(2.0, 0.1)), decoupled_hybrid_4=hybrid) == "refuted"
    assert verdict(0, ca_4=result(course, std_growth=(1.2, 0.1)), decoupled_hybrid_4=hybrid) == "not told"
    told = Turn("ca-4").told(page(ca_4=grown), "text")
    assert told is not None
    assert "is 3.00 at step 20 and 9.00 at the end, step 30" in told.text


def test_short_runs_do_not_refute_a_collapse():
    for last, said in ((500, "not told"), (4000, "refuted")):
        assert verdict(3, ca_gan_4=result(({"step": 10, "fd": 5.0}, {"step": last, "fd": 3.0}))) == said


@pytest.mark.parametrize(("fd", "holds"), [(1.04, True), (1.2, None), (1.5, False)])
def test_alike_is_a_small_share_or_refuted(fd, holds):
    told = Beside("a", "b", "fd", "alike").told(page(a=result(fd=(fd, 0.1)), b=result(fd=(1.0, 0.1))), "text")
    assert told is not None
    assert told.holds is holds


@pytest.mark.parametrize(("fd", "consistency", "said"), [(0.79, 0.1, "yes"), (0.81, 0.1, "no"), (0.5, 0.11, "no")])
def test_four_steps_must_gain_a_fifth(fd, consistency, said):
    rows = {"hybrid_4": result(fd=(fd, 0.01), consistency=(consistency, 0.001), diversity=(2.0, 0.1)),
            "hybrid_1": result(fd=(1.0, 0.01), consistency=(0.1, 0.001), diversity=(1.0, 0.1)),
            "controlnet": result(diversity=(2.4, 0.1))}
    gain, kept = findings(page("control", {"canny": "canny"}, **rows))
    assert (gain.verdict, kept.verdict) == (said, "no")  # 1 is no 80% of 2.4
    assert kept.numbers["hybrid-4"]["diversity"]["ratio"] == pytest.approx(2 / 2.4)


def test_headline_of_students_leaves_out_teachers():
    lines = page(hybrid=result(fd=(2.0, 0.1)), ca=result(fd=(3.0, 0.1)),
                 teacher=Result(records=(Record(0, "", {"guidance": 2.0}),), values={"fd": Value(1.0)}))
    rows = tuple(replace(line, steps=4, part="4 steps") for line in lines.rows)
    assert best_rows(replace(lines, rows=rows)) == "of 2 students: best distance hybrid in 4 steps (2.000)"


# Course and plots


def test_growth_is_end_over_start_with_error():
    course = [{"step": 1, "std_x": 0.5, "std_x_spread": 0.05}, {"step": 2, "std_x": 0.7},
              {"step": 3, "std_x": 1.0, "std_x_spread": 0.05}]
    assert growth(course) == {"std_growth": 2.0, "std_growth_spread": pytest.approx(2 * (0.1**2 + 0.05**2) ** 0.5)}
    assert growth(course[:2]) == {"std_growth": 1.4}
    assert growth(course[:1]) == {}


def test_ticks_are_round_and_span_the_values():
    assert ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(77, 512)[0] <= 77
    assert ticks(77, 512)[-1] >= 512
    for low, high in ((1e-3, 1.7e-3), (-3.0, 44.0), (5.0, 5.0)):
        assert 2 <= len(ticks(low, high)) <= 9


def test_bars_are_as_high_as_their_values():
    rows = {"a": result(fd=(1.0, None)), "b": result(fd=(2.0, None))}
    image = plots([Plot("t", "fd", ("a", "b", "not-measured"), "bars")], page(**rows))
    assert image is not None
    from jdm.reproduce.plots import COLOURS, RIGHT, WIDTH

    inside = np.asarray(image)[TOP + 1 :, LEFT : WIDTH - RIGHT]
    heights = [int((inside == [int(c[k : k + 2], 16) for k in (1, 3, 5)]).all(2).any(1).sum()) for c in COLOURS[:2]]
    assert heights[1] == pytest.approx(2 * heights[0], abs=3)
    assert plots([Plot("t", "fd", ("not-measured",), "bars")], page(**rows)) is None


def test_a_plot_over_alpha_is_one_line():
    rows = {"a": result(fd=(1.0, None)), "b": result(fd=(2.0, 0.5))}
    found = series(Plot("t", "fd", ("a", "none", "b"), "alpha", (1.0, 2.0, 6.0)), page(**rows))
    assert found == {"hybrid": [(1.0, Value(1.0)), (6.0, Value(2.0, 0.5))]}


def test_study_is_filled_measured_and_drawn(setup, tmp_path):
    setup = replace(setup, steps=4)
    data, failures = sit(DDMD, setup, tmp_path / "page", "ca-4,ca-mean-variance-1")
    assert failures == []
    (record,) = cell_of(data, "ca-4", "text").records
    assert [at["step"] for at in record.course] == [1, 2, 3, 4]
    first, last = record.course[0], record.course[-1]
    assert record.measured["std_growth"] == pytest.approx(last["std_x"] / first["std_x"])
    assert record.measured["nfe"] == 4
    assert {"std_spread", "prompt_agreement_spread"} <= record.measured.keys()
    text = written(tmp_path / "page")
    assert text.startswith("# Decoupled DMD's study: of 2 students: ")
    assert "**not measured**, over text: it needs dm-4, decoupled-hybrid-4" in text
    assert f"]({data.plots})" in text
    assert sorted(f.suffix for f in (tmp_path / "page").iterdir()) == [".json", ".md", ".png", ".png"]
    assert load_page(str(next((tmp_path / "page").glob("*.json")))) == data
    assert "| CA alone (4 steps)" in text.split("## The course of training")[1]
