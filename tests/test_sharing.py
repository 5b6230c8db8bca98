"""Means over a batch whose parts are computed one after another."""

import torch

from jdm.sharing import Means, batch_mean, part_of


def test_parts_hear_each_mean_in_its_order():
    said, means = [(1.0, 10.0), (3.0, 50.0)], Means()
    for part in said:
        with part_of(means):
            assert [float(batch_mean(torch.tensor(value))) for value in part] == list(part)
    means.settle()
    for part in said:
        with part_of(means):
            assert [float(batch_mean(torch.tensor(value))) for value in part] == [2.0, 30.0]
    assert float(batch_mean(torch.tensor(7.0))) == 7.0
