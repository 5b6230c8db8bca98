"""Folders and shards as people have them: what is read, and what is left out by which rule."""

import json
import os

import pytest
import torch

from jdm.data.sources import load_pictures
from jdm.data.tree import Choice
from jdm.errors import UsageError
from jdm.run import Data
from photos import captions_of, encoded, folder_of, picture, shard


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def read(source, split="train", **how):
    return load_pictures(str(source), split, 16, Data(**how), needed=False)


def left(pictures) -> dict[str, int]:
    return {rule: entry.count for rule, entry in pictures.report.left_out.items()}


def table(folder, rows, name="metadata.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


# Text in other encodings


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl", "tar"])
def test_byte_order_marks_are_followed(encoding, kind, tmp_path):
    text, source = "rote Stiefel, größer 红色", tmp_path / "d"
    folder_of(source, 1, captions=False)
    rows = {"csv": f'file_name,text\n0.png,"{text}"\n', "jsonl": json.dumps({"file_name": "0.png", "text": text})}
    if kind == "tar":
        source = shard(tmp_path / "a.tar", [("0.jpg", encoded()), ("0.txt", text.encode(encoding))])
    else:
        (source / f"0.{kind}").write_bytes(rows.get(kind, text).encode(encoding))
    assert captions_of(read(source)) == [text]


@pytest.mark.parametrize(("encoding", "text"), [("cp1252", "café"), ("gbk", "红色靴子"), ("utf-16-le", "red boot")])
def test_a_stated_encoding_is_read(encoding, text, tmp_path):
    (folder_of(tmp_path, 1) / "0.txt").write_bytes(text.encode(encoding))
    with pytest.raises(UsageError, match=r"0\.txt .*--data\.encoding .*save it as UTF-8"):
        read(tmp_path)
    assert captions_of(read(tmp_path, encoding=encoding)) == [text]


# Cells and lines


def test_line_breaks_in_cells_are_kept(tmp_path):
    folder_of(tmp_path, 2, captions=False)
    (tmp_path / "metadata.csv").write_text('file_name,text\n0.png,"a, b\nand c"\n1.png,one\u2028two\n', newline="")
    assert captions_of(read(tmp_path)) == ["a, b\nand c", "one\u2028two"]


def test_a_separator_in_json_lines_ends_no_line(tmp_path):
    folder_of(tmp_path, 1, captions=False)
    (tmp_path / "a.jsonl").write_text(json.dumps({"file_name": "0.png", "text": "a\u2028b\x85c"}, ensure_ascii=False))
    assert captions_of(read(tmp_path)) == ["a\u2028b\x85c"]


@pytest.mark.parametrize("separator", [";", "\t"])
def test_other_separators_are_known_by_the_header(separator, tmp_path):
    folder_of(tmp_path, 1, captions=False)
    (tmp_path / "a.csv").write_text(f"file_name{separator}text\n0.png{separator}boot, red\n")
    assert captions_of(read(tmp_path)) == ["boot, red"]


@pytest.mark.parametrize("value", [["a boot", "one boot"], "['a boot', 'one boot']", '["a boot", "one boot"]'])
def test_a_list_is_several_captions(value, tmp_path):
    folder_of(tmp_path, 1, captions=False)
    table(tmp_path, [{"file_name": "0.png", "text": value}])
    drawn = read(tmp_path).prompts(torch.tensor([0, 0]), torch.tensor([0.1, 0.9]))
    assert drawn == ["a boot", "one boot"]


def test_rows_of_one_picture_are_all_kept(tmp_path):
    folder_of(tmp_path, 1, captions=False)
    table(tmp_path, [{"file_name": "0.png", "text": text} for text in ("a", "b", "a")])
    assert read(tmp_path).captions == (("a", "b"),)


def test_a_parquet_table_is_read(tmp_path):
    from datasets import Dataset

    folder_of(tmp_path, 2, captions=False)
    Dataset.from_dict({"file_name": ["0.png", "1.png"], "text": ["a", "b"]}).to_parquet(tmp_path / "metadata.parquet")
    assert captions_of(read(tmp_path)) == ["a", "b"]


def test_accents_may_be_written_in_two_ways(tmp_path):
    picture(tmp_path / "cafe\u0301.png")  # as macOS writes it
    table(tmp_path, [{"file_name": "caf\u00e9.png", "text": "a"}])
    assert captions_of(read(tmp_path)) == ["a"]


# Files


@pytest.mark.parametrize("ending", ["jfif", "gif", "JPG", "ppm", "tga", "jp2", "bmp"])
def test_pictures_of_every_ending_are_read(ending, tmp_path):
    picture(tmp_path / "0.png").rename(tmp_path / f"0.{ending}")
    (tmp_path / "0.txt").write_text("a boot")
    assert captions_of(read(tmp_path)) == ["a boot"]
    assert read(tmp_path).batch(torch.tensor([0])).unique().tolist() == [100]


def test_what_is_left_out_is_counted_and_named(tmp_path):
    folder_of(tmp_path, 2)
    (tmp_path / "._0.png").write_bytes(b"x")
    picture(tmp_path / ".ipynb_checkpoints" / "0-checkpoint.png")
    (tmp_path / "orphan.txt").write_text("a")
    (tmp_path / "photo.heic").write_bytes(b"x")
    (tmp_path / "README.md").write_text("a")
    os.symlink(tmp_path / "gone.png", tmp_path / "link.png")
    os.symlink(tmp_path, tmp_path / "again")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".jdm.lock").write_text("")
    found = read(tmp_path)
    assert captions_of(found) == ["caption 0", "caption 1"]
    assert left(found) == dict.fromkeys([
        "hidden files", "hidden folders", "texts that are no picture's caption", "links to nothing",
        "files of a picture format that is not read", "files that are neither picture, caption nor table",
        "links to a folder that they are in", "pipes, sockets and devices", "folders that a run of jdm writes"], 1)
    assert "1 left out, hidden files: ._0.png" in found.report.lines()
    assert found.report.summary()["left out"]["hidden files"] == {"count": 1, "first": ["._0.png"]}


