"""The hub that cannot be asked: one quick try, one line that says so, and what was fetched before is still read."""

import socket
import time

import huggingface_hub
import pytest
from huggingface_hub import constants

from jdm.data.sources import load_pictures
from jdm.errors import UsageError
from jdm.library import load_model, tiny_decoder
from jdm.models import hub


@pytest.fixture(autouse=True)
def dead(monkeypatch, tmp_path):
    """A hub at a port where nobody answers, asked anew in each test."""
    with socket.socket() as spare:
        spare.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{spare.getsockname()[1]}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    hub.unreachable.cache_clear()
    yield
    hub.unreachable.cache_clear()


@pytest.mark.parametrize("asked", [load_model, lambda name: tiny_decoder(name, load_model("nano-sd")),
                                   lambda name: load_pictures(name, "train", 32)])
@pytest.mark.hostile("endless")
def test_a_dead_network_is_named_at_once(asked, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    began = time.monotonic()
    with pytest.raises(UsageError, match=r"owner/name is not a folder here, and \S+ could not be reached .*check the "
                                         "network"):
        asked("owner/name")
    assert time.monotonic() - began < hub.TIMEOUT + 10


@pytest.mark.hostile("endless")
def test_the_offline_switch_is_named(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="owner/name is not a folder here, and HF_HUB_OFFLINE is set: unset it"):
        load_model("owner/name")


def test_a_fetched_file_is_read_without_network(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(tmp_path / file))
    assert hub.fetched("owner/name", "model_index.json") == tmp_path / "model_index.json"


def test_a_file_is_not_asked_of_the_hub(monkeypatch, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "photo.png").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(UsageError, match=r"a/photo\.png is a file and no \.safetensors checkpoint"):
        load_model("a/photo.png")
