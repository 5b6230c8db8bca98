"""`jdm reproduce` on the tiny model: what is filled, kept, resumed, and said where it failed."""

import json
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from jdm.controls import Canny
from jdm.data.sources import load_pictures
from jdm.errors import UsageError
from jdm.evaluation import evaluate as evaluation
from jdm.evaluation.questions import Questions, answers
from jdm.evaluation.sampling import Sampler
from jdm.library import load_model
from jdm.models.stable_diffusion import StableDiffusion
from jdm.reproduce import figures, sitting
from jdm.reproduce.cells import ASKED, cells, place, selected, stored, tuned
from jdm.reproduce.page import number
from jdm.reproduce.results import Page, Result, load_page
from jdm.reproduce.setups import Setup
from jdm.reproduce.sitting import listed
from reproducing import TABLE, N, Watch, cell_of, sit, tiny_setup, written

# What of table 1 is filled once for all tests that only read.
FILLED = "canny/jdm,canny/nct,canny/frozen-di,canny/di-controlnet,canny/controlnet,lowres/jdm"


@pytest.fixture(scope="module")
def shared(teacher, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield tiny_setup(teacher, tmp_path_factory.mktemp("shared"), patch)


@pytest.fixture
def setup(shared, tmp_path):
    """With nothing in it yet."""
    return replace(shared, out=tmp_path / "out")


@dataclass
class Filled:
    """A table that was filled in part; its setup, watch, and what `reproduce` gave."""

    setup: Setup
    watch: Watch
    page: Path
    data: Page
    failures: list

    def cell(self, row: str, column: str = "canny") -> Result:
        return cell_of(self.data, row, column)


@pytest.fixture(scope="module")
def filled(shared, tmp_path_factory):
    folder, watch = tmp_path_factory.mktemp("filled"), Watch()
    setup = replace(shared, out=folder / "out")
    data, failures = sit(TABLE, setup, folder / "page", FILLED, watch=watch, command="jdm reproduce x")
    return Filled(setup, watch, folder / "page", data, failures)


@contextmanager
def other_weights(file: Path):
    """One byte of a file of weights is another for a while."""
    before = file.read_bytes()
    file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    yield
    file.write_bytes(before)


# A table from end to end


def test_a_table_trains_each_model_once(filled):
    assert filled.failures == []
    names = ("nano-canny-canny-seed0", "nano-diff-instruct-seed0", "nano-nct-canny-seed0", "nano-shared-lowres-seed0",
             "nano-no-warm-up-canny-seed0", "nano-controlnet-canny-seed0")
    assert filled.watch.taken == {name: [1, 2] for name in names}
    states = {c.cell: c.state for line in filled.data.rows for c in line.cells.values()}
    assert {k for k, v in states.items() if v == "measured"} == set(FILLED.split(","))
    assert states["silhouette/nct"] == "not measured"
    assert states["lowres/controlled-teacher"] == "left out"


def test_what_is_there_is_only_read(filled, tmp_path):
    kept = {f: f.stat().st_mtime_ns for f in (filled.setup.out / "cells").iterdir()}
    watch = Watch()
    again, _ = sit(TABLE, filled.setup, tmp_path, FILLED, watch=watch, command="jdm reproduce x")
    assert again.rows == filled.data.rows
    assert watch.taken == {}
    assert kept == {f: f.stat().st_mtime_ns for f in (filled.setup.out / "cells").iterdir()}


def test_known_cells_are_taken_without_training(filled, tmp_path):
    (page,) = filled.page.glob("*.json")
    elsewhere = replace(filled.setup, out=tmp_path / "out", known=(str(page),))
    watch = Watch()
    data, failures = sit(TABLE, elsewhere, tmp_path / "page", FILLED, watch=watch)
    assert (failures, watch.taken) == ([], {})
    for name in FILLED.split(","):
        column, row = name.split("/")
        (ours,), (theirs,) = (cell_of(d, row, column).records for d in (data, filled.data))
        assert ours == replace(theirs, taken_from=page.name)
    assert f"are taken from {page.name}." in written(tmp_path / "page")
    (other,) = selected(cells(TABLE, replace(elsewhere, n=N - 1)), "canny/nct")  # other pictures: another cell
    assert stored(other, replace(elsewhere, n=N - 1)) is None


def test_a_figures_row_shows_what_is_there(filled, monkeypatch):
    """It has numbers where a page knows them, and pictures where its model is."""
    (page,) = filled.page.glob("*.json")
    monkeypatch.setattr(figures, "sheet", lambda rows: rows)
    elsewhere = replace(filled.setup, out=filled.setup.out / "elsewhere", known=(str(page),))
    for setup, there in ((filled.setup, True), (elsewhere, False)):
        rows = dict(figures.figure(selected(cells(TABLE, setup), "canny/nct,canny/jdm-joint"), setup, filled.data))
        (nct,) = (label for label in rows if label.startswith("NCT\n"))
        values = cell_of(filled.data, "nct").values
        assert nct == f"NCT\ndistance {number(values, 'fd')}, consistency {number(values, 'consistency')}"
        assert (rows[nct] is not None) == there
        assert rows["JDM, its UNet trained on for each control\nleft out"] is None


def test_a_figure_shows_pictures_controls_and_answers(filled, monkeypatch):
    monkeypatch.setattr(figures, "sheet", lambda rows: rows)
    found = selected(cells(TABLE, filled.setup, seeds=2), "canny/nct,canny/controlnet,canny/jdm")
    rows = figures.figure(found, filled.setup, filled.data)
    assert [label.split("\n")[0] for label, _ in rows] == [
        "real pictures", "their control: canny", "NCT", "ControlNet, 50 steps", "JDM"]  # the first seed's alone
    questions = Questions.of(load_pictures("fashion-mnist", filled.setup.split, 32), Canny(), N, ASKED)
    expected = [questions.images, Canny().image(questions.c)]
    assert all(torch.equal(shown, (255 * own).round().byte()) for (_, shown), own in zip(rows, expected, strict=False))
    for (_, shown), row in zip(rows[2:], ("nct", "controlnet", "jdm"), strict=True):
        (cell,) = (c for c in found if c.row.key == row and c.seed == 0)
        (record,) = filled.cell(row).records
        sampler = Sampler(load_model(cell.model.path), cell.row.steps, record.measured["guidance"] or 1.0)
        assert torch.equal(shown, answers(sampler, questions, Canny()))


def test_a_page_that_is_none_is_refused(setup, tmp_path):
    (tmp_path / "page.json").write_text("[]")
    known = replace(setup, known=(str(tmp_path / "page.json"),))
    (cell,) = selected(cells(TABLE, known), "canny/nct")
    with pytest.raises(UsageError, match=r"page.json.*give --known the .json of a page"):
        stored(cell, known)


def test_every_printed_number_is_in_the_json(filled):
    data, page = load_page(str(next(filled.page.glob("*.json")))), written(filled.page)
    assert data == filled.data
    paper, details = page.split("## Every measurement")
    for name in FILLED.split(","):
        column, row = name.split("/")
        cell = cell_of(data, row, column)
        (record,) = cell.records
        m = record.measured
        assert json.loads((filled.setup.out / "cells" / record.file).read_text())["measured"] == m
        title = next(line.title for line in data.rows if line.row == row)
        printed = f"{m['fd']:.2f} ± {m['fd_spread']:.2f} / {m['consistency']:.4f} ± {m['consistency_spread']:.4f}"
        assert printed in next(line for line in paper.splitlines() if line.startswith(f"| {title} "))
        assert "consistency_same_prompt" not in m  # among so few pictures no prompt comes twice
        anchors = " / ".join([f"{m['consistency_chance']:.3f}", "–",
                              *(f"{m[f'consistency_{k}']:.3f}" for k in ("blank", "round_trip"))])
        lines = [line for line in details.split(f"### {column}")[1].splitlines() if line.startswith(f"| {title} ")]
        assert anchors in lines[0]
        assert f"| {m['seconds_per_image'] * 1e3:.2f} " in lines[0]
    left = ("soft-edge/nct", "silhouette/nct", "lowres/nct")
    assert f"- {', '.join(left)} not measured: `jdm reproduce x --cells {','.join(left)}`" in page


def test_headline_and_answers_are_computed_from_cells(filled):
    page = written(filled.page)
    rows = {line.row: line for line in filled.data.rows}
    measured = {k: r.cells["canny"].values for k, r in rows.items() if r.cells["canny"].values}
    best = min(measured, key=lambda k: measured[k]["consistency"].mean)
    first = f"# Table 1: of {len(measured)} rows with canny: best consistency {rows[best].title} ("
    assert page.splitlines()[0].startswith(first)
    ratio = measured["jdm"]["consistency"].mean / measured["controlnet"]["consistency"].mean
    (claim,) = [a for a in filled.data.answers if "24%" in a.question]
    assert claim.numbers["jdm"]["consistency"]["ratio"] == pytest.approx(ratio)
    assert f"(x {ratio:.2f}, " in page
    ratio = measured["jdm"]["diversity"].mean / measured["controlnet"]["diversity"].mean
    assert measured["jdm"]["diversity_ratio"].mean == pytest.approx(ratio)


def test_guidance_is_chosen_on_validation_pictures(filled):
    (record,) = filled.cell("controlnet").records
    distances = record.tuning.distances
    assert list(distances) == ["1.5", "2", "3", "4"]
    assert record.tuning.chosen == float(min(distances, key=distances.get)) == record.measured["guidance"]
    assert (record.tuning.n, record.measured["n"], record.measured["nfe"]) == (8, N, 4)
    assert f"{record.tuning.chosen:g} (distance on 8 validation pictures: 1.5: " in written(filled.page)


def test_guidance_is_tuned_on_the_settings_device(filled, monkeypatch):
    moved, to = [], StableDiffusion.to
    monkeypatch.setattr(StableDiffusion, "to", lambda model, place: moved.append(place) or to(model, place))
    monkeypatch.setattr("jdm.reproduce.cells.TUNED_ON", 4)  # not the tuning that is kept
    (cell,) = selected(cells(TABLE, filled.setup), "canny/controlnet")
    assert tuned(cell, replace(filled.setup, device="cpu:0")).n == 4
    assert moved == ["cpu:0"]


def test_every_stages_cost_is_its_runs_own(filled):
    (record,) = filled.cell("nct").records
    assert [(s.name, s.samples) for s in record.training] == [("nano-diff-instruct-seed0", 8),
                                                                      ("nano-nct-canny-seed0", 8)]
    log = (filled.setup.out / "nano-nct-canny-seed0" / "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in log]
    assert record.training[1].seconds == pytest.approx(sum(seconds))  # of two steps the median is the mean


def test_a_composed_model_joins_unet_and_controlnet(filled):
    one, many, both = (load_model(str(filled.setup.out / name)) for name in (
        "nano-diff-instruct-seed0/model", "nano-controlnet-canny-seed0/model",
        "nano-diff-instruct-seed0+nano-controlnet-canny-seed0"))
    assert both.levels == (625,)
    assert both.controlnet is not None
    assert many.controlnet is not None
    for own, origin in ((both.backbone, one.backbone), (both.controlnet, many.controlnet)):
        assert all(torch.equal(a, b) for a, b in zip(own.parameters(), origin.parameters(), strict=True))


def test_phase_2_leaves_the_unet_of_phase_1(filled):
    first, second = (load_model(str(filled.setup.out / name / "model")).backbone for name in (
        "nano-canny-canny-seed0", "nano-shared-lowres-seed0"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_seeds_train_apart_and_their_spread_is_printed(filled, tmp_path):
    watch = Watch()
    data, _ = sit(TABLE, filled.setup, tmp_path, "canny/jdm", seeds=2, watch=watch)
    assert watch.taken == {"nano-canny-canny-seed1": [1, 2]}
    cell = cell_of(data, "jdm")
    a, b = (r.measured["consistency"] for r in cell.records)
    assert [r.seed for r in cell.records] == [0, 1]
    assert a != b
    value = cell.values["consistency"]
    assert value.mean == pytest.approx((a + b) / 2)
    assert value.spread == pytest.approx(abs(a - b) / 2**0.5)
    page = written(tmp_path)
    assert f"{value.mean:.4f} ± {value.spread:.4f}" in page
    assert "- canny/nct measured for 1 of 2 seeds: `" in page


def test_another_n_is_another_cell(filled, tmp_path):
    watch, before = Watch(), set((filled.setup.out / "cells").iterdir())
    data, _ = sit(TABLE, replace(filled.setup, n=N - 2), tmp_path, "canny/jdm", watch=watch)
    assert cell_of(data, "jdm").records[0].measured["n"] == N - 2
    assert watch.taken == {}
    assert len(set((filled.setup.out / "cells").iterdir()) - before) == 1


def test_a_cell_knows_its_models_weights(filled):
    (cell,) = selected(cells(TABLE, filled.setup), "canny/jdm")
    kept = place(cell, filled.setup)
    with other_weights(next((filled.setup.out / "nano-canny-canny-seed0" / "model" / "unet").glob("*.safetensors"))):
        assert place(cell, filled.setup) != kept
        assert stored(cell, filled.setup) is None
    assert place(cell, filled.setup) == kept


# Going on


def test_a_stopped_measurement_keeps_its_page_and_models(filled, tmp_path, monkeypatch):
    setup, watch, original = replace(filled.setup, n=N - 1), Watch(), evaluation.evaluate

    def stopped(model, *asked):
        if "nct" in model:
            raise KeyboardInterrupt
        return original(model, *asked)

    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "evaluate", stopped)
        with pytest.raises(KeyboardInterrupt):
            sit(TABLE, setup, tmp_path, "canny/jdm,canny/nct", watch=watch)
    assert cell_of(load_page(str(next(tmp_path.glob("*.json")))), "jdm").state == "measured"
    data, _ = sit(TABLE, setup, tmp_path, "canny/nct", watch=watch)
    assert cell_of(data, "nct").state == "measured"
    assert watch.taken == {}


# Going wrong


def test_an_unforeseen_error_fails_its_cell_alone(filled, tmp_path, monkeypatch):
    original = evaluation.evaluate

    def surprised(model, *asked):
        if "nct" in model:
            raise IndexError("of a list\nand more")
        return original(model, *asked)

    monkeypatch.setattr(evaluation, "evaluate", surprised)
    data, failures = sit(TABLE, replace(filled.setup, n=5), tmp_path, "canny/nct,canny/frozen-di")
    assert failures == ["failed unexpectedly (IndexError: of a list)"]
    assert cell_of(data, "frozen-di").state == "measured"


def test_a_model_of_other_weights_is_refused(filled, tmp_path):
    folder = filled.setup.out / "nano-diff-instruct-seed0" / "model" / "unet"
    with other_weights(next(folder.glob("*.safetensors"))):
        _, failures = sit(TABLE, filled.setup, tmp_path, "canny/nct")
    assert "nano-nct-canny-seed0 was trained from another base than" in failures[0]
    assert "canny/nct failed: " in written(tmp_path)


def test_a_model_without_recorded_weights_is_refused(filled, tmp_path):
    note = filled.setup.out / "nano-nct-canny-seed0" / "needs.json"
    said = note.read_text()
    note.unlink()
    try:
        _, failures = sit(TABLE, filled.setup, tmp_path, "canny/nct")
    finally:
        note.write_text(said)
    assert "nano-nct-canny-seed0 does not say from which weights it was trained" in failures[0]


# Before anything runs


def test_a_dry_run_lists_and_writes_nothing(setup, filled):
    said = listed(TABLE, setup, patterns="canny/*")
    assert not setup.out.exists()
    assert "train nano-diff-instruct-seed0, 2 x 4; measure 8 pictures" in said
    assert said.count("train nano-diff-instruct-seed0") == 1
    assert "In all about" in said
    line = next(line for line in listed(TABLE, filled.setup).splitlines() if line.startswith("| canny/jdm "))
    assert "| measured " in line


def test_commit_is_dirty_where_the_package_changed(tmp_path, monkeypatch):
    file = tmp_path / "src" / "jdm" / "reproduce" / "sitting.py"
    file.parent.mkdir(parents=True)
    file.write_text("")

    def git(*words):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e", *words], check=True,
                       capture_output=True)

    monkeypatch.setattr(sitting, "__file__", str(file))
    assert sitting.commit() == "", "no commit is there"
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    clean = sitting.commit()
    assert len(clean) >= 7
    (tmp_path / "page.md").write_text("a results page, half written")
    assert sitting.commit() == clean
    (file.parent / "new.py").write_text("")
    assert sitting.commit() == f"{clean}-dirty"
