"""The optimiser against torch's AdamW: equal to the bit where its moments are float, close where they have 8 bits."""

import copy
import json

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from jdm.errors import UsageError
from jdm.recipes import recorded
from jdm.run import Optimiser, Phase, described
from jdm.training import checkpoint
from jdm.training.optimiser import BLOCK, AdamW, adamw, dequantised, quantised
from tiny import nano_controlnet

SHAPES = (64, 96), (33, 5), (7,), (), (16, 8, 3, 3), (40, 300)  # the first and the last are large enough for 8 bits


def parameters(dtype=torch.float32, shapes=SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def ours(moving: list[nn.Parameter], beta1: float, states="float32", **more) -> AdamW:
    optimiser = Optimiser(lr=1e-2, betas=(beta1, 0.95), weight_decay=0.1, states=states, **more)
    return adamw(Phase("phase", [(moving, optimiser)], lambda state, repeat: (torch.zeros(()), {})))


def torchs(moving: list[nn.Parameter], beta1: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(moving, lr=1e-2, betas=(beta1, 0.95), weight_decay=0.1, fused=True)


def steps(optimizer: torch.optim.Optimizer, start: int, stop: int) -> None:
    """Steps on random gradients over five decades, at a falling rate; both are functions of the step's number."""
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
            for i, p in enumerate(group["params"]):
                gradient = torch.randn(p.shape, generator=generator) * 10.0 ** (step % 5 - 3)
                p.grad = None if (step + i) % 7 == 0 else gradient.to(p.dtype)
        optimizer.step()


def kept(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes by slot, `step` apart."""
    found: dict[str, int] = {}
    for slots in optimizer.state.values():
        for name, value in slots.items():
            found[name] = found.get(name, 0) + value.nbytes
    return {k: v for k, v in found.items() if k != "step"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_adamw_is_torchs_to_the_bit(beta1, dtype):
    """Where beta1 is 0, no first moment is kept."""
    mine, reference = parameters(dtype), parameters(dtype)
    a, b = ours(mine, beta1), torchs(reference, beta1)
    steps(a, 0, 20)
    steps(b, 0, 20)
    assert all(torch.equal(p, q) for p, q in zip(mine, reference, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(mine, parameters(dtype), strict=True))
    for p, q in zip(mine, reference, strict=True):
        assert set(a.state[p]) == {"step", "exp_avg_sq", *(["exp_avg"] if beta1 else [])}
        assert all(torch.equal(value, b.state[q][name]) for name, value in a.state[p].items())
    whole = sum(p.nbytes for p in mine)
    assert kept(a) == {"exp_avg_sq": whole} | ({"exp_avg": whole} if beta1 else {})
    assert sum(kept(b).values()) == 2 * whole


def test_a_step_leaves_its_gradients_unchanged():
    moving = parameters()
    optimizer = ours(moving, 0.0)
    gradients = [torch.randn_like(p) for p in moving]
    for p, g in zip(moving, gradients, strict=True):
        p.grad = g.clone()
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(moving, gradients, strict=True))


@pytest.mark.parametrize("states", ["float32", "8bit"])
def test_strides_of_gradients_and_parameters_change_nothing(states):
    plain, other = parameters(shapes=[(64, 32, 3, 3), (64, 80)]), parameters(shapes=[(64, 32, 3, 3), (64, 80)])
    other[0].data = other[0].data.to(memory_format=torch.channels_last)
    a, b = ours(plain, 0.9, states), ours(other, 0.9, states)
    for step in range(3):
        for p, q in zip(plain, other, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.transpose(0, 1).contiguous().transpose(0, 1)
        a.step()
        b.step()
    # 1e-6: the kernel's vector and scalar parts meet other elements.
    assert all(torch.allclose(p, q, rtol=1e-6, atol=1e-7) for p, q in zip(plain, other, strict=True))


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_a_state_of_torchs_adamw_loads(beta1):
    mine, reference = parameters(), parameters()
    b = torchs(reference, beta1)
    steps(b, 0, 10)
    for p, q in zip(mine, reference, strict=True):
        p.data.copy_(q)
    a = ours(mine, beta1)
    a.load_state_dict(copy.deepcopy(b.state_dict()))
    assert set(kept(a)) == {"exp_avg_sq", *(["exp_avg"] if beta1 else [])}
    steps(a, 10, 20)
    steps(b, 10, 20)
    assert all(torch.equal(p, q) for p, q in zip(mine, reference, strict=True))


@pytest.mark.parametrize("betas", [(0.0, 0.9), (0.9, 0.0)])
@pytest.mark.parametrize("states", [("float32", "8bit"), ("8bit", "float32")])
def test_a_run_resumes_with_other_betas_or_states(betas, states):
    moving = parameters()
    before = ours(moving, betas[0], states[0])
    steps(before, 0, 10)
    optimizer = ours(moving, betas[1], states[1])
    optimizer.load_state_dict({**before.state_dict(), "param_groups": optimizer.state_dict()["param_groups"]})
    steps(optimizer, 10, 12)
    whole = ours(parameters(), betas[1], states[1])
    steps(whole, 0, 2)
    assert kept(optimizer) == kept(whole)
    assert all(p.isfinite().all() for p in moving)


# 8 bits


def trained(states: str, beta1: float, beta2: float, n: int = 300) -> list[float]:
    """Losses of a least-squares problem whose inputs differ in size by three decades, under noise of its batches."""
    torch.manual_seed(0)
    sizes = torch.logspace(-3, 0, 256)
    truth, weight = torch.randn(32, 256) / sizes, nn.Parameter(torch.zeros(32, 256))
    optimiser = Optimiser(lr=0.05, betas=(beta1, beta2), states=states)
    optimizer = adamw(Phase("phase", [([weight], optimiser)], lambda state, repeat: (torch.zeros(()), {})))
    losses = []
    for _ in range(n):
        x = torch.randn(64, 256) * sizes
        loss = (x @ (weight - truth).T).square().mean()
        losses.append(float(loss.detach()))
        weight.grad, = torch.autograd.grad(loss, [weight])
        optimizer.step()
    return losses


@pytest.mark.parametrize(("beta1", "beta2"), [(0.0, 0.95), (0.9, 0.95), (0.9, 0.999)])
def test_in_8_bits_losses_fall_as_in_32(beta1, beta2):
    whole, packed = trained("float32", beta1, beta2), trained("8bit", beta1, beta2)
    assert packed != whole
    assert whole[-1] < 0.7 * whole[0]
    # 1%: levels are 9.5% apart, and what is rounded up at one step is rounded down at another.
    assert packed == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_8_bit_moments_take_a_byte_each(beta1):
    """Small parameters keep theirs in float32."""
    moving = parameters()
    optimizer = ours(moving, beta1, "8bit")
    steps(optimizer, 0, 3)
    large, small = [moving[0], moving[5]], moving[1:5]
    for name, kind in {"exp_avg_sq": torch.uint8, **({"exp_avg": torch.int8} if beta1 else {})}.items():
        assert {optimizer.state[p][name].dtype for p in large} == {kind}
        assert {optimizer.state[p][name].dtype for p in small} == {torch.float32}
        assert [optimizer.state[p][f"{name}_scale"].shape for p in large] == [(64, 1), (40, 2)]
    quarter = sum(p.numel() for p in large) + 4 * (64 + 80) + sum(p.nbytes for p in small)
    assert sum(kept(optimizer).values()) == quarter * (2 if beta1 else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_an_8_bit_run_resumes_to_the_bit(beta1, dtype, tmp_path):
    alone, stopped, resumed = parameters(dtype), parameters(dtype), parameters(dtype)
    steps(ours(alone, beta1, "8bit"), 0, 20)
    steps(before := ours(stopped, beta1, "8bit"), 0, 11)
    place = checkpoint.save(checkpoint.State({"m": nn.ParameterList(stopped)}, {"o": before}, {}, {}), tmp_path, 11)
    after = ours(resumed, beta1, "8bit")
    checkpoint.load(checkpoint.State({"m": nn.ParameterList(resumed)}, {"o": after}, {}, {}), place)
    for p, q in zip(stopped, resumed, strict=True):
        assert {k: v.dtype for k, v in after.state[q].items()} == {k: v.dtype for k, v in before.state[p].items()}
    steps(after, 11, 20)
    assert all(torch.equal(p, q) for p, q in zip(alone, resumed, strict=True))


@pytest.mark.parametrize(("kind", "decades"), [(torch.uint8, 10), (torch.int8, 5)])
def test_levels_are_near_and_right_on_average(kind, decades):
    torch.manual_seed(0)
    moment = 10 ** (-decades * torch.rand(20, 3 * BLOCK + 9))
    if kind == torch.int8:
        moment *= torch.randn_like(moment).sign()
    seen = torch.stack([dequantised(*quantised(moment, torch.tensor(float(step)), kind)) for step in range(1000)])
    inside = moment.abs() > 10.0 ** -(decades - 0.1) * moment.abs().amax(1, keepdim=True)
    assert (seen / moment - 1).abs().amax(0)[inside].max() < 0.096
    assert (seen.mean(0) / moment - 1).abs()[inside].max() < 2e-4  # discrepancy of 1,000 golden multiples
    assert (seen.sign() == moment.sign())[:, inside].all()


def test_a_second_moment_never_becomes_zero():
    """A first moment may."""
    moment = torch.tensor([[1.0, 1e-30, 0.0], [0.0, 0.0, 0.0], [1e-37, 1e-20, 1e30]])
    square, mean = (dequantised(*quantised(moment, torch.tensor(3.0), kind)) for kind in (torch.uint8, torch.int8))
    assert torch.equal(square > 0, moment > 0)
    assert torch.equal(mean, torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 1e30]]))


def test_states_of_another_name_are_refused():
    with pytest.raises(UsageError, match="states must be float32 or 8bit, got '4bit'"):
        ours(parameters(), 0.0, "4bit")


def test_a_record_without_the_field_reads_as_float32(tmp_path):
    run = nano_controlnet()
    description = described(run)
    assert description["method"]["optimiser"].pop("states") == "float32"
    (tmp_path / "run.json").write_text(json.dumps({"run": description}))
    assert recorded(tmp_path / "run.json") == run


# More than one process


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 65, bias=False)  # 65 rows: two processes have unequal shares


def _one_of_two(rank: int, meeting: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for states in ("float32", "8bit"):
        _check_sharded(states)
    dist.destroy_process_group()


def _check_sharded(states: str) -> None:
    """Against torch's AdamW, sharded alike, or in 8 bits against one process; with a reload on the way."""
    whole = StateDictOptions(full_state_dict=True)
    mine, other, alone = linear(), linear(), linear()
    for module in (mine, other):
        fully_shard(module, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    optimizer = ours([*mine.parameters()], 0.0, states)
    reference = ours([*alone.parameters()], 0.0, states) if states == "8bit" else torchs([*other.parameters()], 0.0)
    against = alone.weight if states == "8bit" else other.weight
    for step in range(8):
        torch.manual_seed(step)
        gradient, place = torch.randn(65, 64), (mine.weight.device_mesh, mine.weight.placements)
        mine.weight.grad = distribute_tensor(gradient, *place)
        against.grad = gradient if states == "8bit" else mine.weight.grad.clone()
        optimizer.step()
        reference.step()
        if step == 4:
            optimizer.zero_grad()
            saved = get_optimizer_state_dict(mine, optimizer, options=whole)
            optimizer = ours([*mine.parameters()], 0.0, states)
            set_optimizer_state_dict(mine, optimizer, saved, options=whole)
    slots = ["exp_avg_sq", "exp_avg_sq_scale"] if states == "8bit" else ["exp_avg_sq"]
    assert sorted(set(optimizer.state[mine.weight]) - {"step"}) == slots
    pairs = [(optimizer.state[mine.weight][k], reference.state[against][k]) for k in slots]
    for a, b in [(mine.weight, against), *pairs]:
        assert isinstance(a, DTensor)
        assert torch.equal(a.full_tensor(), b.full_tensor() if isinstance(b, DTensor) else b)


@pytest.mark.slow
def test_sharded_parameters_step_as_whole_ones(tmp_path):
    torch.multiprocessing.spawn(_one_of_two, (str(tmp_path / "meeting"),), nprocs=2)
