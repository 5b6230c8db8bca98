"""HED: the published names and shapes, weights that load or are refused, gradients down to the picture."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from jdm.controls import HED, checked, load_control
from jdm.controls.hed import DEPTHS, WIDTHS, HEDNetwork
from jdm.errors import UsageError

NARROW = (2, 3, 2, 3, 2)


class Small(HED):
    widths = NARROW


def images(n: int = 2, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


def network(seed: int = 0) -> HEDNetwork:
    """Random and small, its logits spread about 0 on pictures in 0..255."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = HEDNetwork(NARROW)
        for parameter in made.parameters():
            nn.init.normal_(parameter, 0.05, 0.3)
    made.norm.data.fill_(110.0)
    for block in made.children():
        block.projection.weight.data /= 100
    return made


@pytest.fixture
def weights(tmp_path) -> Path:
    file = tmp_path / "small.safetensors"
    save_file(network().state_dict(), file)
    return file


# The network


def test_parameters_are_those_of_the_published_weights():
    with torch.device("meta"):
        state = HEDNetwork().state_dict()
    assert WIDTHS == (64, 128, 256, 512, 512)
    assert DEPTHS == (2, 2, 3, 3, 3)
    expected, before = {"norm": (1, 3, 1, 1)}, 3
    for block, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True), 1):
        for conv in range(depth):
            expected[f"block{block}.convs.{conv}.weight"] = (width, before, 3, 3)
            expected[f"block{block}.convs.{conv}.bias"] = (width,)
            before = width
        expected[f"block{block}.projection.weight"] = (1, width, 1, 1)
        expected[f"block{block}.projection.bias"] = (1,)
    assert {key: tuple(value.shape) for key, value in state.items()} == expected
    # VGG-16's 13 convolutions, five projections and norm.
    assert sum(value.numel() for value in state.values()) == 14_714_688 + 1_477 + 3


def test_the_logit_is_the_mean_of_side_outputs():
    made = HEDNetwork((1, 1, 1, 1, 1))
    slopes = [0.01, 0.02, 0.03, 0.04, 0.05]
    for parameter in made.parameters():
        nn.init.zeros_(parameter)
    made.norm.data[0, 0] = 100.0
    for slope, block in zip(slopes, made.children(), strict=True):
        for conv in block.convs:
            conv.weight.data[0, 0, 1, 1] = 1.0  # hands on red, the first channel
        block.projection.weight.data.fill_(slope)
        block.projection.bias.data.fill_(slope * 10)
    pictures = 255 * images(1, 37, 48)
    features, sides = (pictures[:, :1] - 100).relu(), []
    for k, slope in enumerate(slopes):
        pooled = functional.max_pool2d(features, 2**k)
        side = slope * (pooled + 10)
        sides.append(functional.interpolate(side, (37, 48), mode="bilinear", align_corners=False))
    assert torch.allclose(made(pictures), torch.stack(sides).mean(0), atol=1e-4)


def test_c_is_the_networks_sigmoid_whatever_the_batch(weights):
    control = Small(str(weights))
    pictures = images(20, 20, 33)
    c = control.h(pictures)
    assert c.shape == (20, 1, 20, 33)
    assert torch.allclose(c, torch.sigmoid(network()(255 * pictures)), atol=1e-6)
    assert c.std() > 0.05
    assert torch.allclose(control.h(pictures[3:4]), c[3:4], atol=1e-6)
    assert control.h(pictures.bfloat16()).dtype == torch.float32


def test_the_frozen_network_passes_gradients_to_the_picture(weights):
    control = Small(str(weights))
    assert checked(control, 32) is control
    c = control.h(images())
    pictures = images(seed=1).requires_grad_()
    value = control.log_prob(pictures, c)
    (gradient,) = torch.autograd.grad(value.sum(), pictures)
    assert value.shape == (2,)
    assert (gradient != 0).float().mean() > 0.9
    assert not any(p.requires_grad for p in control.network.parameters())
    assert not control.network.training
    assert not c.requires_grad


def test_heds_log_prob_passes_gradcheck(weights):
    control = Small(str(weights))
    c = control.h(images(1, 16, 16).double())
    assert c.dtype == torch.float64
    pictures = images(1, 16, 16, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: control.log_prob(x, c), pictures, fast_mode=True)
    assert control.h(images()).dtype == torch.float32


def test_hed_refuses_pictures_that_four_halvings_leave_empty(weights):
    with pytest.raises(UsageError, match="at least 16 x 16, got 15 x 32; soft-edge"):
        Small(str(weights)).h(images(1, 15, 32))


# Weights


