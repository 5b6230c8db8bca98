"""What `jdm reproduce` plans, and a sitting that stops, waits or fails before its table is filled."""

import json
import threading
import time
from dataclasses import replace
from operator import attrgetter

import pytest

from jdm.errors import TerminatedError, UsageError
from jdm.recipes import all_recipes
from jdm.reproduce import models
from jdm.reproduce.cells import _digest, cells, identity, passed_over, selected, stored
from jdm.reproduce.models import Given, Model, Trained, course, settled, to_train
from jdm.reproduce.results import Line, Record, Result, save
from jdm.reproduce.setups import NANO, check
from jdm.reproduce.sitting import gathered
from jdm.reproduce.tables import TABLES
from reproducing import TABLE, N, Watch, cell_of, sit, tiny_setup, written


@pytest.fixture
def setup(teacher, tmp_path, monkeypatch):
    """With nothing in it yet."""
    return tiny_setup(teacher, tmp_path, monkeypatch)


# The plan


def test_remaining_cost_is_steps_times_seconds(setup):
    some = replace(setup, steps=1000)
    (cell,) = selected(cells(TABLE, some), "soft-edge/nct")
    left = to_train(cell.model, some)
    assert {k: (steps, seconds) for k, (_, steps, seconds) in left.items()} == {
        "nano-diff-instruct-seed0-1000steps": (1000, 1000 * NANO.seconds["diff-instruct"]),
        "nano-nct-soft-edge-seed0-1000steps": (1000, 1000 * NANO.seconds["nct"])}


def test_cells_are_chosen_by_column_row_and_wildcard(setup):
    whole = cells(TABLE, setup)
    assert {c.name for c in selected(whole, "lowres/j*, nct")} == {
        "lowres/jdm", "lowres/jdm-joint", "canny/nct", "soft-edge/nct", "silhouette/nct", "lowres/nct"}
    assert "soft-edge/controlled-teacher" not in {c.name for c in selected(whole, None)}
    assert [c.name for c in selected(whole, "soft-edge/controlled-teacher")] == ["soft-edge/controlled-teacher"]
    with pytest.raises(UsageError, match=r"names no cell of this table; did you mean canny/nct\?"):
        selected(whole, "canny/ntc")


def test_shipped_models_are_taken_for_the_own_teacher(tmp_path):
    ours, other = (replace(setup, out=tmp_path) for setup in (NANO, NANO.on("my-teacher")))
    phase_1 = Trained("canny", control="canny")
    assert settled(phase_1, ours, "lowres", 0).path == "nano-canny"
    another = settled(phase_1, ours, "lowres", 1)  # what ships is of one training seed
    assert another.run is not None
    assert (another.name, another.run.seed) == ("nano-canny-canny-seed1", 1)
    own = tmp_path / "nano-canny-canny-seed0"
    own.mkdir()
    (own / "run.json").write_text("{}")
    assert settled(phase_1, replace(ours, out=tmp_path), "lowres", 0).path == str(own / "model")
    trained = settled(phase_1, other, "lowres", 0)
    assert trained.run is not None
    assert (trained.name, trained.run.model, trained.run.seed) == ("nano-canny-canny-seed0", "my-teacher", 0)
    assert NANO.on("nano-sd", "fashion-mnist") == NANO
    assert settled(Given(), other, "", 0).path == "my-teacher"


def test_a_teacher_file_is_known_by_its_bytes(tmp_path):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    a.write_bytes(b"one")
    b.write_bytes(b"one")
    assert models.weights(str(a)) == models.weights(str(b))
    b.write_bytes(b"two")
    assert models.weights(str(a)) != models.weights(str(b))
    check(NANO.on(str(a)))
    with pytest.raises(UsageError, match=r"missing are the weights of \S+c\.safetensors"):
        check(NANO.on(str(tmp_path / "c.safetensors")))


def test_every_row_gives_recipe_its_control_and_models(tmp_path):
    setup = replace(NANO, out=tmp_path)
    for table in TABLES.values():
        for cell in cells(table, setup):
            run = cell.model.run
            if run is not None and cell.control:
                assert run.method.control == cell.control
            for path, need in cell.model.needs.items():
                if run is not None:
                    assert (run.model if path == "model" else attrgetter(path)(run.method)) == need.path
    runs = {c.row.key: c.model.run for c in cells(TABLES["table2"], setup)}
    own_t, joint = runs["own-t"], runs["jdm"]
    assert own_t is not None
    assert joint is not None
    assert (own_t.steps, own_t.batch) == (joint.steps, joint.batch)


