"""Tar shards in WebDataset's layout, on a disk and in an object store."""

import io
import json
import os
import tarfile
from dataclasses import replace

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from jdm.data.sources import load_pictures
from jdm.errors import UsageError
from jdm.prepare import prepare
from jdm.training.trainer import Trainer
from tiny import cached, nano_diff_instruct


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def picture(i):
    return np.random.default_rng(i).integers(0, 255, (40, 48, 3), np.uint8)


def shard(names, start=0):
    """The bytes of a tar file: for each name a PNG and its caption, as .txt and .json in turn."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for i, name in enumerate(names, start):
            image = io.BytesIO()
            Image.fromarray(picture(i)).save(image, "PNG")
            said = (".txt", f"caption {i}\n") if i % 2 else (".json", json.dumps({"caption": f"caption {i}", "n": i}))
            parts = [(".orig.json", b"{}"), (".png", image.getvalue()), (said[0], said[1].encode())]
            if i == 38:  # a picture's name goes up to its first dot
                parts[1] = (".large.png", image.getvalue())
            if i == 39:  # both: the text counts
                parts.append((".json", b'{"caption": "another"}'))
            for suffix, data in parts[1:] if i else parts:
                member = tarfile.TarInfo(f"{name}{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture(params=["disk", "store"])
def place(request, tmp_path):
    """Where shards lie and how they are written there: a folder, or a store that only fsspec reads."""
    if request.param == "disk":
        yield str(tmp_path / "shards"), lambda name, data: (
            (tmp_path / "shards").mkdir(exist_ok=True), (tmp_path / "shards" / name).write_bytes(data))
        return
    store = fsspec.filesystem("memory")
    yield "memory://shards", lambda name, data: store.pipe(f"/shards/{name}", data)
    store.store.clear()


@pytest.fixture
def filled(place):
    """41 pictures in three shards, the second with a sample of which only the text came."""
    where, write = place
    write("00000.tar", shard([*(f"a/{i:04d}" for i in range(19)), "b/0018"]))  # beside a/0018: a sample of its own
    write("00001.tar", shard([f"a/{i:04d}.v2" for i in range(20, 40)], 20))
    write("00002.tar", shard(["z"], 40))
    return where, write


@pytest.mark.parametrize("pattern", ["*.tar", "{00000..00002}.tar"])
def test_every_picture_has_its_caption_and_its_pixels(filled, pattern):
    train = load_pictures(f"{filled[0]}/{pattern}", "train", 32)
    held_out, test = (load_pictures(f"{filled[0]}/{pattern}", split, (32, 40)) for split in ("validation", "test"))
    assert (len(train), len(held_out), len(test)) == (36, 3, 2)
    assert train.prompts(torch.tensor([0, 35]), torch.zeros(2)) == ["caption 2", "caption 39"]
    assert held_out.prompts(torch.arange(3), torch.zeros(3)) == ["caption 0", "caption 20", "caption 40"]
    assert test.batch(torch.tensor([1, 0])).shape == (2, 3, 32, 40)
    whole = load_pictures(f"{filled[0]}/{pattern}", "train", (40, 48)).batch(torch.tensor([35, 0, 17]))
    for got, i in zip(whole, (39, 2, 19), strict=True):
        assert torch.equal(got, torch.from_numpy(picture(i)).permute(2, 0, 1))


def test_the_index_is_kept_until_a_shard_changes(filled, monkeypatch):
    where, write = filled
    load_pictures(f"{where}/*.tar", "train", 32)
    opened = []
    store = type(fsspec.core.url_to_fs(where)[0])
    original = store.open
    monkeypatch.setattr(store, "open", lambda self, path, *more, **named: opened.append(path) or
                        original(self, path, *more, **named))
    again = load_pictures(f"{where}/*.tar", "train", 32)
    assert not [path for path in opened if path.endswith(".tar")]
    assert len(again) == 36
    write("00002.tar", shard(["z", "y"], 40))
    assert len(load_pictures(f"{where}/*.tar", "test", 32)) == 3


def test_what_cannot_be_read_is_named(place):
    where, write = place
    with pytest.raises(UsageError, match=r"no\.tar: (no shards could be listed|not a whole tar file).*FileNotFound"):
        load_pictures(f"{where}/no.tar", "train", 32)
    whole = shard(["a", "b", "c"])
    for k, end in enumerate(("b.png", "c.png", "c.json")):
        for length in (100, 513):  # inside its header, inside its data
            write(f"cut{k}-{length}.tar", whole[: whole.index(end.encode()) + length])
            with pytest.raises(UsageError, match=rf"cut{k}-{length}\.tar: not a whole tar file .*; fetch it again"):
                load_pictures(f"{where}/cut{k}-{length}.tar", "train", 32)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        member = tarfile.TarInfo("x/7.jpg")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"\0" * 4))
    write("mute.tar", out.getvalue())
    with pytest.raises(UsageError, match=r"mute\.tar: x/7\.jpg has no caption; put 7\.txt beside it, or a 7\.json"):
        load_pictures(f"{where}/mute.tar", "train", 32)
    broken = shard(["a"] * 1)
    at = broken.index(b"IDAT")
    write("broken.tar", broken[: at + 500] + b"\0" * 2000 + broken[at + 2500 :])
    pictures = load_pictures(f"{where}/broken.tar", "train", 32)
    with pytest.raises(UsageError, match=r"broken\.tar:a\.png: damaged or incomplete"):
        pictures.batch(torch.tensor([0]))
    with pytest.raises(UsageError, match=r"s4://x/\*\.tar: no shards could be listed \(ValueError: Protocol not known"):
        load_pictures("s4://x/*.tar", "train", 32)


WHOLE = shard(["a", "b", "c"])
HEADERS = [WHOLE.index(name) for name in (b"a.orig.json", b"b.png", b"c.json")]
END = len(WHOLE.rstrip(b"\0")) // 512 * 512 + 512
DAMAGED = {
    **{f"bit {k} of header {i}": lambda at=at, k=k: WHOLE[: at + k] + bytes([WHOLE[at + k] ^ 4]) + WHOLE[at + k + 1:]
       for i, at in enumerate(HEADERS) for k in (0, 99, 107, 130, 150, 156, 260, 400, 511)},
    "zeroed header": lambda: WHOLE[: HEADERS[1]] + b"\0" * 512 + WHOLE[HEADERS[1] + 512:],
    "zeroed middle": lambda: WHOLE[: HEADERS[1]] + b"\0" * (HEADERS[2] - HEADERS[1]) + WHOLE[HEADERS[2]:],
    "two joined": lambda: WHOLE + WHOLE,
    "cut between two files": lambda: WHOLE[: HEADERS[2]],
    "no end mark": lambda: WHOLE[:END],
    "rubbish after the end": lambda: WHOLE + b"x" * 512,
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.hostile("data")
def test_a_damaged_shard_never_loses_pictures_silently(damage, tmp_path):
    (tmp_path / "a.tar").write_bytes(DAMAGED[damage]())
    with pytest.raises(UsageError, match=r"a\.tar: not a whole tar file .*; fetch it again"):
        load_pictures(str(tmp_path / "a.tar"), "validation", 32)


@pytest.mark.parametrize(("name", "said"), [
    ("x{000000000..999999999}", r"1,000,000,000 shards, at most 100,000 can be listed; narrow the ranges"),
    ("x{0..99999}{0..99999}", "10,000,000,000 shards"), ("x{9..0}", "from the lower number to the higher"),
    ("x{0..99999999999999999999}", "no shards could be listed"), ("fifo", "is not a regular file")])
@pytest.mark.hostile("endless")
def test_ranges_and_special_files_are_refused_at_once(name, said, tmp_path):
    os.mkfifo(tmp_path / "fifo.tar")
    with pytest.raises(UsageError, match=said):
        load_pictures(f"{tmp_path}/{name}.tar", "train", 32)


def test_only_shards_on_disk_can_be_prepared(filled, tmp_path):
    where, _ = filled
    torch.manual_seed(0)
    run = tiny.run(nano_diff_instruct(), tmp_path / "run", tiny.family(tmp_path / "family"))
    run = replace(run, data=replace(run.data, source=f"{where}/*.tar", split="train", validation="train[:2]"),
                  probe_every=0)
    if where.startswith("memory"):
        Trainer(run).step(0)
        with pytest.raises(UsageError, match="read during training and cannot be prepared"):
            prepare(run, tmp_path / "cache")
        return
    prepare(run, tmp_path / "cache")
    plain, quick = Trainer(run).step(0), Trainer(cached(run, tmp_path / "cache", tmp_path / "quick")).step(0)
    assert quick["generator/loss"] == plain["generator/loss"]
