"""What a preview does to the state of the program that draws it."""

import pytest
import torch

from jdm.data.sources import load_pictures
from jdm.evaluation.preview import preview


@pytest.fixture
def pictures():
    return load_pictures("fashion-mnist", "test[:4]", 32)


def test_a_preview_leaves_the_random_state(pictures):
    def noisy(asked):
        return (torch.rand(len(asked), 3, 32, 32) * 255).byte()

    draw = preview(pictures, None, {"model": noisy}, {"teacher": noisy}, "cpu")
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    draw({})
    assert torch.equal(torch.rand(5), expected)


def test_still_rows_are_drawn_once_without_gradients(pictures):
    drawn = []

    def row(name):
        def pictures_of(asked):
            drawn.append((name, torch.is_grad_enabled()))
            return torch.zeros(len(asked), 3, 32, 32, dtype=torch.uint8)

        return pictures_of

    draw = preview(pictures, None, {"model": row("model")}, {"teacher": row("teacher")}, "cpu")
    assert [list(draw({}).rows) for _ in range(3)] == [["model", "teacher"]] * 3
    assert sorted(drawn) == [("model", False)] * 3 + [("teacher", False)]


class Doubling(torch.nn.Module):
    def forward(self, x):
        return x * 2


def test_compiled_networks_run_eagerly(pictures):
    """Another batch size would compile them again, and training could then go through the new code."""
    net, compiled = Doubling(), []
    net.compile(backend=lambda graph, _: compiled.append(graph) or graph.forward)
    with torch.no_grad():
        net(torch.zeros(2, 3))
    assert len(compiled) == 1

    def row(asked):
        return net(torch.zeros(len(asked), 3)).byte().view(-1, 3, 1, 1)

    preview(pictures, None, {"model": row}, {}, "cpu")({})
    assert len(compiled) == 1
