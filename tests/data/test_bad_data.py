"""Bad pictures, captions, tables and shards: one clear line with what, bound and remedy, and nothing written."""

import json
import os
from dataclasses import replace

import pytest
import torch

from jdm.data.pictures import UnreadableError
from jdm.data.sources import load_pictures
from jdm.errors import UsageError
from jdm.run import Data
from photos import encoded, folder_of, picture, shard


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def refused(source, said, **how):
    """Loads a source, reads its first picture, and expects one line that matches."""
    with pytest.raises(UsageError, match=said) as caught:
        load_pictures(str(source), "train", 16, Data(**how)).batch(torch.tensor([0]))
    assert "\n" not in str(caught.value)


TABLES = {  # name -> (file, its bytes, what is said)
    "comma without quotes": ("a.csv", b"file_name,text\n0.png,boot, red\n", r"line 2: 3 cells, the header has 2; put"),
    "too few cells": ("a.csv", b"file_name,text,n\n0.png,boot\n", r"line 2: 2 cells, the header has 3"),
    "open quote": ("a.csv", b'file_name,text\n0.png,"boot\n', r"line 2: unexpected end of data; close each quote"),
    "text behind a quote": ("a.csv", b'file_name,text\n0.png,"red" boot\n', r"line 2: .* expected after .*close each"),
    "no header": ("a.csv", b"0.png,boot\n1.png,boot\n", r"needs the columns file_name and text, has 0\.png, boot"),
    "other columns": ("a.csv", b"file,words\n0.png,boot\n", r"needs the columns file_name and text.*--data\.pictures"),
    "two caption columns": ("a.csv", b"file_name,text,caption\n0.png,a,b\n", r"text and caption could both.*--data"),
    "one name twice": ("a.csv", b"file_name,text,text\n0.png,a,b\n", r"two columns named 'text'; rename one"),
    "no rows": ("a.csv", b"file_name,text\n", r"a\.csv has no rows; fill it"),
    "empty": ("a.csv", b"", r"needs the columns"),
    "nan": ("a.csv", b"file_name,text\n0.png,nan\n", r"line 2: the caption is 'nan', .*write the caption, or remove"),
    "None": ("a.csv", b"file_name,text\n0.png,None\n", r"the caption is 'None'"),
    "empty caption": ("a.csv", b"file_name,text\n0.png,\n", r"0\.png has no caption in .*a\.csv, line 2; write one"),
    "absolute path": ("a.csv", b"file_name,text\n/etc/0.png,a\n", r"/etc/0\.png is outside the table's folder; give"),
    "path out": ("a.csv", b"file_name,text\n../0.png,a\n", r"\.\./0\.png is outside the table's folder"),
    "drive": ("a.csv", b"file_name,text\nC:\\x\\0.png,a\n", r"C:.* is outside the table's folder"),
    "no file": ("a.csv", b"file_name,text\nimages/0.jpg,a\n", r"there is no images/0\.jpg, .*did you mean 0\.png\?"),
    "unnamed file": ("a.csv", b"file_name,text\n,a\n", r"line 2: names no file"),
    "cp1252": ("a.csv", "file_name,text\n0.png,café\n".encode("cp1252"), r"is not UTF-8 text .*--data\.encoding"),
    "null bytes": ("a.csv", b"file_name,text\n0.png,a\0b\n", r"holds null bytes"),
    "number": ("a.jsonl", b'{"file_name": "0.png", "text": 5}', r"line 1: a caption must be text or a list.*got 5"),
    "NaN": ("a.jsonl", b'{"file_name": "0.png", "text": NaN}', r"0\.png has no caption in .*line 1"),
    "no JSON": ("a.jsonl", b"{'file_name': '0.png'}", r"line 1 is not JSON .*; give one object a line"),
    "list of objects": ("a.jsonl", b'[{"file_name": "0.png"}]', r"line 1: expected `object`, got `array`"),
    "half a surrogate": ("a.jsonl", rb'{"file_name": "0.png", "text": "\ud83d"}', r"line 1 is not JSON .*surrogates"),
    "file is a number": ("a.jsonl", b'{"file_name": 0, "text": "a"}', r"line 1: names no file \('0'\)"),
    "no parquet": ("a.parquet", b"PAR1", r"a\.parquet is not a readable parquet file .*or give a CSV"),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.hostile("data")
def test_a_bad_table_is_refused(name, tmp_path):
    file, content, said = TABLES[name]
    folder_of(tmp_path, 1, captions=False)
    (tmp_path / file).write_bytes(content)
    refused(tmp_path, said)
    assert sorted(os.listdir(tmp_path)) == ["0.png", file]


FLAGS = {  # name -> (fields, what is said)
    "unknown encoding": ({"encoding": "klingon"}, r"--data\.encoding klingon is not a text encoding"),
    "no such table": ({"table": "b.csv"}, r"there is no b\.csv; give --data\.table a file's path"),
    "no such maps": ({"controls": "maps"}, r"--data\.controls maps matches neither a file nor a column; give a column"),
    "two stars": ({"pictures": "*/*.png"}, r"--data\.pictures \*/\*\.png: give a pattern with one \*"),
    "a path": ({"captions": "a/b"}, r"--data\.captions a/b: give a pattern with one \*"),
    "nothing meant": ({"pictures": "*.jpg"}, r"no pictures .*1 left out, pictures that --data\.pictures \*\.jpg"),
}


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.hostile("flags")
def test_a_bad_flag_is_refused(name, tmp_path):
    how, said = FLAGS[name]
    refused(folder_of(tmp_path, 1), said, **how)


def test_a_flag_of_layout_needs_own_data():
    with pytest.raises(UsageError, match=r"--data\.captions is for a source of your own"):
        load_pictures("fashion-mnist", "test", 32, Data(captions="text"))


JPEG = encoded()
SHARDS = {  # name -> (members, what is said)
    "no caption": ([("0.jpg", JPEG)], r"0\.jpg has no caption; put 0\.txt beside it"),
    "twice": ([("0.jpg", JPEG), ("0.jpg", JPEG), ("0.txt", b"a")], r"0\.jpg appears twice; write the shard again"),
    "captions apart": ([("0.jpg", JPEG), ("1.jpg", JPEG), ("0.txt", b"a"), ("1.txt", b"b")], r"next to it in"),
    "twice, apart": ([(f"{i}.{end}", data) for i in (0, 1, 0) for end, data in (("jpg", JPEG), ("txt", b"a"))],
                     r"a\.tar: 0 comes twice, or its files do not lie side by side"),
    "one or several": ([("0.jpg", JPEG), ("0.txt", b"a"), ("0.b.jpg", JPEG), ("0.b.txt", b"b")], r"or several"),
    "no JSON": ([("0.jpg", JPEG), ("0.json", b"{")], r"0\.json is not JSON"),
    "a list": ([("0.jpg", JPEG), ("0.json", b"[]")], r"0\.json is not a JSON object; write one"),
    "two keys": ([("0.jpg", JPEG), ("0.json", b'{"text": "a", "caption": "b"}')], r"text and caption could"),
    "gbk": ([("0.jpg", JPEG), ("0.txt", "红色靴子".encode("gbk"))], r"0\.txt is not UTF-8 text .*--data\.encoding"),
    "surrogate": ([("0.jpg", JPEG), ("0.json", rb'{"text": "\ud83d"}')], r"0\.json is not JSON .*surrogates"),
}


@pytest.mark.parametrize("name", SHARDS)
@pytest.mark.hostile("data")
def test_a_bad_shard_is_refused(name, tmp_path):
    members, said = SHARDS[name]
    refused(shard(tmp_path / "a.tar", members), said)


@pytest.mark.hostile("data")
def test_a_mask_with_its_picture_s_name(tmp_path):
    picture(folder_of(tmp_path, 1) / "0.jpg")
    refused(tmp_path, r"0\.jpg and 0\.png could both be meant; say which files are: --data\.pictures '\*\.jpg'")


# Pictures that cannot be read


def damaged(folder, *numbers):
    for number in numbers:
        file = folder / f"{number}.png"
        file.write_bytes(file.read_bytes()[:60])
    return folder


@pytest.mark.hostile("data")
def test_an_unreadable_picture_is_replaced_by_the_next(tmp_path):
    found = load_pictures(str(damaged(folder_of(tmp_path, 7), 2, 3)), "train", 16, Data(unreadable=0.3))
    rows, images, _ = found.sound(torch.tensor([1, 2, 3]))
    assert rows.tolist() == [1, 4, 4]
    assert images.flatten(1).float().mean(1).tolist() == [5, 20, 20]
    assert found.prompts(rows, torch.zeros(3)) == ["caption 1", "caption 4", "caption 4"]
    assert set(found.unread.found) == {2, 3}
    assert all("damaged or incomplete" in why or "not a picture" in why for why in found.unread.found.values())


@pytest.mark.hostile("data")
def test_more_unreadable_than_the_share_end_the_run(tmp_path):
    found = load_pictures(str(damaged(folder_of(tmp_path, 7), 2, 3)), "train", 16, Data(unreadable=0.1))
    with pytest.raises(UnreadableError, match=r"2 of 7 pictures cannot be read and 1 may be skipped; mend .*\(0\.1\)"):
        found.sound(torch.arange(7))


@pytest.mark.hostile("data")
def test_a_missing_file_is_not_skipped(tmp_path):
    found = load_pictures(str(folder_of(tmp_path, 7)), "train", 16)
    (tmp_path / "2.png").unlink()
    with pytest.raises(UsageError, match=r"2\.png: there is no such file") as caught:
        found.sound(torch.arange(7))
    assert not isinstance(caught.value, UnreadableError)


# A run that goes on


@pytest.mark.parametrize(("change", "said"), [
    (lambda place: (place / "5.txt").write_text("other"), "captions"),
    (lambda place: picture(place / "5.png", 99), "what they show"),
    (lambda place: (place / "6.png").unlink(), "their number")])
@pytest.mark.hostile("data")
def test_changed_data_is_refused_or_recorded(change, said, tmp_path, monkeypatch):
    from jdm.recipes import find
    from jdm.training.record import record

    place, out = folder_of(tmp_path / "d", 7), tmp_path / "run"
    run = replace(find("nano-vae")(), out=out, data=Data(source=str(place)))
    record(run, load_pictures(str(place), "train", 32), 0, None)
    before = json.loads((out / "run.json").read_text())["data"]
    change(place)
    now = load_pictures(str(place), "train", 32)
    with pytest.raises(UsageError, match=rf"changed since .* began: .*{said}.*--data\.changed"):
        record(run, now, 3, None)
    assert json.loads((out / "run.json").read_text())["data"] == before
    record(replace(run, data=replace(run.data, changed=True)), now, 3, None)
    after = json.loads((out / "run.json").read_text())
    assert after["before"] == [before]
    assert after["data"]["from step"] == 3
