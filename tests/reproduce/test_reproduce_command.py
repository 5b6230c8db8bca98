"""`jdm reproduce` as its users call it: what it prints and writes, and the lines it refuses with."""

import json
from dataclasses import replace

import numpy as np
import pytest

import reproducing
from jdm.cli.parser import main
from jdm.reproduce import setups
from jdm.reproduce.figures import LABEL
from jdm.reproduce.tables import TABLES


@pytest.fixture
def tiny_setup(teacher, tmp_path, monkeypatch):
    return reproducing.tiny_setup(teacher, tmp_path, monkeypatch)


def test_the_command_prints_and_writes_its_table(tiny_setup, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(setups.SETUPS, "nano", tiny_setup)
    flags = ["--out", str(tmp_path / "out"), "--page", str(tmp_path / "page"), "--quick", "--n", "8"]
    assert main(["reproduce", "table1", "--cells", "canny/jdm", *flags]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("of 1 row with canny: best consistency JDM (")
    assert "[theirs: HED]" in printed
    assert "*published, SD1.5: NCT*" in printed
    assert "13.67 / 0.110" in printed
    files = sorted(p.name for p in (tmp_path / "page").iterdir())
    assert printed.splitlines()[-1] == str(tmp_path / "page" / files[1])
    data = json.loads((tmp_path / "page" / files[0]).read_text())
    assert data["command"] == f"jdm reproduce table1 --n 8 --out {tmp_path / 'out'} --page {tmp_path / 'page'} --quick"
    page = (tmp_path / "page" / files[1]).read_text()
    assert f"`{data['command']} --cells canny/nct,soft-edge/nct,silhouette/nct,lowres/nct`" in page
    assert files[1] == f"{data['date']}-table1-n8-quick.md"  # a trial, which does not replace the table's page


def test_no_run_writes_what_is_there(tiny_setup, tmp_path, monkeypatch):
    monkeypatch.setitem(setups.SETUPS, "nano", tiny_setup)
    flags = ["--out", str(tmp_path / "out"), "--page", str(tmp_path / "page"), "--quick", "--n", "8"]
    assert main(["reproduce", "table1", "--cells", "canny/jdm", "--no-run", *flags]) == 0
    data = json.loads(next((tmp_path / "page").glob("*.json")).read_text())
    assert {cell["state"] for row in data["rows"] for cell in row["cells"].values()} == {"not measured", "left out"}
    assert not list((tmp_path / "out").iterdir())


def test_the_figure_has_a_row_for_each_model(tiny_setup, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setitem(setups.SETUPS, "nano", tiny_setup)
    flags = ["--out", str(tmp_path / "out"), "--page", str(tmp_path / "page"), "--quick", "--n", "8"]
    assert main(["reproduce", "fig3", "--cells", "dsm-teacher", *flags]) == 0
    (file,) = (tmp_path / "page").glob("*.png")
    rows = 2 + len(TABLES["fig3"].rows)  # pictures and controls first
    image = np.asarray(Image.open(file))
    assert image.shape[0] == rows * (image.shape[0] // rows)
    height = image.shape[0] // rows
    drawn = [bool((image[k * height : (k + 1) * height, LABEL:] != 255).any()) for k in range(rows)]
    assert drawn == [True, True, *(row.key == "dsm-teacher" for row in TABLES["fig3"].rows)]
    data = json.loads(next((tmp_path / "page").glob("*.json")).read_text())
    assert data["picture"] == file.name
    assert f"({file.name})" in next((tmp_path / "page").glob("*.md")).read_text()


def test_text_rows_use_the_weak_teacher_and_judge(tiny_setup, tmp_path, monkeypatch, capsys):
    import tiny
    from jdm.evaluation import evaluate as evaluation
    from jdm.rewards import PromptClassifier

    monkeypatch.setitem(setups.SETUPS, "nano", tiny_setup)
    monkeypatch.setattr(evaluation, "second_judge", lambda: PromptClassifier(tiny.judge(), judge=True))
    flags = ["--out", str(tmp_path / "out"), "--page", str(tmp_path / "page"), "--quick", "--n", "8"]
    assert main(["reproduce", "table3", "--cells", "guided", *flags]) == 0
    assert "of one-step students: best prompt agreement JDM + better CFG" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "nano-text-guided-seed0" / "run.json").read_text())["run"]
    assert record["model"] == str(tmp_path / "out" / "nano-weak-teacher-seed0" / "model")
    data = json.loads(next((tmp_path / "page").glob("*.json")).read_text())
    (measured,) = [r["measured"] for row in data["rows"] for r in row["cells"]["text"]["records"]]
    assert measured["judge"] < 0
    assert measured["judge_accuracy"] == measured["prompt_agreement"]  # here one network is both
    page = next((tmp_path / "page").glob("*.md")).read_text()
    assert "| JDM with better CFG | SD1.5    | no  | 1     | 30.56 " in page


def test_a_failed_cell_exits_3_with_a_page(tiny_setup, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(setups.SETUPS, "nano", replace(tiny_setup, split="test[:4]"))
    flags = ["--out", str(tmp_path / "out"), "--page", str(tmp_path / "page"), "--quick", "--n", "8"]
    assert main(["reproduce", "table3", "--cells", "base", *flags]) == 3
    said = capsys.readouterr()
    assert "jdm: 1 cell failed, the first with: n must be in 2..4" in said.err
    assert "| base: the full teacher, 25 steps                       | failed " in said.out
    assert "n must be in 2..4" in next((tmp_path / "page").glob("*.md")).read_text()


@pytest.mark.parametrize(("arguments", "said"), [
    ("tabel1", "there is no 'tabel1'; did you mean table1?"),
    ("table1 --scale sd51", "there is no 'sd51'; did you mean sd15?"),
    ("table1 --cells canny/jdm-jont", "names no cell of this table; did you mean canny/jdm-joint?"),
    ("table1 --dryrun", "there is no flag --dryrun; did you mean --dry-run?"),
    ("table1 --scale sd15", "torch-fidelity (pip install 'jdm[fid]')"),
    ("table1 --scale sd15", "missing are the weights of stable-diffusion-v1-5/stable-diffusion-v1-5 (fetch them with"),
    ("table3 --scale sd15", "diffusion-2-1-base`, or give a folder or a .safetensors file with --guide)"),
    ("table3 --scale sd15", "(`hf download xswu/HPSv2 HPS_v2.1_compressed.pt`, or --scores hpsv2:FOLDER)"),
    ("table1 --model nowhere", "missing are the weights of nowhere"),
])
def test_unknown_words_and_missing_weights_are_named(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *arguments.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert list(tmp_path.iterdir()) == []