def test_what_was_measured_before_it_shipped_is_known(tmp_path):
    ours = replace(NANO, out=tmp_path / "out", n=N)
    bare = replace(ours, shipped={k: v for k, v in NANO.shipped.items() if v != "nano-canny"})
    ships, trained = (selected(cells(TABLES["table1"], each), "canny/jdm")[0] for each in (ours, bare))
    assert (ships.model.name, trained.model.name) == ("nano-canny", "nano-canny-canny-seed0")
    whole = {**identity(trained, bare), "weights": "of then"}
    record = Record(0, "of then", {"fd": 1.0}, file=f"{trained.model.name}-canny-n{N}-{_digest(whole)}.json")
    page = gathered(TABLES["table1"], ours, [], 1, "")
    save(tmp_path / "page.json", replace(page, rows=(Line("jdm", "JDM", {"canny": Result(records=(record,))}),)))
    known = replace(ours, known=(str(tmp_path / "page.json"),))
    assert stored(ships, known) == replace(record, taken_from="page.json")
    assert passed_over([ships], known) == []
    (line,) = passed_over([ships], replace(known, split="test[:9]"))
    assert line.startswith("page.json (jdm ")
    assert line.endswith("has canny/jdm by other settings, pictures or weights than they would have now: not taken")


# A sitting


@pytest.mark.parametrize("error", [KeyboardInterrupt, TerminatedError])
def test_an_interrupted_sitting_resumes_and_trains_nothing_twice(error, setup, tmp_path):
    watch = Watch(("nano-nct-canny-seed0", 1), error)
    with pytest.raises(error):
        sit(TABLE, setup, tmp_path / "page", "canny/nct,canny/jdm", watch=watch)
    assert "nano-canny-canny-seed0" not in watch.taken
    data, _ = sit(TABLE, setup, tmp_path / "page", run=False)
    assert cell_of(data, "nct").state == "not measured"  # it did not fail
    data, failures = sit(TABLE, setup, tmp_path / "page", "canny/nct", watch=watch)
    assert failures == []
    assert watch.taken == {"nano-diff-instruct-seed0": [1, 2], "nano-nct-canny-seed0": [1, 2]}
    assert cell_of(data, "nct").state == "measured"


def test_a_second_process_waits_for_the_first(tmp_path, capsys):
    entered = threading.Event()

    def second():
        with models._alone(tmp_path / "run"):
            entered.set()

    thread = threading.Thread(target=second)
    with models._alone(tmp_path / "run"):
        thread.start()
        assert not entered.wait(0.2)
    thread.join(10)
    assert entered.is_set()
    assert "is in use by process" in capsys.readouterr().err


def test_two_processes_train_a_shared_model_once(setup, monkeypatch):
    nct = selected(cells(TABLE, setup), "canny/nct")[0].model
    (model,) = (need for need in nct.needs.values() if need.run is not None)
    train, tried, started = models.train, [], threading.Event()

    def slow(run, *more):
        tried.append(run.out.name)
        started.set()
        time.sleep(0.3)  # the other one is at the door
        return train(run, *more)

    monkeypatch.setattr(models, "train", slow)
    first = threading.Thread(target=models.make, args=(model,))
    first.start()
    assert started.wait(60)
    models.make(model)
    first.join(60)
    assert tried == [model.name]
    assert models.finished(model)


def test_failed_cell_says_why_and_others_go_on(setup, tmp_path, monkeypatch):
    watch, original, train, tried = Watch(), setup.recipe, models.train, []
    monkeypatch.setattr(models, "train", lambda run, *more: tried.append(run.out.name) or train(run, *more))

    def broken(name: str):
        run = original(name)
        if name == "nano-diff-instruct":
            rate = replace(run.method.fake.optimiser, lr=1e38, warmup=1)
            return replace(run, method=models.replaced(run.method, "fake.optimiser", rate))
        return run

    bad = replace(setup, recipe=broken)
    asked = "canny/nct,canny/frozen-di,canny/jdm"
    data, failures = sit(TABLE, bad, tmp_path / "page", asked, watch=watch)
    assert [cell_of(data, row).state for row in ("nct", "frozen-di", "jdm")] == ["failed", "failed", "measured"]
    assert len(failures) == 2
    assert "not finite at step" in failures[0]
    assert failures[1] == failures[0]
    assert tried == ["nano-diff-instruct-seed0", "nano-canny-canny-seed0"]  # what both need is not tried twice
    page = written(tmp_path / "page")
    assert f"- canny/nct failed: {failures[0]}" in page
    assert "| failed " in page
    later, none = sit(TABLE, bad, tmp_path / "page", run=False)
    assert none == []
    assert cell_of(later, "nct").reasons == (failures[0],)
    watch.taken.clear()
    _, failures = sit(TABLE, setup, tmp_path / "page", "canny/nct", watch=watch)
    assert "holds a run with another method.fake.optimiser.lr (1e+38, not 0.0005); move it away" in failures[0]
    assert watch.taken == {}


def test_course_has_the_mean_reward_between_probes(setup, tmp_path):
    model = replace(Model("m", "m"), run=replace(all_recipes()["nano-text-reward"](), out=tmp_path))
    rows = [{"step": 20, "reward": -3.0}, {"step": 40, "reward": -1.0, "probe/fd": 5.0, "probe/judge": -2.0},
            {"step": 60, "reward": -0.5}, {"step": 80, "fidelity": 1.0, "probe/fd": 4.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert course(model) == ({"step": 40, "reward": -2.0, "fd": 5.0, "judge": -2.0},
                             {"step": 80, "reward": -0.5, "fd": 4.0})
    assert course(Model("given", "given")) == ()
