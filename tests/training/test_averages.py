"""Averages: parameters tend to the module's, buffers are the module's, and what is exported holds both."""

import torch
from torch import nn

from jdm.training.averages import averaged, copied_state, move


def module() -> nn.Module:
    """A frozen layer, a trained one and buffers that count."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 4), nn.BatchNorm1d(4))
    made(torch.randn(8, 3))
    return made


def test_buffers_are_copied_and_parameters_averaged():
    trained = module()
    average, start = copied_state(trained), {k: v.clone() for k, v in trained.state_dict().items()}
    assert average.keys() == {k for k in start if not k.startswith("0.")}
    with torch.no_grad():
        trained[1].weight.add_(1)
    trained(torch.randn(8, 3) + 5)
    move(average, trained, 0.75)
    torch.testing.assert_close(average["1.weight"], start["1.weight"] + 0.25)
    for name, buffer in trained.named_buffers():
        assert torch.equal(average[name], buffer)
        assert not torch.equal(buffer, start[name])


def test_an_averaged_module_holds_buffers_until_the_end():
    trained = module().train()
    averages = {"net": {k: v.clone() + 1 for k, v in copied_state(trained).items()}}
    now, wanted = copied_state(trained), {k: v.clone() for k, v in averages["net"].items()}
    with averaged({"net": trained, "other": nn.Linear(1, 1)}, averages) as held:
        assert list(held) == ["net"]
        assert not trained.training
        found = copied_state(trained)
        assert all(torch.equal(found[k], wanted[k]) for k in wanted)
    assert trained.training
    assert all(torch.equal(v, now[k]) for k, v in copied_state(trained).items())
    assert all(torch.equal(v, wanted[k]) for k, v in averages["net"].items())