def test_links_to_folders_are_followed(tmp_path):
    folder_of(tmp_path / "far", 2)
    (tmp_path / "d").mkdir()
    os.symlink(tmp_path / "far", tmp_path / "d" / "more")
    assert len(read(tmp_path / "d")) == 2


def test_names_that_are_no_utf8_are_read(tmp_path):
    folder_of(tmp_path, 1)
    for ending in (b"png", b"txt"):
        os.rename(os.fsencode(tmp_path / "0.") + ending, os.fsencode(tmp_path) + b"/caf\xe9." + ending)
    found = read(tmp_path)
    assert captions_of(found) == ["caption 0"]
    assert found.stamps(torch.tensor([0]))[0][0] == "caf\\xe9.png"
    assert found.batch(torch.tensor([0])).shape == (1, 3, 16, 16)


def test_a_table_lists_the_pictures(tmp_path):
    folder_of(tmp_path, 3)
    picture(tmp_path / "masks" / "0.png")
    table(tmp_path, [{"file_name": "./0.png", "text": "a"}, {"file_name": "9.png", "text": "b"}])
    found = read(tmp_path)
    assert captions_of(found) == ["a"]
    assert left(found)["pictures that metadata.jsonl does not list"] == 3
    assert left(found)["rows whose file is not there"] == 1


def test_flags_say_what_is_a_picture(tmp_path):
    for i in range(2):
        picture(tmp_path / f"{i}.jpg", 50)
        picture(tmp_path / f"{i}.png", 0)
        (tmp_path / f"{i}.caption").write_text(f"boot {i}")
    found = read(tmp_path, pictures="*.jpg", captions=".caption")
    assert captions_of(found) == ["boot 0", "boot 1"]
    assert found.batch(torch.arange(2)).unique().tolist() == [50]
    assert left(found)["pictures that --data.pictures *.jpg does not mean"] == 2


def test_brackets_in_a_path_are_brackets(tmp_path):
    assert len(read(folder_of(tmp_path / "a [1] {2}*"))) == 3
    place = tmp_path / "shards [1]"
    place.mkdir()
    for name in ("train-0.tar", "test-0.tar"):
        shard(place / name, [("0.jpg", encoded()), ("0.txt", b"a")])
    assert len(read(place)) == 1
    assert len(read(f"{place}/*.tar")) == 2
    assert len(read(f"{place}/train-0.tar")) == 1


# Splits


@pytest.mark.parametrize(("names", "sizes"), [
    (("train",), {"train": 18, "validation": 1, "test": 1}),
    (("training", "val"), {"train": 19, "validation": 20, "test": 1}),
    (("train", "dev", "test"), {"train": 20, "validation": 20, "test": 20})])
def test_folders_named_as_splits(names, sizes, tmp_path):
    for name in names:
        folder_of(tmp_path / name, 20)
    found = {split: read(tmp_path, split) for split in sizes}
    assert {split: len(part) for split, part in found.items()} == sizes
    places = [place for part in found.values() for place in part.files(torch.arange(len(part)))]
    assert len(set(places)) == sum(sizes.values())


