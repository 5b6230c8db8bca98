"""`jdm evaluate` on pictures of one's own: the layout flags of training, and a reference that follows the captions."""

import json

import pytest
import torch
from PIL import Image

import tiny
from jdm.cli.parser import main
from jdm.data.sources import load_pictures
from jdm.evaluation import evaluate as evaluation
from jdm.evaluation.reference import references
from jdm.metrics.extractors import ClassifierFeatures
from jdm.run import Data
from photos import picture


@pytest.fixture
def place(tmp_path, monkeypatch):
    """test/ with 12 pictures, their captions in cp1252, masks beside them and maps in a folder."""
    monkeypatch.setattr(evaluation, "EffLite0", lambda *_, **__: ClassifierFeatures(tiny.judge()))  # a smaller one
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "d" / "test"
    folder.mkdir(parents=True)
    for i in range(12):
        Image.effect_noise((40, 40), 10 + 5 * i).convert("RGB").save(folder / f"{i:02}.jpg")
        (folder / f"{i:02}.txt").write_bytes(f"café {i}".encode("cp1252"))
        picture(folder / f"{i:02}_mask.png")
        picture(folder / "maps" / f"{i:02}.png", 0, size=(40, 40))
    (tmp_path / "d" / "train").symlink_to(folder)
    return tmp_path / "d"


@pytest.fixture
def evaluated(place, teacher, student, capsys):
    def run(*flags):
        out = place.parent / "out.json"
        code = main(["evaluate", str(student), "--control", "canny", "--teacher", str(teacher), "--n", "12", "--quick",
                     "--data.source", str(place), "--json", str(out), *flags])
        return code, capsys.readouterr().err, json.loads(out.read_text()) if out.exists() else {}

    return run


OWN = ("--data.pictures", "*.jpg", "--data.encoding", "cp1252")


def test_evaluate_reads_pictures_as_training_does(evaluated):
    code, said, row = evaluated()
    assert (code, row) == (2, {})
    assert "could both be meant; say which files are: --data.pictures" in said or "is not UTF-8 text" in said
    code, _, row = evaluated(*OWN)
    assert code == 0
    assert (row["n"], row["left_out"]) == (12, 24)
    code, _, black = evaluated(*OWN, "--data.controls", "maps")
    assert (code, black["left_out"]) == (0, 12)
    assert black["consistency_blank"] == 0  # these maps are black all over, and the picture's own edges are not
    assert row["consistency_blank"] > 0


def test_a_reference_follows_the_captions(teacher, place):
    extractor = ClassifierFeatures(tiny.judge())

    def found():
        pictures = load_pictures(str(place), "test", 32, Data(pictures="*.jpg", encoding="cp1252"))
        return references(str(teacher), [extractor], pictures, steps=2)[extractor.name].statistics.mean

    before = found()
    torch.testing.assert_close(found(), before)  # read back in float32
    for i in range(12):
        (place / "test" / f"{i:02}.txt").write_text("a coat")
    assert not torch.equal(found(), before)


@pytest.mark.parametrize(("flags", "said"), [
    (("--data.splits", "folder"), "did you mean folders?"), (("--data.unreadable", "2"), "must be a number in [0, 1]"),
    (("--data.table", "absent.csv"), "there is no absent.csv"),
    (("--prompts", "p.txt", "--scores", "clip", "--data.captions", "text"), "--prompts reads no pictures; leave out")])
def test_bad_layout_flags_are_one_line(flags, said, evaluated):
    code, complaint, row = evaluated(*flags)
    assert (code, row) == (2, {})
    assert said in complaint
    assert len(complaint.strip().splitlines()) == 1


def test_maps_for_a_model_without_control(place, teacher, capsys):
    flags = ("--data.source", str(place), "--data.controls", "maps", "--n", "4", *OWN)
    assert main(["evaluate", str(teacher), *flags]) == 2
    assert "--data.controls maps gives control maps, and" in capsys.readouterr().err
