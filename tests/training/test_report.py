"""report.html of a run, and several runs on one page: all that a reader needs, in one file."""

import json
import re
from dataclasses import replace
from html import escape
from html.parser import HTMLParser

import pytest
from safetensors.torch import load_file

import tiny
from jdm.errors import UsageError
from jdm.recipes import find
from jdm.training.curves import GROUPS, KNOWN, curve_of, keys
from jdm.training.loop import train
from jdm.training.monitors import WINDOW
from jdm.training.report import compared, found, report
from tiny import same

pytestmark = pytest.mark.usefixtures("untrained_judge")


@pytest.fixture(scope="module")
def runs(teacher, tmp_path_factory):
    """Three finished runs: with previews, with another weight, and of another method."""
    import jdm.evaluation.evaluate

    place = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(jdm.evaluation.evaluate, "judge", tiny.judge)
        patched.setattr(jdm.evaluation.evaluate, "PROBE_SAMPLES", 8)
        first = tiny.run(find("nano-canny")(), place / "first", teacher, steps=4, preview_every=2, probe_every=2)
        condition = replace(first.method.condition, weight=3.0)
        second = replace(first, out=place / "second", method=replace(first.method, condition=condition),
                         preview_every=0, probe_every=0)
        for run in (first, second, tiny.run(find("nano-vae")(), place / "deep" / "third", teacher, steps=4)):
            train(run)
    return place


class Page(HTMLParser):
    """The words of a page by the tag they stand in, its tags, and what it would fetch."""

    def __init__(self, text: str):
        super().__init__()
        self.words, self.tags, self.fetched, self._open = {}, [], [], [""]
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._open.append(tag)
        self.fetched += [value for key, value in attrs if key in ("src", "href", "data")]

    def handle_data(self, data):
        if data.strip():
            self.words.setdefault(self._open[-1], []).append(data.strip())


