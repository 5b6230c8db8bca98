"""Aspect buckets, crops and mirrors: which pictures make a batch, and what a step sees of them."""

from dataclasses import replace

import pytest
import torch

from jdm.data.batches import Batches, mirrored
from jdm.data.buckets import Buckets, bucket_sizes, nearest
from jdm.data.sources import load_pictures
from jdm.errors import UsageError
from jdm.run import Data
from jdm.sharing import sharing
from jdm.size import size_of
from photos import SHAPES, of_three_shapes


def batches(place, batch=4, seed=3, **how):
    data = Data(source=str(place), size=32, splits="held-out", **how)
    return Batches(load_pictures(data.source, "train", 32, data), batch, seed, data)


# Which bucket


def test_bucket_sizes_keep_the_area():
    assert bucket_sizes(512, 64) == [(1024, 256), (768, 320), (640, 384), (576, 448), 512, (448, 576), (384, 640),
                                     (320, 768), (256, 1024)]
    assert bucket_sizes(512, 0) == [512]
    wide = bucket_sizes((512, 768), 64)
    assert (512, 768) in wide
    assert all(h * w <= 512 * 768 and h % 64 == w % 64 == 0 for h, w in wide)


@pytest.mark.parametrize(("size", "multiple", "said"), [
    (500, 64, "--data.size 500 x 500 is not made of multiples of --data.buckets 64; give --data.size 512"),
    (64, 64, "--data.buckets 64 leaves 64 x 64 alone; give smaller multiples")])
def test_sizes_that_do_not_fit_are_refused(size, multiple, said):
    with pytest.raises(UsageError) as caught:
        bucket_sizes(size, multiple)
    assert said in str(caught.value)


def test_awkward_pictures_go_to_the_nearest():
    sizes = [(64, 16), 32, (16, 64)]  # width to height 1:4, 1:1, 4:1
    sides = [(10, 100), (1, 1), (100, 10), (10, 20), (1001, 2000), (20, 10), (2001, 1000), (3000, 1)]
    assert nearest(sides, sizes).tolist() == [0, 1, 2, 0, 1, 1, 2, 2]  # 1:2 and 2:1 are exactly between: the taller


# Which pictures


def test_each_picture_is_seen_equally_often():
    """Whatever a bucket holds, and whether or not that is a batch; on the way there no bucket falls far behind."""
    sides = [(32, 32)] * 17 + [(64, 16)] * 5 + [(16, 64)]
    made, seen, steps = Buckets(sides, 32, 8), torch.zeros(23, dtype=torch.long), torch.zeros(3)
    for step in range(2 * 23):
        k, rows = made.at(step, 4, seed=1)
        assert (made.of[rows] == k).all(), "one bucket a batch"
        steps[k] += 1
        seen += rows.bincount(minlength=23)
        assert ((steps - (step + 1) * made.counts / 23).abs() <= 2).all()
    assert seen.tolist() == [8] * 23


def test_turns_are_not_a_rhythm():
    made = Buckets([(32, 32), (64, 16)] * 50, 32, 8)
    one = [made.at(step, 4, seed=1)[0] for step in range(100)]
    assert one != [made.at(step, 4, seed=2)[0] for step in range(100)]
    assert 10 < sum(one[::2]) < 40, "a phase of every second step meets both buckets"


def test_every_turn_makes_batches_of_its_own():
    made = Buckets([(32, 32)] * 17 + [(64, 16)] * 5, 32, 8)
    first, second = ({tuple(made.at(step, 4, seed=1)[1].tolist()) for step in range(start, start + 22)}
                     for start in (0, 22))
    assert len(first & second) < 3


@pytest.mark.parametrize("count", [2, 4])
def test_shares_make_the_same_batch(tmp_path, count):
    """Over any number of processes and parts, and from any step on: rows, sizes, crops and mirrors."""
    place = of_three_shapes(tmp_path, captions=("a coat", "a dress"), maps=True)
    how = {"buckets": 8, "flip": 0.5, "crop": "random", "controls": "maps"}
    whole, shared = batches(place, **how), batches(place, **how)
    for step in (11, 12, 30):
        rows, images, maps = whole(step)
        parts = []
        for index in range(count):
            with sharing(index, count):
                parts.append(shared(step))
        assert torch.equal(rows, torch.cat([part.rows for part in parts]))
        assert torch.equal(images, torch.cat([part.images for part in parts]))
        assert torch.equal(images, maps), "a map is cut and mirrored as its picture is"
        assert torch.equal(images, torch.cat([part.maps for part in parts]))


