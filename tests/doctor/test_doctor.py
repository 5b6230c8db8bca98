"""`jdm doctor DATA`: what it finds in a source, what it says to do, and how it ends."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from jdm.cli.parser import main
from photos import encoded, folder_of, of_three_shapes, picture, shard


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    monkeypatch.setenv("COLUMNS", "200")


def doctor(capsys, *words):
    """(exit code, standard output, its table as name -> cells)."""
    code = main(["doctor", *map(str, words)])
    text = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")]
    return code, text, {row[0]: row[1:] for row in rows}


def various(place, count=24):
    """`count` different pictures of 40 x 24 with captions."""
    place.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.effect_noise((40, 24), 10 + 5 * i).convert("RGB").save(place / f"{i:02}.png")
        (place / f"{i:02}.txt").write_text(f"caption {i}")
    return place


def test_sound_pictures_end_with_zero(tmp_path, capsys):
    code, text, rows = doctor(capsys, various(tmp_path / "d"), "--data.size", 16)
    assert code == 0
    assert rows["pictures"] == ["20", "2", "2"]
    assert rows["cannot be read"] == rows["the same as another"] == rows["of one colour"] == ["0", "0", "0"]
    assert rows["shorter side, pixels"] == ["24"] * 3
    assert rows["width : height"] == ["16:9 100%"] * 3
    assert "training would take this\ndoctor.html\n" in text


def test_every_refusal_is_found_at_once(tmp_path, capsys):
    place = various(tmp_path / "d")
    (place / "03.txt").write_bytes("café".encode("cp1252"))
    (place / "04.txt").write_bytes("naïf".encode("cp1252"))
    (place / "05.txt").unlink()
    picture(place / "06_mask.png")
    code, text, rows = doctor(capsys, place, "--data.size", 16)
    assert code == 1
    assert rows["without a caption"][0] == "2"
    assert "refused, 2 captions that cannot be read:" in text
    for name in ("03.txt is not UTF-8 text", "04.txt is not UTF-8 text", "05.png has no caption (nor have 1 more"):
        assert name in text
    assert "--data.pictures '*.jpg'" in text
    assert "training would refuse this" in text
    assert main(["train", "nano-vae", "--data.source", str(place), "--out", str(tmp_path / "run")]) == 2
    assert "03.txt is not UTF-8" in (said := capsys.readouterr().err)
    assert f"(and 2 more: jdm doctor {place} lists them)" in said


def test_every_bad_row_of_a_table_is_named(tmp_path, capsys):
    folder_of(tmp_path / "d", 4, captions=False)
    (tmp_path / "d" / "a.csv").write_text("file_name,text\n0.png,a, b\n1.png,nan\n../2.png,c\n3.png,boot\n")
    code, text, _ = doctor(capsys, tmp_path / "d", "--data.size", 16)
    assert code == 1
    assert "refused, 3 rows that cannot be read as they were meant:" in text
    for line in ("line 2: 3 cells, the header has 2", "line 3: the caption is 'nan'", "line 4: ../2.png is outside"):
        assert line in text


def test_every_bad_sample_of_a_shard_is_named(tmp_path, capsys):
    members = [(f"{i}.jpg", encoded()) for i in range(3)]
    source = shard(tmp_path / "a.tar", [*members[:2], ("2.txt", b"boot"), members[2], ("3.json", b"{"),
                                        ("3.jpg", encoded())])
    code, text, rows = doctor(capsys, source, "--data.size", 16)
    assert code == 1
    assert "refused, 3 samples" in text
    assert all(f"{name} has no caption" in text for name in ("0.jpg", "1.jpg"))
    assert "3.json is not JSON" in text
    assert rows["pictures"] == ["1", "0", "0"]


def test_damaged_doubled_and_plain_pictures_are_counted(tmp_path, capsys):
    place = various(tmp_path / "d", 40)
    file = place / "07.png"
    file.write_bytes(file.read_bytes()[:200])
    shutil.copy(place / "10.png", place / "11.png")
    shutil.copy(place / "10.png", place / "20.png")  # 00, 20: held out for validation
    picture(place / "12.png")
    code, text, rows = doctor(capsys, place, "--data.size", 16)
    assert code == 0
    assert rows["cannot be read"] == ["1", "0", "0"]
    assert rows["the same as another"] == ["1", "0", "0"]
    assert rows["of one colour"] == ["1", "0", "0"]
    assert "1 of 36 train pictures: " in text
    assert "07.png: damaged or incomplete" in text
    assert "training pictures too: 1 validation pictures, such as " in text
    assert "20.png, the same as " in text
    file.with_name("08.png").write_bytes(b"x" * 100)
    code, text, _ = doctor(capsys, place, "--data.size", 16, "--data.unreadable", 0.01)
    assert code == 1
    assert "2 of 36 pictures cannot be read and 1 may be skipped" in text


def test_crops_and_enlargements_are_remarked(tmp_path, capsys):
    place = various(tmp_path / "d", 7)
    code, text, rows = doctor(capsys, place, "--data.size", 64)
    assert code == 0
    assert "smaller than 64 x 64, so that they are enlarged and blurred: 7 of 7 train pictures" in text
    assert "lost to the crop to 64 x 64 (height x width): 7 of 7 train pictures, at most 40%" in text
    _, text, _ = doctor(capsys, place, "--data.size", 24, 40)
    assert "lost to the crop" not in text
    assert rows["pictures"] == ["7", "0", "0"]


def test_a_recipe_adds_its_teacher_and_control(tmp_path, teacher, capsys):
    place = various(tmp_path / "d", 7)
    (place / "02.txt").write_text("one of the longest captions that anybody has ever written for a picture " * 2)
    words = (place, "--recipe", "nano-canny", "--model", teacher)
    code, text, rows = doctor(capsys, *words)
    assert code == 0
    assert rows[f"captions too long for {teacher}"][0] == "1"
    assert "1 caption; of 'one of the longest captions that anybody" in text
    page = Path("doctor.html").read_text()
    assert "7 training pictures, as training sees them, with their control maps below" in page
    assert "caption 3 — 03.png" in page
    code, text, _ = doctor(capsys, *words, "--data.size", 30)
    assert code == 1
    assert "both sides of a picture must be multiples of 4, got 30 x 30" in text


def test_maps_of_ones_own_are_shown(tmp_path, capsys):
    place = various(tmp_path / "d", 9)
    for i in range(8):
        picture(place / "maps" / f"{i:02}.png", 10 * i, size=(24, 24) if i == 3 else (40, 24))
    code, text, rows = doctor(capsys, place, "--data.controls", "maps", "--data.size", 16, "--data.unreadable", 0.2)
    assert code == 0
    assert rows["pictures"] == ["6", "1", "1"]
    assert rows["cannot be read"] == ["1", "0", "0"]
    assert "1 left out, pictures without a control map: 08.png" in text
    assert "03.png: this control map is 24 x 24 and its picture 40 x 24" in text
    assert "with their control maps below" in Path("doctor.html").read_text()
    code, text, _ = doctor(capsys, place, "--data.controls", "maps", "--recipe", "nano-vae")
    assert code == 1
    assert "this run has no control" in text


def test_a_control_that_fails_is_refused(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("from jdm.controls import Control\nclass Mine(Control):\n"
                                      "    def h(self, images):\n        return images[:, :1] / 0\n")
    code, text, _ = doctor(capsys, various(tmp_path / "d", 7), "--control", f"{tmp_path / 'mine.py'}:Mine")
    assert code == 1
    assert "Mine.h must be finite" in text


def test_what_the_source_is_must_be_plain(tmp_path, capsys):
    place = various(tmp_path / "d", 7)
    picture(place / "03.jpg")
    code, text, _ = doctor(capsys, place)
    assert code == 1
    assert "refused, what the pictures are:" in text
    assert "03.jpg and 03.png could both be meant; say which files are: --data.pictures" in text


@pytest.mark.hostile("data")
def test_a_training_split_without_pictures(tmp_path, teacher, capsys):
    place = various(tmp_path / "d", 7)  # so few that none is held out
    words = ("--recipe", "nano-canny", "--model", teacher, "--data.split", "test[:64]")
    code, text, rows = doctor(capsys, place, *words)
    assert code == 1
    assert f"{place}, split test[:64]: no pictures; give a wider slice" in text
    assert rows["pictures"] == ["0", "0", "0"]


def test_misuse_of_the_doctor_ends_with_two(tmp_path, capsys):
    place = various(tmp_path / "d", 7)
    for words in (("absent",), (place, "--data.colour", "1"), (place, "--recipe", "nano-cany"),
                  (place, "--steps", "x")):
        assert main(["doctor", *map(str, words)]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    keep = tmp_path / "mine.html"
    keep.write_text("my notes")
    assert main(["doctor", str(place), "--out", str(keep)]) == 2
    assert keep.read_text() == "my notes"


def test_packaged_pictures_are_looked_at(capsys):
    code, _, rows = doctor(capsys, "fashion-mnist", "--data.split", "test[:64]", "--data.validation", "test[64:128]")
    assert code == 0
    assert rows["pictures"] == ["64", "64", "10,000"]
    assert rows["shorter side, pixels"] == ["28"] * 3


def test_buckets_are_counted_when_asked(tmp_path, capsys):
    place = of_three_shapes(tmp_path / "d")
    code, text, rows = doctor(capsys, place, "--data.size", 32, "--data.buckets", 8, "--batch", 4)
    assert code == 0
    buckets = {name: cells[0] for name, cells in rows.items() if name.startswith("bucket")}
    assert buckets == {"bucket 40 x 24": "4", "bucket 32 x 32": "11", "bucket 24 x 40": "3"}
    assert "fewer pictures than a batch of 4" in text
    assert "third of the area" not in text
    _, text, rows = doctor(capsys, place, "--data.size", 32)
    assert not any(name.startswith("bucket") for name in rows)
    assert "more than a third of the area is lost to the crop to 32 x 32" in text
    code, text, _ = doctor(capsys, place, "--data.size", 32, "--data.buckets", 5)
    assert code == 1
    assert "not made of multiples of --data.buckets 5" in text