def tables(text: str) -> dict[str, list[str]]:
    """Each table row's cells after the first, by the first."""
    rows = (re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", text, re.S))
    return {first: rest for first, *rest in (row for row in rows if row)}


def test_a_finished_runs_page_has_everything(runs):
    text = (runs / "first" / "report.html").read_text()
    page = Page(text)
    assert page.words["h1"] == ["Run first"]
    assert page.words["h2"] == ["Previews", *GROUPS, "Settings"]
    assert "4 of 4 steps logged" in text
    assert "refresh" not in text
    rows = [json.loads(line) for line in (runs / "first" / "metrics.jsonl").read_text().splitlines()]
    titles = re.findall(r"<text class=title[^>]*>([^<]*)<", text)
    assert titles == [escape(curve_of(key).name) for key in keys(rows)]
    assert text.count("training step") == text.count("<polyline") == len(titles)
    settings = tables(text)
    assert settings["method"] == ["JDM"]
    assert settings["method.condition.weight"] == ["1.0"]
    assert settings["preview_every"] == ["2"]
    assert settings["data: n"] == ["64"]
    assert "torch" in settings


def test_a_page_fetches_nothing(runs):
    for text in ((runs / "first" / "report.html").read_text(), compared([runs / "first", runs / "second"])):
        page = Page(text)
        assert page.fetched
        assert all(place.startswith("data:image/png;base64,") for place in page.fetched)
        assert not {"script", "link", "iframe", "object"} & set(page.tags)
        assert "http:" not in text
        assert "https:" not in text
        assert "url(" not in text


def test_a_run_in_progress_reloads_its_page(teacher, tmp_path):
    seen = []

    def look(done, _):
        seen.append((tmp_path / "report.html").read_text())

    train(tiny.run(find("nano-vae")(), tmp_path, teacher, steps=3), look)
    assert ['<meta http-equiv=refresh content="60">' in text for text in seen] == [True, True, False]
    assert ["2 of 3 steps" in text for text in seen] == [False, True, False]


def test_warnings_are_on_the_page(teacher, tmp_path):
    train(tiny.run(find("nano-vae")(), tmp_path, teacher, steps=1))
    rows = [{"step": k + 1, "spread_x": 1.0 if k < WINDOW else 0.1} for k in range(3 * WINDOW)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = report(tmp_path).read_text()
    assert text.count("the student collapses and ignores z") == 1
    assert re.search(r"<li>step \d+: the samples of a batch, of all its prompts, differ by 0.1", text)
    assert "collapses" in compared([tmp_path])


def test_names_are_text_on_the_page(teacher, tmp_path):
    out = tmp_path / "<b>&run"
    train(tiny.run(find("nano-vae")(), out, teacher, steps=1))
    (out / "metrics.jsonl").write_text('{"step": 1, "<script>x</script>": 1.0, "line\\nbreak": NaN}\n')
    text = report(out).read_text()
    assert "<script" not in text
    assert "Run &lt;b&gt;&amp;run" in text


def test_a_damaged_log_does_not_end_a_run(teacher, tmp_path, capsys):
    def damage(done, _):
        with (tmp_path / "damaged" / "metrics.jsonl").open("a") as file:
            file.write("mine\n")

    damaged, whole = (train(tiny.run(find("nano-vae")(), tmp_path / name, teacher, steps=3), told)
                      for name, told in (("damaged", damage), ("whole", None)))
    assert "warning: report.html is not up to date" in capsys.readouterr().err
    ours, theirs = (load_file(next(folder.rglob("*.safetensors"))) for folder in (damaged, whole))
    assert same(ours, theirs)


# Several runs


def test_compared_runs_show_what_differs(runs):
    text = compared([runs / "first", runs / "second"])
    found = tables(text)
    assert found["setting"] == ["first", "second"]
    assert found["method.condition.weight"] == ["1.0", "3.0"]
    assert found["preview_every"] == ["2", "0"]
    assert "method.fidelity.weight" not in found
    assert "out" not in found
    assert found["steps logged"] == ["4 of 4", "4 of 4"]
    last = [json.loads((runs / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in ("first", "second")]
    cells = found["Term fidelity (rms over components, model space)"]
    assert [float(cell) for cell in cells] == pytest.approx([row["fidelity"] for row in last], rel=1e-3)
    assert found["Prompt agreement (share of pictures, 0 to 1)"][1] == "-"
    chart = next(part for part in text.split("<figure>") if "Term fidelity</text>" in part)
    assert chart.count("<polyline") == 2
    assert {"first", "second"} <= set(re.findall(r"<text[^>]*>([^<]*)<", chart))
    assert text.count("<img") == 1


def test_runs_of_other_methods_are_compared(runs):
    text = compared([runs / "first", runs / "deep" / "third"])
    assert tables(text)["method"] == ["JDM", "Autoencoder"]
    assert tables(text)["method.condition"] == ["Condition", "-"]
    assert "KL of the latents" in text


def test_runs_of_one_name_are_told_apart(runs, tmp_path):
    for place in ("x/run", "y/run", "y/other"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "run.json").write_text('{"run": {"method": {}, "data": {}}}')
    seen = found([tmp_path / "x/run", tmp_path / "y/run", tmp_path / "y/other"])
    assert [one.name for one in seen] == ["x/run", "y/run", "y/other"]


def test_comparing_changes_no_runs_folder(runs):
    before = {file: file.stat().st_mtime_ns for file in runs.rglob("*")}
    compared([runs / "first", runs / "second"])
    assert {file: file.stat().st_mtime_ns for file in runs.rglob("*")} == before


@pytest.mark.parametrize(("names", "message"), [(["nowhere"], "nowhere holds no run"), (["."], "holds no run"),
                                                (["first", "first"], "is given twice")])
def test_what_is_no_run_is_named(names, message, runs):
    with pytest.raises(UsageError, match=message):
        compared([runs / name for name in names])


# Names


def test_every_logged_number_has_a_name_and_unit(runs):
    """The last pattern takes whatever a user's term logs: only terms' own names may fall to it."""
    rows = [json.loads(line) for name in ("first", "second", "deep/third")
            for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    fallen = {key for key in keys(rows) if curve_of(key).name == f"Term {key}"}
    assert fallen == {"fidelity", "condition"}
    assert curve_of("probe/mine").group == KNOWN["probe/(.+)"].group
    assert curve_of("my_own/loss").name == "Loss of phase my own"
