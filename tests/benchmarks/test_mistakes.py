"""Every mistake of `benchmarks/mistakes.py` can still be made in one place, and its test is still there."""

from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_each_mistake_has_its_place_and_test(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from mistakes import MISTAKES, table

    for each in MISTAKES:
        assert (ROOT / "src" / "jdm" / each.file).read_text().count(each.before) == 1, each.what
        file, _, name = each.test.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), each.test
        assert f"| {each.what} | `{name}` |" in table()
