"""Packages of npm: where they come from, and which are refused."""

import io

import pytest

from jdm.data.npm import Package, fetched, members
from jdm.errors import UsageError
from registries import pinned, registry, tarball

PACKAGE = Package("some-names", "1.2.3", "")


@pytest.fixture(autouse=True)
def configured_registry(monkeypatch):
    monkeypatch.setenv("npm_config_registry", "https://mirror.example/npm/")


def test_package_comes_from_configured_registry_and_stays(tmp_path):
    package, get = pinned(PACKAGE, b"data"), registry(**{PACKAGE.name: b"data"})
    assert fetched(package, tmp_path, get) == b"data"
    assert get.asked == [f"https://mirror.example/npm/{PACKAGE.name}/1.2.3", f"https://files.example/{PACKAGE.name}.tgz"]
    assert fetched(package, tmp_path, lambda url: pytest.fail("asked again")) == b"data"


def test_tampered_package_is_refused_and_not_kept(tmp_path):
    package = pinned(PACKAGE, b"data")
    with pytest.raises(UsageError, match=r"SHA-512 is not that of some-names@1\.2\.3"):
        fetched(package, tmp_path, registry(**{PACKAGE.name: b"other"}))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / package.file).write_bytes(b"half")
    with pytest.raises(UsageError, match=r"some-names-1\.2\.3\.tgz: its SHA-512"):
        fetched(package, tmp_path)


@pytest.mark.parametrize("answer", [OSError("no route"), b"<html>", b"{}", b'{"dist": {"tarball": "file:///etc/hosts"}}'])
def test_unreachable_registry_is_named_with_remedy(tmp_path, answer, monkeypatch):
    def opened(url, timeout):
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer)

    monkeypatch.setattr("urllib.request.urlopen", opened)
    with pytest.raises(UsageError, match=r"mirror\.example/npm .*set npm_config_registry .* or put .*\.tgz"):
        fetched(PACKAGE, tmp_path)


def test_members_are_chosen_by_their_end():
    data = tarball({"en/data.json": b"1", "de/data.json": b"2", "a.webp": b"3"})
    assert members(data, "/en/data.json", ".webp") == {"en/data.json": b"1", "a.webp": b"3"}
