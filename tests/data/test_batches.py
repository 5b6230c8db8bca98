"""Reading ahead: which pictures are read, when, and what becomes of one that cannot be."""

import itertools
from dataclasses import replace

import pytest
import torch

from jdm.data.batches import Batches
from jdm.data.noise import rows_at
from jdm.data.sources import load_pictures
from jdm.errors import UsageError
from jdm.sharing import sharing

PICTURES = load_pictures("fashion-mnist", "test[:40]", 32)


class Counted:
    """The pictures' reader, and which rows it read, in order."""

    def __init__(self, broken=-1):
        self.read, self.broken = [], broken

    def __call__(self, rows):
        self.read.append(rows.tolist())
        if self.broken in rows.tolist():
            raise UsageError("a picture is broken")
        return PICTURES.images(rows)


@pytest.mark.parametrize("turns", [1, 2])
def test_each_batch_is_read_once_and_ahead(turns):
    """All phases of a step share its batch; the next step's is read in the meantime."""
    reader = Counted()
    batches = Batches(replace(PICTURES, images=reader, slow=True), 8, seed=3)
    for step in (5, 6):
        for _ in range(3):  # phases
            for turn in range(turns):
                with sharing(turn, turns):
                    rows, images, _ = batches(step)
                    assert torch.equal(rows, rows_at(40, 8, 3, step))
                    assert torch.equal(images, PICTURES.batch(rows))
    assert {step for step, _ in batches._asked} == {6, 7}  # what is done with is forgotten
    batches._reader.shutdown()
    wanted = torch.cat([rows_at(40, 8, 3, step) for step in (5, 6, 7)]).tolist()
    assert sorted(itertools.chain(*reader.read)) == sorted(wanted)


def test_the_next_step_is_read_ahead():
    reader = Counted()
    batches = Batches(replace(PICTURES, images=reader, slow=True), 8, seed=3)
    batches(0)
    batches._reader.shutdown()
    assert reader.read == [rows_at(40, 8, 3, step).tolist() for step in (0, 1)]


def test_an_unreadable_picture_stops_its_own_step():
    wrong = int(rows_at(40, 8, 3, 1)[4])
    batches = Batches(replace(PICTURES, images=Counted(wrong), slow=True), 8, seed=3)
    batches(0)
    with pytest.raises(UsageError, match="a picture is broken"):
        batches(1)


def test_pictures_in_memory_are_not_read_ahead():
    reader = Counted()
    batches = Batches(replace(PICTURES, images=reader), 8, seed=3)
    batches(0)
    assert len(reader.read) == 1
