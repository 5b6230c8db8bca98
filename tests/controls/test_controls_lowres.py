"""Low resolution: the kernel is nearest-exact, the likelihood's gradient reaches every pixel."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from jdm.controls import LowRes, LowRes8, checked, load_control
from jdm.controls.base import NAMED
from jdm.errors import UsageError


def pictures(n: int = 4, side: int = 32) -> Tensor:
    """Textured squares on black, [n, 3, side, side], with a border of padding as Fashion-MNIST has at 32."""
    images = torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0))
    images[..., :2, :] = images[..., -2:, :] = images[..., :2] = images[..., -2:] = 0
    return images


@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_c_is_nearest_exact_down_and_up_again(factor):
    images = pictures(2, 24)
    c = LowRes(factor).h(images)
    small = interpolate(images, scale_factor=1 / factor, mode="nearest-exact")
    assert torch.equal(c, interpolate(small, images.shape[-2:], mode="nearest-exact"))
    for image, got in zip(images[:, 0].numpy(), c[:, 0, ::factor, ::factor].numpy(), strict=True):
        assert np.array_equal(np.array(Image.fromarray(image).resize(got.shape, Image.Resampling.NEAREST)), got)
        assert np.array_equal(cv2.resize(image, got.shape, interpolation=cv2.INTER_NEAREST_EXACT), got)


@pytest.mark.parametrize("factor", [4, 8])
def test_nearest_exact_does_not_read_the_padding(factor):
    images = pictures()
    small = interpolate(images, scale_factor=1 / factor, mode="nearest")
    assert not small[..., 0, :].any()
    assert LowRes(factor).h(images)[..., 0, 2:-2].any()
    assert not torch.equal(LowRes(factor).h(images), interpolate(small, images.shape[-2:], mode="nearest"))


def test_c_has_one_value_per_block():
    c = LowRes().h(torch.rand(2, 3, 8, 12).double())
    assert c.shape == (2, 3, 8, 12)
    assert c.dtype == torch.float64
    blocks = c.unfold(2, 4, 4).unfold(3, 4, 4).flatten(-2)
    assert torch.equal(blocks, blocks[..., :1].expand_as(blocks))
    assert torch.allclose(LowRes().area(c), blocks[..., 0])


@pytest.mark.parametrize("with_reference", [True, False])
def test_log_prob_passes_gradcheck(with_reference):
    generator = torch.Generator().manual_seed(1)
    images, reference = torch.rand(2, 2, 3, 8, 4, generator=generator, dtype=torch.float64)
    c = LowRes().h(reference)
    assert torch.autograd.gradcheck(
        lambda x: LowRes().log_prob(x, c, reference if with_reference else None), images.requires_grad_())


@pytest.mark.parametrize("with_reference", [True, False])
def test_log_prob_is_the_gaussian_of_block_means(with_reference):
    reference, images = pictures(), pictures().roll(1, 0).requires_grad_()
    control = LowRes(4, temperature=0.2)
    value = control.log_prob(images, control.h(reference), reference if with_reference else None)
    means = images.view(4, 3, 8, 4, 8, 4).mean((3, 5))
    target = reference.view(4, 3, 8, 4, 8, 4).mean((3, 5)) if with_reference else reference[..., 2::4, 2::4]
    expected = -((means - target) ** 2).sum((1, 2, 3)) / (2 * 0.2**2)
    assert torch.allclose(value, expected, rtol=1e-5)
    (gradient,) = torch.autograd.grad(value.sum(), images)
    assert (gradient != 0).all()


def test_without_a_reference_texture_costs_log_prob():
    """With a reference, the true picture is the maximum."""
    images = pictures()
    c = LowRes().h(images)
    assert not LowRes().log_prob(images, c, images).any()
    assert (LowRes().log_prob(images, c) < -1).all()
    assert not LowRes().log_prob(c, c).any()
    for reference in (images, None):
        true = LowRes().log_prob(images, c, reference)
        for other in (images.roll(1, 0) / 2, torch.zeros_like(images)):
            assert (true > LowRes().log_prob(other, c, reference)).all()


def test_ascent_brings_a_blank_to_c():
    images = pictures()
    c = LowRes().h(images)
    x = torch.zeros_like(images).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        (-LowRes().log_prob(x, c).sum()).backward()
        optimizer.step()
    assert (LowRes().h(x) - c).abs().mean() < 0.02 * c.mean()


def test_bfloat16_pictures_are_compared_in_float32():
    images = pictures().bfloat16()
    value = LowRes().log_prob(images.roll(1, 0), LowRes().h(images), images)
    assert value.dtype == torch.float32


def test_both_factors_load_by_name():
    assert load_control("lowres") == LowRes(4)
    assert load_control("lowres8") == LowRes8() == LowRes8(8)
    for name in ("lowres", "lowres8"):
        control = load_control(name)
        assert control.name == name
        assert NAMED[name].startswith("jdm.controls.lowres:")
        assert checked(control, 32) is control


@pytest.mark.parametrize("shape", [(33, 32), (32, 30)])
def test_sides_must_be_multiples_of_the_factor(shape):
    images = torch.rand(1, 3, *shape)
    message = f"lowres needs sides that are multiples of 4, got {shape[0]} x {shape[1]}; crop or pad"
    with pytest.raises(UsageError, match=message):
        LowRes().h(images)
    with pytest.raises(UsageError, match=message):
        LowRes().log_prob(images, images)
    with pytest.raises(UsageError, match="lowres8 needs sides that are multiples of 8, got 36 x 36"):
        checked(LowRes8(), 36)


@pytest.mark.parametrize(("bad", "message"), [
    ({"factor": 1}, "factor must be a whole number, at least 2, got 1"),
    ({"factor": 2.5}, "factor must be a whole number, at least 2, got 2.5"),
    ({"temperature": 0}, "temperature must be above 0 and finite, got 0"),
])
def test_lowres_refuses_settings_without_meaning(bad, message):
    with pytest.raises(UsageError, match=message):
        LowRes(**bad)
