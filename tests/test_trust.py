"""Code that a file of data names does not run; code that a person names does."""

import json
import shutil
from dataclasses import replace

import pytest
from PIL import Image

import tiny
from jdm import trust
from jdm.cli import main
from jdm.controls import load_control
from jdm.errors import UsageError
from jdm.export.writers import export
from jdm.library import load_model
from jdm.rewards import load_reward
from jdm.run import described
from tiny import nano_canny, nano_text_reward

CONTROL = """from pathlib import Path
from jdm.controls import Canny
Path(__file__).with_name("RAN").touch()
class Mine(Canny): pass
def taste(images, prompts): return images.mean((1, 2, 3))
"""


@pytest.fixture(autouse=True)
def fresh():
    """No test trusts what another one did."""
    trust.start([])
    yield
    trust.start([])


@pytest.fixture
def theirs(student, tmp_path):
    """A model whose card names a file in its own folder, and a picture beside it."""
    folder = tmp_path / "theirs"
    shutil.copytree(student, folder)
    card = json.loads((folder / "jdm.json").read_text())
    (folder / "jdm.json").write_text(json.dumps({**card, "control": f"{folder / 'x.py'}:Mine"}))
    (folder / "x.py").write_text(CONTROL)
    Image.new("RGB", (40, 40), "red").save(tmp_path / "photo.png")
    return folder


def run_json(folder, run):
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"run": described(run)}, default=str))
    return folder / "run.json"


def sampled(theirs, *more):
    return main(["sample", str(theirs), "--prompt", "x", "--n", "1", "--image", str(theirs.parent / "photo.png"),
                 "--out", str(theirs.parent / "out"), *more])


@pytest.mark.hostile("code")
def test_a_models_card_runs_no_code(theirs, capsys):
    assert sampled(theirs) == 2
    said = capsys.readouterr().err
    assert f"jdm.json names code, {theirs / 'x.py'}" in said
    assert "--control" in said
    assert "--trust-code" in said
    assert not (theirs / "RAN").exists()


def test_a_typed_control_runs(theirs):
    assert sampled(theirs, "--control", f"{theirs / 'x.py'}:Mine") == 0
    assert (theirs / "RAN").exists()


def test_trust_code_shows_the_path_first(theirs, capsys):
    assert sampled(theirs, "--trust-code") == 0
    assert f"running {theirs / 'x.py'}, which {theirs / 'jdm.json'} names" in capsys.readouterr().err
    assert (theirs / "RAN").exists()


@pytest.mark.parametrize("field", ["control", "reward"])
@pytest.mark.parametrize("command", ["train", "estimate", "prepare"])
@pytest.mark.hostile("code")
def test_a_run_json_runs_no_code(command, field, teacher, tmp_path, capsys):
    (tmp_path / "x.py").write_text(CONTROL)
    run = tiny.run(nano_canny() if field == "control" else nano_text_reward(), tmp_path / "new", teacher)
    method = run.method
    if field == "control":
        method = replace(method, control=f"{tmp_path / 'x.py'}:Mine")
    else:
        method = replace(method, reward=replace(method.reward, model=f"{tmp_path / 'x.py'}:taste"))
    file = run_json(tmp_path / "run", replace(run, method=method))
    code = main([command, str(file), *(["--out", str(tmp_path / "prepared")] if command == "prepare" else [])])
    said = capsys.readouterr().err
    assert not (tmp_path / "RAN").exists()
    if command != "prepare" or code:  # what is prepared needs neither
        assert code == 2
        assert f"run.json names code, {tmp_path / 'x.py'}" in said


@pytest.mark.hostile("code")
def test_another_control_takes_a_run_jsons_place(teacher, tmp_path):
    (tmp_path / "x.py").write_text(CONTROL)
    run = tiny.run(nano_canny(), tmp_path / "new", teacher, steps=1)
    file = run_json(tmp_path / "run", replace(run, method=replace(run.method, control=f"{tmp_path / 'x.py'}:Mine")))
    assert main(["estimate", str(file), "--method.control", "canny", "--gpu", "h100"]) == 0
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize("spec", ["x.py:Mine", "this:s", "antigravity:fly", "jdm.cli.parser:main", "./x.py:Mine"])
@pytest.mark.hostile("code")
def test_a_card_read_in_python_names_no_code(spec, theirs, monkeypatch):
    monkeypatch.chdir(theirs)
    card = json.loads((theirs / "jdm.json").read_text())
    (theirs / "jdm.json").write_text(json.dumps({**card, "control": spec}))
    for load in (load_control, load_reward):
        with pytest.raises(UsageError, match="names code"):
            load((load_model(str(theirs)).card or {})["control"])
    assert not (theirs / "RAN").exists()