def test_a_resumed_run_sees_the_wholes_batches(tmp_path):
    """Rows, sizes, crops and mirrors are of the step, not of how many came before it."""
    place = of_three_shapes(tmp_path)
    whole, resumed = (batches(place, buckets=8, flip=0.5, crop="random") for _ in range(2))
    seen = [whole(step) for step in range(9)]
    for step in range(3, 9):
        rows, images, _ = resumed(step)
        assert torch.equal(rows, seen[step].rows)
        assert torch.equal(images, seen[step].images)


def test_a_batch_has_its_buckets_size(tmp_path):
    made = batches(of_three_shapes(tmp_path), buckets=8)
    assert made.buckets is not None
    assert {size_of(made(step).images) for step in range(12)} == {32, (40, 24), (24, 40)}
    assert made.buckets.said in made.pictures.report.notes
    small = next(note for note in made.pictures.report.notes if "fewer pictures than a batch of 4" in note)
    assert "no more often than others in all: 24 x 40 (3); lower --batch" in small


def test_an_unreadable_picture_is_replaced_within_its_bucket(tmp_path):
    place = of_three_shapes(tmp_path)
    (place / "06.png").write_bytes(b"no picture")  # would be in a bucket of its own shape; nothing says so
    whole = (place / "12.png").read_bytes()
    (place / "12.png").write_bytes(whole[: len(whole) // 2])
    made = batches(place, buckets=8, unreadable=0.2)
    assert made.buckets is not None
    assert len(made.pictures.unread.found) == 2, "found by their headers"
    for step in range(40):
        k = made.buckets.at(step, 4, 3)[0]
        rows = made(step).rows
        assert (made.buckets.of[rows] == k).all()
        assert not {4, 10} & set(made.pictures.indices[rows].tolist())


def test_without_the_flags_nothing_changes(tmp_path):
    made = batches(of_three_shapes(tmp_path))
    assert made._drawn(0).frames == ()
    assert torch.equal(made(5).images, made.pictures.batch(made(5).rows))


# Crops and mirrors


def test_a_random_crop_moves_along_what_is_cut(tmp_path):
    made, whole = batches(of_three_shapes(tmp_path), crop="random"), batches(of_three_shapes(tmp_path))
    moved = {size: 0 for size in SHAPES}
    for step in range(8):
        (rows, images, _), plain = made(step), whole(step).images
        for row, a, b in zip(rows.tolist(), images, plain, strict=True):
            moved[made.pictures.sides(made.pictures.indices[row][None])[0]] += not torch.equal(a, b)
    assert moved[40, 40] == 0
    assert min(moved[60, 30], moved[30, 60]) > 0


def test_no_picture_of_left_or_right_is_mirrored(tmp_path):
    said = ("a left shoe", "a coat", "Right-handed", "the upright copyright of leftovers")
    place = of_three_shapes(tmp_path, captions=said)
    made, plain = batches(place, flip=1.0), batches(place)
    for step in range(6):
        rows, images, _ = made(step)
        for row, a, b in zip(rows.tolist(), images, plain(step).images, strict=True):
            (caption,) = made.pictures.captions[int(made.pictures.indices[row])]
            assert torch.equal(a, b if caption in said[::2] else b.flip(-1))
    notes = [note for note in made.pictures.report.notes if "left or right" in note]
    assert notes == ["mirrored are 100% of the pictures, drawn anew in every step, and none whose caption says left or "
                     "right: 9 of 18 have such a caption"]


def test_a_share_is_mirrored(tmp_path):
    made, plain = batches(of_three_shapes(tmp_path), flip=0.25), batches(of_three_shapes(tmp_path))
    changed = [not torch.equal(a, b) for step in range(50)
               for a, b in zip(made(step).images, plain(step).images, strict=True)]
    assert 25 <= sum(changed) <= 75
    assert torch.equal(mirrored(torch.arange(6).to(torch.uint8).view(2, 1, 1, 3), [True, False]).flatten(),
                       torch.tensor([2, 1, 0, 3, 4, 5]).to(torch.uint8))


@pytest.mark.parametrize("how", [{"buckets": 8}, {"crop": "random"}])
def test_packaged_pictures_are_not_cut(how):
    with pytest.raises(UsageError, match="square and shown whole"):
        load_pictures("fashion-mnist", "test", 32, replace(Data(), **how))