@pytest.mark.parametrize("name", ["small.safetensors", "small.pth", "ControlNetHED.pth", "ControlNetHED.safetensors"])
def test_weights_load_from_both_formats_and_a_folder(name, tmp_path):
    state, file = network().state_dict(), tmp_path / name
    save_file(state, file) if file.suffix == ".safetensors" else torch.save(state, file)
    places = [str(file)] + ([str(tmp_path)] if name.startswith("ControlNetHED") else [])
    for place in places:
        loaded = Small(place).network.state_dict()
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_half_precision_weights_are_used_in_float32(tmp_path):
    torch.save(network().half().state_dict(), tmp_path / "half.pth")
    control = Small(str(tmp_path / "half.pth"))
    assert control.h(images()).dtype == torch.float32
    assert torch.equal(control.network.norm, network().norm)


def test_a_users_subclass_names_its_weights(weights, tmp_path):
    text = f"from jdm.controls import HED\nclass Mine(HED):\n    weights = {str(weights)!r}\n    widths = {NARROW}\n"
    (tmp_path / "mine.py").write_text(text)
    control = load_control(f"{tmp_path / 'mine.py'}:Mine")
    assert checked(control, 32) is control


def test_hed_fetches_weights_at_the_first_measurement(monkeypatch, weights):
    import huggingface_hub

    asked = []

    def download(*what) -> str:
        asked.append(what)
        return str(weights)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    control = load_control("hed")
    assert asked == []
    control.widths = NARROW
    for _ in range(2):
        control.h(images())
    assert asked == [("lllyasviel/Annotators", "ControlNetHED.pth")]


def test_unreachable_weights_say_where_to_get_them(monkeypatch):
    import huggingface_hub

    def offline(*what):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    message = (r"could not be fetched from lllyasviel/Annotators .OSError: no route to host.; fetch "
               r"ControlNetHED.pth.*class MyHED.HED.: weights = ")
    with pytest.raises(UsageError, match=message) as caught:
        checked(load_control("hed"), 32)
    assert "\n" not in str(caught.value)


class Malicious:
    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return (Path.touch, (self.place,))


@pytest.mark.parametrize("how", ["saved", "pickled"])
@pytest.mark.hostile("pickle")
def test_a_malicious_pickle_is_refused_before_it_runs(how, tmp_path):
    file, mark = tmp_path / "bad.pth", tmp_path / "mark"
    state = {**network().state_dict(), "norm": Malicious(mark)}
    torch.save(state, file) if how == "saved" else file.write_bytes(pickle.dumps(Malicious(mark)))
    with pytest.raises(UsageError, match=r"bad.pth cannot be read as weights .UnpicklingError.*; fetch") as caught:
        Small(str(file)).h(images())
    assert "\n" not in str(caught.value)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Malicious(mark)))
    assert mark.exists()  # it would have


def without_norm(state: dict) -> dict:
    return {key: value for key, value in state.items() if key != "norm"}


@pytest.mark.parametrize(("change", "message"), [
    (lambda state: [1, 2], "something other than named tensors"),
    (lambda state: {"epoch": 3}, "something other than named tensors"),
    (lambda state: {**state, "norm": torch.zeros(1, 3, 1, 1, dtype=torch.long)}, "norm in torch.int64"),
    (lambda state: {**state, "norm": torch.full((1, 3, 1, 1), float("nan"))}, "norm is not finite"),
    (lambda state: {**state, "norm": torch.zeros(1, 3, 1, 1, dtype=torch.float8_e4m3fn)}, "norm in torch.float8"),
    (without_norm, r"does not hold HED's weights: norm must be \[1, 3, 1, 1\], got nothing"),
    (lambda state: {**state, "norm": torch.zeros(3)}, r"norm must be \[1, 3, 1, 1\], got \[3\]"),
    (lambda state: {**state, "head.bias": torch.zeros(3)}, r"head.bias must be nothing, got \[3\]"),
])
@pytest.mark.hostile("weights")
def test_a_file_without_heds_weights_is_refused(change, message, tmp_path):
    torch.save(change(network().state_dict()), tmp_path / "other.pth")
    with pytest.raises(UsageError, match=rf"other.pth.*{message}.*; fetch ControlNetHED.pth") as caught:
        Small(str(tmp_path / "other.pth")).h(images())
    assert "\n" not in str(caught.value)


def test_damaged_or_missing_weights_are_refused(tmp_path):
    for name in ("noise.pth", "noise.safetensors"):
        (tmp_path / name).write_bytes(b"\x00\x01 no weights\n" * 20)
        with pytest.raises(UsageError, match=rf"{name} cannot be read as weights"):
            Small(str(tmp_path / name)).h(images())
    for place in (str(tmp_path / "none.pth"), "none.safetensors", str(tmp_path / "none"), "nowhere"):
        with pytest.raises(UsageError, match="do not exist; fetch"):
            Small(place).h(images())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"holds neither ControlNetHED.pth nor ControlNetHED.safetensors; fetch"):
        Small(str(tmp_path / "empty")).h(images())
    # The published architecture, and a narrower file.
    save_file(network().state_dict(), tmp_path / "small.safetensors")
    with pytest.raises(UsageError, match=r"block1.convs.0.weight must be \[64, 3, 3, 3\], got \[2, 3, 3, 3\]"):
        HED(str(tmp_path / "small.safetensors")).h(images())