def test_a_control_by_name_needs_no_trust(student):
    assert load_control((load_model(str(student)).card or {})["control"]).name == "canny"


def test_ones_own_python_code_needs_no_trust(tmp_path):
    (tmp_path / "x.py").write_text(CONTROL)
    assert type(load_control(f"{tmp_path / 'x.py'}:Mine")).__name__ == "Mine"


@pytest.mark.parametrize("words", [["--control=a.py:X"], ["--scores", "clip,a.py:X"], ["a.py"], ["a.py:X"]])
def test_arguments_name_code_in_many_forms(words):
    trust.start(words)
    trust.note_data({"deep": [{"control": "a.py:X"}]}, "theirs/run.json")
    trust.refuse_data("a.py")
    trust.note_data("b.py:X", "theirs/run.json")
    with pytest.raises(UsageError, match=r"theirs/run\.json names code, .*b\.py"):
        trust.refuse_data("b.py")


@pytest.mark.parametrize("words", [["theirs", "--prompt", "x"], ["theirs", "out"], ["--model", "theirs"],
                                   ["--model=theirs"], ["x", "--also", "theirs"], ["x", "--prompt", "a boot,theirs"]])
@pytest.mark.hostile("code")
def test_a_folders_name_trusts_no_package(words):
    trust.start(words)
    trust.note_data({"control": "theirs:Mine"}, "theirs/jdm.json")
    with pytest.raises(UsageError, match=r"theirs/jdm\.json names code, the module theirs"):
        trust.refuse_data("theirs")


@pytest.mark.hostile("code")
def test_a_model_that_is_a_package(theirs, monkeypatch, capsys):
    """Python imports from the working folder, as under `python -m jdm`."""
    monkeypatch.chdir(theirs.parent)
    monkeypatch.syspath_prepend(str(theirs.parent))
    (theirs / "x.py").rename(theirs / "__init__.py")
    card = json.loads((theirs / "jdm.json").read_text())
    (theirs / "jdm.json").write_text(json.dumps({**card, "control": "theirs:Mine"}))
    assert main(["sample", "theirs", "--prompt", "x", "--n", "1", "--image", "photo.png", "--out", "out"]) == 2
    assert "jdm.json names code, the module theirs, which is not run" in capsys.readouterr().err
    assert not (theirs / "RAN").exists()


@pytest.mark.parametrize("target", ["secret", ".", "missing"])
@pytest.mark.hostile("pickle")
def test_an_export_follows_no_link_out(target, student, tmp_path):
    shutil.copytree(student, tmp_path / "m")
    (tmp_path / "secret").write_text("token")
    (tmp_path / "m" / "vae" / "notes.txt").symlink_to(tmp_path / target)
    with pytest.raises(UsageError, match=r"notes\.txt leads to .*put the file itself there"):
        export(tmp_path / "m", tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_an_export_follows_links_within_the_hub_cache(student, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1f", tmp_path / "models--a--b" / "blobs"
    shutil.copytree(student, snapshot)
    blobs.mkdir()
    (snapshot / "jdm.json").rename(blobs / "5d")
    (snapshot / "jdm.json").symlink_to("../../blobs/5d")
    assert (export(snapshot, tmp_path / "e") / "jdm.json").read_bytes() == (blobs / "5d").read_bytes()


@pytest.mark.hostile("code")
def test_a_readme_quotes_what_files_say(student, tmp_path):
    shutil.copytree(student, tmp_path / "m")
    code = 'x"\nimport os\nos.system("true")  # '
    run = {**described(nano_canny()), "model": code}
    (tmp_path / "m" / "run.json").write_text(json.dumps({"run": run, "versions": {"torch": code}}))
    for format in ("diffusers", "controlnet"):
        text = (export(tmp_path / "m", tmp_path / format, format=format) / "README.md").read_text()
        assert not [line for line in text.splitlines() if line.startswith(("import os", "os.system"))]
