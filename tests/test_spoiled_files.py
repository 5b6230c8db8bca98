"""A fuzzer over the bytes of files: flipped bits, zeros, cuts and repeats are refused in one line, or do no harm."""

import io
import json
import shutil
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from hostile import hold, spoiled
from jdm.data.cache import Cache
from jdm.data.pictures import load_picture
from jdm.data.sources import load_pictures
from jdm.errors import UsageError
from jdm.library import load_model
from jdm.run import Data
from jdm.training import checkpoint
from photos import captions_of, encoded, folder_of, shard


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def tried(file, seed: int, count: int, read: Callable[[], str], names: tuple[str, ...] = ()):
    """Outcomes of reading a file after each harm; `read` returns what is wrong with what it read."""
    whole = file.read_bytes()
    for what, content in spoiled(whole, seed, count):
        file.write_bytes(content)
        try:
            fault = read()
        except UsageError as error:
            fault = "" if any(name in str(error) for name in (file.name, *names)) and "\n" not in str(error) \
                else str(error)
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        yield f"{file.name}, {what}", fault
    file.write_bytes(whole)
    assert not read()


def opened(read: Callable[[], object]) -> Callable[[], str]:
    """A reader that is content with whatever it read."""
    return lambda: "" if read() is not None else "nothing was read"


@pytest.mark.hostile("weights")
@pytest.mark.parametrize("part", ["unet", "vae", "controlnet", "text_encoder"])
def test_spoiled_weights_are_refused_or_finite(part, fuzz_seed, student, tmp_path, record_property):
    folder = tmp_path / "m"
    shutil.copytree(student, folder)
    (file,) = (folder / part).glob("*.safetensors")

    def read() -> str:
        model = load_model(str(folder))
        return "" if all(bool(p.isfinite().all()) for net in model.modules().values() for p in net.parameters()) else \
            "weights that are not finite are loaded"

    hold(tried(file, fuzz_seed, 8, read, (part,)), record_property)


@pytest.mark.hostile("checkpoints")
@pytest.mark.parametrize("name", [checkpoint.WHOLE, checkpoint.INFO])
def test_every_spoiled_byte_of_a_checkpoint_is_noticed(name, fuzz_seed, tmp_path, record_property):
    net = nn.Linear(16, 16)
    place = checkpoint.save(checkpoint.State({"net": net}, {}, {}, {}), tmp_path, 3)
    whole = (place / name).read_bytes()

    def outcomes():
        for what, content in spoiled(whole, fuzz_seed, 40):
            (place / name).write_bytes(content)
            taken = not checkpoint.damage_of(place)
            yield what, "it is taken for whole" if taken and meaning(content) != meaning(whole) else ""

    hold(outcomes(), record_property)


def meaning(content: bytes) -> object:
    """What JSON says, whatever its spaces; the bytes themselves of anything else."""
    try:
        return json.loads(content)
    except ValueError:
        return content


@pytest.mark.hostile("data")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_spoiled_pictures_are_refused_or_read(kind, fuzz_seed, tmp_path, record_property):
    file = tmp_path / f"a.{kind.lower()}"
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)).save(out, kind)
    file.write_bytes(out.getvalue())
    hold(tried(file, fuzz_seed, 20, opened(lambda: load_picture(file, 16))), record_property)


@pytest.mark.hostile("data")
def test_a_spoiled_shard_keeps_pictures_with_captions(fuzz_seed, tmp_path, record_property):
    names = ["a boot", "red coat", "one dress", "bag"]
    members = [part for i, name in enumerate(names) for part in ((f"{i}.png", encoded(50 * i, kind="PNG")),
                                                                 (f"{i}.txt", name.encode()))]
    file = tmp_path / "a.tar"
    shard(file, members)

    def read() -> str:
        found = load_pictures(str(file), "train", 16)
        shown = found.batch(torch.arange(len(found))).float().mean((1, 2, 3)).div(50).round().int().tolist()
        read_as = list(zip(captions_of(found), shown, strict=True))
        # A caption's own letters are not summed up by a tar file; whose caption it is must be right.
        mixed = [caption for caption, k in read_as if caption in names and names[k] != caption]
        return f"read as {read_as}" if mixed or len(read_as) != len(names) else ""

    hold(tried(file, fuzz_seed, 40, read), record_property)


TABLES = {"a.csv": 'file_name,text\n0.png,"a red, long boot"\n1.png,bag\n2.png,dress\n',
          "a.jsonl": '{"file_name": "0.png", "text": "boot"}\n{"file_name": "1.png", "text": ["bag", "a bag"]}\n'}


@pytest.mark.hostile("data")
@pytest.mark.parametrize("name", TABLES)
def test_spoiled_tables_are_refused_or_read(name, fuzz_seed, tmp_path, record_property):
    folder_of(tmp_path, 3, captions=False)
    (tmp_path / name).write_text(TABLES[name])
    read = opened(lambda: captions_of(load_pictures(str(tmp_path), "train", 16, Data())))
    hold(tried(tmp_path / name, fuzz_seed, 30, read, (str(tmp_path), ".png", "data.encoding")), record_property)


@pytest.mark.hostile("checkpoints")
def test_spoiled_arrays_of_a_preparation_are_named(fuzz_seed, tmp_path, record_property):
    part, data = tmp_path / "latents-00ff", {"n": 4}
    part.mkdir()
    np.save(part / "0.npy", np.ones((4, 8), np.float32))
    cache = Cache(tmp_path, {"recipe": "nano-canny", "data": data})
    outcomes = tried(part / "0.npy", fuzz_seed, 40, opened(lambda: cache._arrays(part.name, 4)), (part.name,))
    hold(outcomes, record_property)
    np.save(part / "0.npy", np.array([{"a": 1}] * 4, dtype=object))  # a pickle
    with pytest.raises(UsageError, match="latents-00ff is damaged"):
        cache._arrays(part.name, 4)
