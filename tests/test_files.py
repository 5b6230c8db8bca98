"""The door through which JSON is read: the file and the key of whatever does not fit."""

import os
from dataclasses import dataclass
from typing import Required, TypedDict

import pytest

from jdm.errors import UsageError
from jdm.files import fitted, parsed, read_json, read_lines


class Shape(TypedDict, total=False):
    size: Required[int]
    names: list[str]


@dataclass
class Made:
    size: int
    sides: tuple[int, ...] = ()


def test_a_schema_keeps_what_it_does_not_know(tmp_path):
    (tmp_path / "a.json").write_text('{"size": 1, "more": [2]}')
    assert read_json(tmp_path / "a.json", Shape) == {"size": 1, "more": [2]}


def test_a_dataclass_is_made():
    assert parsed('{"size": 1, "sides": [2, 3], "more": 0}', "a.json", Made) == Made(1, (2, 3))


def test_a_missing_file_is_empty_or_named(tmp_path):
    assert read_json(tmp_path / "a.json", Shape) == {}
    assert read_lines(tmp_path / "a.jsonl", Shape) == []
    with pytest.raises(UsageError, match=r"a\.json: there is no such file; make it"):
        read_json(tmp_path / "a.json", Shape, "make it", needed=True)


@pytest.mark.parametrize(("text", "said"), [
    ('{"size": "1"}', "a.json: size: expected `int`, got `str`; mend it"),
    ('{"size": 1, "names": ["x", 2]}', r"a.json: names\[1\]: expected `str`, got `int`"),
    ("{}", "a.json: there is no `size`; mend it"), ("[]", "a.json: expected `object`, got `array`"),
    ("{", "a.json is not JSON .*; mend it"), ("[" * 100_000, "a.json is nested too deeply; mend it"),
    ('{"size": NaN}', "NaN is not a number in JSON"), ('{"size": "\\ud800"}', "surrogates not allowed"),
    ('{"size": 1' + "1" * 5000 + "}", "a.json is not JSON .*digits"),
])
@pytest.mark.hostile("json")
def test_what_does_not_fit_is_named(text, said, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UsageError, match=said):
        read_json(tmp_path / "a.json", Shape, "mend it")


def test_a_dictionary_names_its_key():
    with pytest.raises(UsageError, match=r"a\.json: b\.c: expected `int`, got `str`"):
        fitted({"b": {"c": "1"}}, dict[str, dict[str, int]], "a.json", "mend it")


@pytest.mark.hostile("json")
def test_what_is_no_text_file_is_named(tmp_path):
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")  # would be waited for
    for name in ("bytes", "folder", "pipe"):
        said = "cannot be read as text" if name == "bytes" else "it is not a file"
        with pytest.raises(UsageError, match=rf"{name}\.json.* {said}"):
            read_json(tmp_path / f"{name}.json")


def test_lines_are_read_up_to_a_torn_one(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"size": 1}\n{"size": NaN, "size": 2}\n{"siz')
    assert read_lines(tmp_path / "a.jsonl", Shape) == [{"size": 1}, {"size": 2}]
    (tmp_path / "a.jsonl").write_text('{"size": 1}\n[]\n')
    with pytest.raises(UsageError, match=r"a\.jsonl, line 2: expected `object`, got `array`; delete that line"):
        read_lines(tmp_path / "a.jsonl", Shape)
