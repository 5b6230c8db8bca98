"""Compiled networks say what the others say, and are compiled once."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from torch._dynamo.utils import counters

import tiny
from jdm.models import execution
from jdm.models.adapters import Adapter
from jdm.models.stable_diffusion import UNetDenoiser
from jdm.recipes import find
from jdm.regularisers import Adversarial
from jdm.run import Run
from jdm.training import checkpoint
from jdm.training.product import write_model
from jdm.training.trainer import Trainer
from tiny import nano_canny

LORA = {"student": 2, "fake": 2}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """Dynamo without graphs of another test; a backend that is quick."""
    monkeypatch.setattr(execution, "BACKEND", "eager")
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):
        torch._dynamo.reset()
        counters.clear()
        yield
        torch._dynamo.reset()


def graphs():
    return counters["stats"]["unique_graphs"]


def backbone():
    """A UNet that is quick to trace, and three denoisers on it."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=4, cross_attention_dim=8, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",), mid_block_type=None).eval().requires_grad_(False)
    fake, posterior = (Adapter(unet, name, 2, ("to_q", "conv1")) for name in ("fake", "posterior"))
    for p in [*fake.parameters(), *posterior.parameters()]:
        p.data.normal_(std=0.3)
    return UNetDenoiser(unet), UNetDenoiser(unet, adapters=[fake]), UNetDenoiser(unet, adapters=[fake, posterior])


def passes(real, fake, posterior, step):
    """A step's passes and their gradients: cond and uncond in one batch, a batch, with and without gradients."""
    n = torch.Generator().manual_seed(step)
    x, text = torch.randn(4, 4, 4, 4, generator=n), torch.randn(4, 3, 8, generator=n)
    at = torch.randint(0, 1000, (4,), generator=n)
    with torch.no_grad():
        found = [real(x, at, text), fake(x[:2], at[:2], text[:2])]
    for net in (fake, posterior):
        out = net(x[:2], at[:2], text[:2])
        found += [out.detach(), *torch.autograd.grad(out.square().sum(), list(net.adapters[-1].parameters()))]
    return found


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_every_pass_on_one_unet_has_one_graph(checkpointing):
    nets = backbone()
    plain = copy.deepcopy(nets)  # together, so that they share a copy
    before = list(nets[0].state_dict())
    execution.settle(Run(method=None, out=Path(), compile=True, checkpointing=checkpointing), *nets)
    assert list(nets[0].state_dict()) == before
    seen = []
    for step in range(4):
        for ours, theirs in zip(passes(*nets, step), passes(*plain, step), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        seen.append(graphs())
        with torch.no_grad():  # what trains moves between steps
            for net in (nets[2], plain[2]):
                for adapter in net.adapters:
                    for p in adapter.parameters():
                        p.mul_(1.1)
    assert seen == [4] * 4
    assert not counters["graph_break"]
    assert torch._dynamo.config.recompile_limit >= execution.GRAPHS


def test_a_run_is_not_compiled_unless_asked():
    nets = backbone()
    execution.settle(Run(method=None, out=Path()), *nets)
    passes(*nets, 0)
    assert graphs() == 0


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    torch.manual_seed(0)
    return tiny.family(tmp_path_factory.mktemp("family"))


def trainer_of(out, teacher, ranks, **changes):
    torch.manual_seed(1)
    run = tiny.run(nano_canny(), out, teacher, steps=9, **changes)
    return Trainer(tiny.ranked(run, **ranks))


def gradients(trainer):
    state = trainer.task.begin(0)
    return {phase.name: torch.autograd.grad(phase.loss(state, 0)[0], phase.parameters, allow_unused=True)
            for phase in trainer.task.phases}


def speaking(trainer):
    """LoRAs and zero convolutions that are not zero, the same whatever the trainer."""
    n = torch.Generator().manual_seed(2)
    for module in trainer.task.modules.values():
        for _, p in module.named_parameters():
            p.data.add_(0.02 * torch.randn(p.shape, generator=n))
    return trainer


def names(folder):
    """Of every weight in an exported folder, by file."""
    return {p.relative_to(folder): sorted(safe_open(p, "pt").keys()) for p in folder.rglob("*.safetensors")}


@pytest.mark.slow  # Dynamo traces eight graphs a case
@pytest.mark.parametrize("changes", [{}, {"checkpointing": True}, {"checkpointing": True, "precision": "bf16"}])
@pytest.mark.parametrize("ranks", [{}, LORA, {"fake": 2}])
def test_compiled_phases_have_the_gradients_of_eager(tmp_path, teacher, ranks, changes):
    """No graph is made after the first steps."""
    trainer = speaking(trainer_of(tmp_path / "compiled", teacher, ranks, compile=True, **changes))
    plain = speaking(trainer_of(tmp_path / "plain", teacher, ranks, **changes))
    exact = "precision" not in changes
    for name, expected in gradients(plain).items():
        found = gradients(trainer)[name]
        assert sum(g.abs().sum() for g in expected if g is not None) > 0, name
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours is None) == (theirs is None)
            if theirs is not None and exact:
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
        a, b = (torch.cat([g.flatten() for g in gs if g is not None]) for gs in (found, expected))
        assert exact or (a - b).norm() < 0.05 * b.norm(), name  # bfloat16 keeps 8 bits
    for step in range(3):
        trainer._phases(step)
    before = graphs()
    for step in range(3, 6):
        trainer._phases(step)
    assert graphs() == before > 0
    assert not counters["graph_break"]
    for name, module in trainer.task.modules.items():
        assert list(checkpoint.trained(module)) == list(checkpoint.trained(plain.task.modules[name]))
    assert names(write_model(trainer)) == names(write_model(plain))


@pytest.mark.slow
def test_a_compiled_critic_has_eager_gradients(tmp_path, teacher):
    ddmd = find("nano-ddmd-4")()
    run = tiny.run(replace(ddmd, method=replace(ddmd.method, regulariser=Adversarial())), tmp_path, teacher, steps=9)
    found, expected = {}, {}
    for compiled, kept in ((True, found), (False, expected)):
        torch.manual_seed(1)
        kept |= gradients(speaking(Trainer(replace(run, out=tmp_path / str(compiled), compile=compiled))))
    assert list(expected) == ["fake", "regulariser", "generator"]
    assert graphs() > 0
    for name in expected:
        assert sum(g.abs().sum() for g in expected[name] if g is not None) > 0, name
        for ours, theirs in zip(found[name], expected[name], strict=True):
            if theirs is not None:
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_inductor_gives_the_gradients_of_eager(monkeypatch):
    monkeypatch.setattr(execution, "BACKEND", "inductor")
    nets = backbone()
    plain = copy.deepcopy(nets)
    execution.settle(Run(method=None, out=Path(), compile=True, checkpointing=True), *nets)
    x, at, text = torch.randn(2, 4, 4, 4), torch.tensor([20, 900]), torch.randn(2, 3, 8)
    ours, theirs = ([net(x, at, text), *torch.autograd.grad(net(x, at, text).square().sum(),
                                                            list(net.adapters[0].parameters()))]
                    for net in (nets[1], plain[1]))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)  # its fused sums are in another order
    assert graphs() == 1
