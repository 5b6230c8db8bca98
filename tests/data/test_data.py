"""Pictures with captions: the packaged ones and a person's own; orders and noise are pure functions."""

import json
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image

from jdm.data.noise import Noise, rows_at
from jdm.data.sources import fingerprint, load_pictures
from jdm.errors import UsageError
from jdm.run import Data
from photos import captions_of, folder_of

# Packaged


def test_the_packaged_test_split_is_whole_and_padded():
    pictures = load_pictures("fashion-mnist", "test", 32)
    assert len(pictures) == 10_000
    images = pictures.batch(torch.tensor([0, 9999]))
    assert images.shape == (2, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert images[..., :2].sum() == 0
    assert images.sum() > 0
    labels = pictures.label(torch.arange(10_000))
    assert labels is not None
    assert labels.bincount().tolist() == [1000] * 10
    wide = load_pictures("fashion-mnist", "test", (29, 40)).batch(torch.tensor([0, 9999]))
    assert torch.equal(wide[..., :28, 6:34], images[..., 2:30, 2:30])
    assert wide.sum() == images.sum()
    with pytest.raises(UsageError, match="at least 28, got 20 x 40"):
        load_pictures("fashion-mnist", "test", (20, 40))


def test_captions_vary_and_name_the_class():
    pictures = load_pictures("fashion-mnist", "test[:100]", 32)
    rows = torch.zeros(50, dtype=torch.long)  # the first picture is an ankle boot
    drawn = pictures.prompts(rows, torch.linspace(0, 0.999, 50))
    assert all("boot" in caption for caption in drawn)
    assert len(set(drawn)) == 16
    assert "an ankle boot" in drawn
    assert "a ankle boot" not in drawn


def test_slices_are_those_of_python():
    whole = load_pictures("fashion-mnist", "test", 32)
    part = load_pictures("fashion-mnist", "test[100:110]", 32)
    assert len(part) == 10
    assert torch.equal(part.batch(torch.tensor([0])), whole.batch(torch.tensor([100])))
    assert len(load_pictures("fashion-mnist", "test[-5:]", 32)) == 5


@pytest.mark.parametrize("split", ["tests", "test[5]", "test[5:2]", "train+test", ""])
def test_an_unreadable_or_empty_split_is_refused(split):
    with pytest.raises(UsageError, match=r"split .*(must be train, validation or test|no pictures)"):
        load_pictures("fashion-mnist", split, 32)


def test_a_missing_training_set_names_its_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr("jdm.data.sources.TRAINING_SET_PLACES", (tmp_path,))
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    with pytest.raises(UsageError, match="dataset-fashion-mnist, set FASHION_MNIST"):
        load_pictures("fashion-mnist", "train", 32)


def test_a_fingerprint_tells_splits_apart():
    a, b = (load_pictures("fashion-mnist", f"test[{k}:]", 32) for k in (0, 1))
    assert fingerprint(a) == fingerprint(a) != fingerprint(b)


# A person's own


def test_a_folder_with_texts_beside_its_pictures(tmp_path):
    pictures = load_pictures(str(folder_of(tmp_path / "train").parent), "train", 16)
    assert captions_of(pictures) == ["caption 0", "caption 1", "caption 2"]
    images = pictures.batch(torch.tensor([2, 0]))
    assert images.shape == (2, 3, 16, 16)
    assert images.flatten(1).float().mean(1).tolist() == [10, 0]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_folder_with_a_table(kind, tmp_path):
    place = folder_of(tmp_path / "train", captions=False)
    rows = [{"file_name": f"{i}.png", "text": f'row {i}, "quoted"'} for i in range(3)]
    if kind == "jsonl":
        (place / "metadata.jsonl").write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    else:
        quoted = [f"{r['file_name']},\"{r['text'].replace(chr(34), chr(34) * 2)}\"" for r in rows]
        (place / "metadata.csv").write_text("file_name,text\n" + "\n".join(quoted) + "\n")
    assert captions_of(load_pictures(str(tmp_path), "train", 16)) == [r["text"] for r in rows]


def test_a_flat_folder_holds_out_every_twentieth_picture(tmp_path):
    """One in 20 is for validation, and one in 20 for the test."""
    folder_of(tmp_path, count=41)
    sizes = {split: len(load_pictures(str(tmp_path), split, 16)) for split in ("train", "validation", "test")}
    assert sizes == {"train": 36, "validation": 3, "test": 2}


def test_a_missing_caption_names_its_picture_and_file(tmp_path):
    folder_of(tmp_path)
    (tmp_path / "1.txt").unlink()
    with pytest.raises(UsageError, match=r"1\.png has no caption; put it into 1\.txt"):
        load_pictures(str(tmp_path), "train", 16)


def test_a_table_without_the_right_columns_is_named(tmp_path):
    folder_of(tmp_path, captions=False)
    (tmp_path / "metadata.csv").write_text("file,words\n0.png,boot\n")
    with pytest.raises(UsageError, match=r"metadata\.csv: needs the columns file_name and text"):
        load_pictures(str(tmp_path), "train", 16)


def test_two_tables_are_one_too_many(tmp_path):
    folder_of(tmp_path, captions=False)
    for name in ("a.csv", "b.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(UsageError, match="keep one"):
        load_pictures(str(tmp_path), "train", 16)


def test_empty_folders_and_unknown_names_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no pictures"):
        load_pictures(str(tmp_path), "train", 16)
    with pytest.raises(UsageError, match="neither fashion-mnist, a folder, nor a dataset"):
        load_pictures(str(tmp_path / "nowhere"), "train", 16)


# The hub: a real dataset object, without the network


def hub_dataset(monkeypatch, features: dict, rows: int = 30, splits=("train", "test")):
    """`datasets.load_dataset` answers with `rows` pictures of 40 x 24 and the columns given, as it does for a set that
    has these splits."""
    import datasets

    columns = {"image": [Image.fromarray(np.full((24, 40, 3), i, np.uint8)) for i in range(rows)]}
    kinds = {"image": datasets.Image()}
    for name, (kind, value) in features.items():
        columns[name], kinds[name] = [value(i) for i in range(rows)], kind
    made = datasets.Dataset.from_dict(columns, datasets.Features(kinds))
    asked = []

    def load_dataset(name, split):
        if split not in splits:
            raise ValueError(f'Unknown split "{split}". Should be one of {list(splits)}.')
        asked.append((name, split))
        return made

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_class_labels_of_a_hub_dataset_become_captions(monkeypatch):
    import datasets

    kind = datasets.ClassLabel(names=["Apple", "Bag"])
    asked = hub_dataset(monkeypatch, {"label": (kind, lambda i: i % 2)})
    train, held_out = (load_pictures("someone/things", split, 16) for split in ("train", "validation"))
    assert asked[0] == ("someone/things", "train")
    assert (len(train), len(held_out)) == (27, 3)  # a tenth validates
    assert captions_of(train)[:2] == ["apple", "bag"]
    assert held_out.label(torch.arange(3)).tolist() == [1, 0, 1]
    assert train.batch(torch.tensor([5])).unique().tolist() == [5]


def test_a_hub_dataset_with_texts_keeps_them(monkeypatch):
    import datasets

    asked = hub_dataset(monkeypatch, {"text": (datasets.Value("string"), lambda i: f"text {i}")})
    pictures = load_pictures("someone/things", "test", 16)
    assert asked == [("someone/things", "test")]
    assert captions_of(pictures)[3] == "text 3"
    assert pictures.labels is None


def test_a_hub_dataset_without_captions_is_refused(monkeypatch):
    import datasets

    hub_dataset(monkeypatch, {"price": (datasets.Value("int32"), lambda i: i)})
    with pytest.raises(UsageError, match=r"someone/things: needs an image column and a text or label.*price"):
        load_pictures("someone/things", "train", 16)


@pytest.mark.parametrize(("splits", "sizes"), [
    (("train",), (24, 3, 3)), (("train", "val"), (27, 30, 3)), (("train", "valid", "test"), (30, 30, 30)),
    (("train", "dev"), (27, 30, 3))])
def test_splits_that_a_set_lacks_are_held_out(splits, sizes, monkeypatch):
    import datasets

    hub_dataset(monkeypatch, {"text": (datasets.Value("string"), lambda i: f"text {i}")}, splits=splits)
    found = [load_pictures("someone/things", split, 16) for split in ("train", "validation", "test")]
    assert tuple(map(len, found)) == sizes
    if splits == ("train",):
        said = [caption for part in found for caption in captions_of(part)]
        assert sorted(said) == sorted(f"text {i}" for i in range(30))
        assert "no validation split: 3 of its 30" in " ".join(found[0].report.lines())


def test_a_failed_fetch_is_no_missing_split(monkeypatch):
    import datasets

    def load_dataset(name, split):
        raise ConnectionError("503 Service Unavailable")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for split in ("train", "test"):
        with pytest.raises(UsageError, match=r"503 Service Unavailable"):
            load_pictures("someone/things", split, 16)


def test_hub_rows_without_caption_are_left_out(monkeypatch):
    import datasets

    values = [None, "", "nan", "a boot", " "] * 6
    hub_dataset(monkeypatch, {"text": (datasets.Value("string"), lambda i: values[i])}, splits=("train", "test"))
    pictures = load_pictures("someone/things", "test", 16)
    assert captions_of(pictures) == ["a boot"] * 6
    assert pictures.report.left_out["rows without a caption"].count == 24
    assert pictures.batch(torch.tensor([1])).unique().tolist() == [8]


def test_several_hub_captions_are_drawn_from(monkeypatch):
    import datasets

    hub_dataset(monkeypatch, {"captions": (datasets.List(datasets.Value("string")), lambda i: [f"a {i}", f"b {i}"])})
    pictures = load_pictures("someone/things", "test", 16)
    assert pictures.prompts(torch.tensor([3, 3]), torch.tensor([0.1, 0.9])) == ["a 3", "b 3"]


def test_a_hub_column_of_maps_is_read(monkeypatch):
    import datasets

    def drawn(i):
        return Image.fromarray(np.full((24, 40, 3), 200 - i, np.uint8))

    hub_dataset(monkeypatch, {"text": (datasets.Value("string"), lambda i: f"text {i}"),
                              "conditioning_image": (datasets.Image(), drawn)})
    rows = torch.tensor([2])
    plain = load_pictures("someone/things", "test", 16)
    assert plain.maps(rows) is None
    assert plain.report.left_out["columns that are not read"].first == ["conditioning_image"]
    with_maps = load_pictures("someone/things", "test", 16, Data(controls="conditioning_image"))
    assert with_maps.maps(rows).unique().tolist() == [198]
    assert with_maps.batch(rows).unique().tolist() == [2]


def test_labels_that_are_missing_are_left_out(monkeypatch):
    import datasets

    kind = datasets.ClassLabel(names=["Apple", "Bag"])
    hub_dataset(monkeypatch, {"label": (kind, lambda i: -1 if i % 3 == 0 else 1)})
    pictures = load_pictures("someone/things", "test", 16)
    assert len(pictures) == 20
    assert set(captions_of(pictures)) == {"bag"}


# Orders and noise


def test_an_epoch_visits_every_row_once():
    for batch in (1, 3, 10):
        steps = -(-30 // batch)
        rows = torch.cat([rows_at(30, batch, seed=4, step=s) for s in range(steps)])[:30]
        assert sorted(rows.tolist()) == list(range(30))
        assert torch.equal(rows, torch.cat([rows_at(30, 5, seed=4, step=s) for s in range(6)]))


def test_every_epoch_has_an_order_of_its_own():
    epochs = [torch.cat([rows_at(40, 8, 3, step) for step in range(first, first + 5)]) for first in (0, 5, 10)]
    assert all(torch.equal(rows.sort().values, torch.arange(40)) for rows in epochs)
    assert all((a == b).sum() < 10 for a, b in combinations(epochs, 2))


def test_rows_depend_on_seed_and_step_alone():
    later = rows_at(50, 8, seed=1, step=100)
    rows_at(50, 8, seed=2, step=3)
    assert torch.equal(later, rows_at(50, 8, seed=1, step=100))
    assert not torch.equal(later, rows_at(50, 8, seed=2, step=100))
    assert rows_at(3, 8, seed=0, step=0).bincount().tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


def test_noise_does_not_depend_on_call_order():
    first, second = Noise(3, 7), Noise(3, 7)
    a, b = first.normal("eps", (2, 3)), first.uniform("t", 4)
    torch.randn(5)
    assert torch.equal(second.uniform("t", 4), b)
    assert torch.equal(second.normal("eps", (2, 3)), a)
    for other in (Noise(3, 8), Noise(4, 7)):
        assert not torch.equal(other.normal("eps", (2, 3)), a)
    assert not torch.equal(first.normal("z", (2, 3)), a)
