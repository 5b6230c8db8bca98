"""One step of the loop on toy phases: repeats, bounds on gradients, rates, averages and what a probe sees."""

from pathlib import Path

import pytest
import torch
from torch import nn

import tiny
from jdm.run import Needs, Optimiser, Phase, Product, Run, Task
from jdm.training.optimiser import adamw
from jdm.training.trainer import Trainer, _step


class Toy:
    """A method of two networks, of which the first is averaged; every loss is recorded."""

    def __init__(self, **phase):
        self.asked, self.probed, self.networks = [], [], {"net": nn.Linear(2, 1), "other": nn.Linear(2, 1)}
        self.phase = phase

    def task(self, loaded) -> Task:
        def loss(state, repeat):
            self.asked.append((state, repeat))
            return self.networks["net"](torch.ones(3, 2)).square().mean(), {}

        def probe(modules):
            self.probed.append({k: v.detach().clone() for k, v in modules["net"].state_dict().items()})
            return {"fd": 1.0}

        groups = [(list(self.networks["net"].parameters()), Optimiser(lr=0.1, betas=(0.0, 0.9)))]
        phase = Phase("only", groups, loss, **self.phase)
        return Task([phase], lambda step: f"step {step}", dict(self.networks),
                    Product({"net": self.networks["net"]}, lambda folder, averages: None), probe)

    def needs(self, run: Run) -> Needs:
        return Needs()


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    monkeypatch.setattr("jdm.training.trainer.record", lambda *_: None)

    def made(steps=4, **phase) -> Trainer:
        return Trainer(Run(Toy(**phase), Path(tmp_path), data=tiny.DATA, steps=steps, batch=3, ema=0.5, save_every=100,
                           probe_every=2))

    return made


def test_a_repeated_phase_shares_batch_not_noise(trainer):
    run = trainer(repeats=3)
    run._phases(0)
    assert run.run.method.asked == [("step 0", 0), ("step 0", 1), ("step 0", 2)]


def test_a_rarer_phase_waits_its_turn(trainer):
    run = trainer(every=2)
    for step in range(4):
        run._phases(step)
    assert [state for state, _ in run.run.method.asked] == ["step 0", "step 2"]


def test_a_probe_measures_averages_after_their_move(trainer):
    run = trainer()
    net, weights = run.run.method.networks["net"], []
    average = net.weight.detach().clone()
    for step in range(2):
        run.step(step)
        weights.append(net.weight.detach().clone())
        average = average.lerp(weights[-1], 1 - (1 + step) / (10 + step))
    (probed,) = run.run.method.probed
    torch.testing.assert_close(probed["weight"], average)
    assert not torch.equal(net.weight, probed["weight"])
    assert torch.equal(net.weight, weights[-1])


def two_groups(clip: float) -> Phase:
    """Gradients of norm 3 and 4 to come, at two rates."""
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    return Phase("both", [([a], Optimiser(lr=1.0, betas=(0.0, 0.0))), ([b], Optimiser(lr=0.1, betas=(0.0, 0.0)))],
                 lambda state, repeat: (torch.zeros(()), {}), clip=clip)


@pytest.mark.parametrize(("clip", "share"), [(1.0, 0.2), (2.5, 0.5), (10.0, 1.0)])
def test_the_bound_is_on_all_groups_together(clip, share, tmp_path, monkeypatch):
    phase, seen = two_groups(clip), []
    optimizer = adamw(phase)
    monkeypatch.setattr(optimizer, "step", lambda: seen.extend(float(p.grad) for p in phase.parameters))  # type: ignore[arg-type]
    norm = _step(phase, optimizer, [torch.tensor([3.0]), torch.tensor([4.0])], 0, Run(None, tmp_path))
    assert norm == pytest.approx(5)
    assert seen == pytest.approx([3 * share, 4 * share], rel=1e-5)


def test_each_group_moves_at_its_own_rate(tmp_path):
    phase = two_groups(10.0)
    _step(phase, adamw(phase), [torch.tensor([3.0]), torch.tensor([4.0])], 0, Run(None, tmp_path, steps=10))
    rates = [optimiser.rate(0, 10) for _, optimiser in phase.groups]
    assert [-float(p.detach()) for p in phase.parameters] == pytest.approx(rates, rel=1e-4)
    assert rates[0] == pytest.approx(10 * rates[1])