def test_a_class_called_train_is_asked_about(tmp_path):
    for name in ("bus", "train"):
        folder_of(tmp_path / name, 4)
    with pytest.raises(UsageError, match=r"train are named as splits and bus not; say --data\.splits folders"):
        read(tmp_path)
    assert len(read(tmp_path, splits="folders")) == 4
    assert len(read(tmp_path, splits="held-out")) == 6


def test_of_few_pictures_none_is_held_out(tmp_path):
    found = read(folder_of(tmp_path, 7))
    assert len(found) == 7
    assert "of fewer than 8 pictures none is held out" in " ".join(found.report.lines())


# Control maps


@pytest.mark.parametrize(("place", "how"), [
    ("conditioning_images/{}.png", "conditioning_images"), ("{}_mask.png", "*_mask.png"),
    ("maps/{}.png", "maps/*.png")])
def test_maps_beside_pictures_are_read(place, how, tmp_path):
    for i in range(3):
        picture(tmp_path / f"{i}.jpg", 50)
        (tmp_path / f"{i}.txt").write_text(f"boot {i}")
        picture(tmp_path / place.format(i), 10 * i, mode="L")
    found = read(tmp_path, controls=how)
    assert captions_of(found) == ["boot 0", "boot 1", "boot 2"]
    assert found.maps(torch.tensor([2, 1])).flatten(1).float().mean(1).tolist() == [20, 10]
    (tmp_path / place.format(1)).unlink()
    again = read(tmp_path, controls=how)
    assert left(again)["pictures without a control map"] == 1
    assert len(again) == 2


def test_a_column_of_maps_is_read(tmp_path):
    for i in range(2):
        picture(tmp_path / f"{i}.png", 50)
        picture(tmp_path / "conditioning_images" / f"{i}.png", 10 * i)
    table(tmp_path, [{"file_name": f"{i}.png", "conditioning_image": f"conditioning_images/{i}.png", "text": "a"}
                     for i in range(2)])
    found = read(tmp_path, controls="conditioning_image")
    assert found.maps(torch.tensor([1])).unique().tolist() == [10]
    plain = read(tmp_path)
    assert len(plain) == 2
    assert plain.report.left_out["columns of metadata.jsonl that are not read"].first == ["conditioning_image"]


def test_a_map_of_other_proportions_is_unreadable(tmp_path):
    folder_of(tmp_path, 1)
    picture(tmp_path / "maps" / "0.png", size=(24, 24))
    found = read(tmp_path, controls="maps")
    with pytest.raises(UsageError, match=r"control map is 24 x 24 and its picture 40 x 24; give a map"):
        found.maps(torch.tensor([0]))


# Shards


def test_a_further_picture_is_not_trained_on(tmp_path):
    source = shard(tmp_path / "a.tar", [part for i in range(3) for part in (
        (f"{i}.jpg", encoded(200)), (f"{i}.txt", b"boot"), (f"{i}.canny.jpg", encoded(0)), (f"._{i}.jpg", b"x"))])
    found = read(source)
    assert found.batch(torch.arange(3)).float().mean() > 190
    said = "further pictures of a sample (.canny.jpg), which --data.controls reads as control maps"
    assert left(found) == {"hidden files": 3, said: 3}
    drawn = read(source, controls="canny.jpg")
    assert drawn.maps(torch.arange(3)).float().mean() < 10


def test_dots_in_names_part_samples(tmp_path):
    source = shard(tmp_path / "a.tar", [part for i in range(5) for part in (
        (f"shoe_v1.{i}.jpg", encoded(10 * i)), (f"shoe_v1.{i}.txt", f"boot {i}".encode()))])
    assert captions_of(read(source)) == [f"boot {i}" for i in range(5)]


def test_an_ending_says_which_is_the_picture(tmp_path):
    source = shard(tmp_path / "a.tar", [("0.jpg", encoded(50)), ("0.png", encoded(0, kind="PNG")), ("0.txt", b"a")])
    with pytest.raises(UsageError, match=r"0\.jpg and 0\.png could both be the picture; say which: --data\.pictures"):
        read(source)
    assert read(source, pictures="jpg").batch(torch.tensor([0])).float().mean() == pytest.approx(50, abs=1)  # JPEG


@pytest.mark.parametrize(("pattern", "name", "key"), [
    ("p???.png", "p007.png", "007"), ("p???.png", "p07.png", None), ("p???.png", "p007_mask.png", None),
    ("a/?.png", "a/1.png", "1"), ("?.png", "a/1.png", None), ("*_?.png", "a/b_1.png", "a/b_1"),
    ("*.png", "a/b.png", "a/b"), ("*.png", ".png", None), ("[*].png", "[a].png", "a")])
def test_a_pattern_means_whole_names(pattern, name, key):
    assert Choice(pattern, "--data.pictures", ()).key(name) == key
