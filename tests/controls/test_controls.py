"""Controls: Canny is OpenCV's, its gradients are where they must be; a user's own is loaded and checked."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from jdm.controls import Canny, Control, checked, load_control
from jdm.controls.canny import GreyCanny, edge_magnitude
from jdm.errors import UsageError

EXAMPLE = Path(__file__).parents[2] / "examples" / "my_controls.py"


def photographs(side: int) -> Tensor:
    """Four squares of real photographs, [4, 3, side, side] in [0, 1]."""
    data = pytest.importorskip("skimage.data")
    person = data.astronaut()
    squares = [person, person[:200, 100:300], data.chelsea()[:, :300], data.coffee()[:, :400]]
    small = [cv2.resize(square, (side, side), interpolation=cv2.INTER_AREA) for square in squares]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float() / 255


def garments(n: int = 64) -> Tensor:
    """Grey shapes with soft noise on black, [n, 3, 32, 32]: like Fashion-MNIST padded to 32."""
    generator = torch.Generator().manual_seed(3)
    images = torch.zeros(n, 1, 32, 32)
    for image in images:
        top, left, height, width = (int(v) for v in torch.randint(4, 13, (4,), generator=generator))
        image[0, top : top + height, left : left + width] = 0.3 + 0.7 * torch.rand((), generator=generator)
    noise = 0.1 * torch.rand(images.shape, generator=generator) * (images > 0)
    return (images - noise).clamp(0, 1).expand(-1, 3, -1, -1)


def step(height: float = 1.0, side: int = 16) -> Tensor:
    """Black on the left, grey of `height` on the right: one vertical edge."""
    image = torch.zeros(1, 3, side, side)
    image[..., side // 2 :] = height
    return image


def nearly_flat(side: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 0.5 + 0.01 * torch.randn(1, 3, side, side, generator=generator)


def ascended(canny: Canny, c: Tensor, reference: Tensor | None, start: Tensor, steps: int = 150) -> Tensor:
    images = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([images], lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        (-canny.log_prob(images, c, reference).sum()).backward()
        optimizer.step()
        with torch.no_grad():
            images.clamp_(0, 1)
    return images.detach()


# h


@pytest.mark.parametrize("thresholds", [(100, 200), (50, 150), (30.5, 30.5)])
@pytest.mark.parametrize("pictures", [lambda: photographs(128), lambda: photographs(33), garments])
def test_h_equals_opencv_canny_pixel_by_pixel(pictures, thresholds):
    images = pictures()
    c = Canny(*thresholds).h(images)
    rgb = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for got, picture in zip(c, rgb, strict=True):
        expected = cv2.Canny(np.ascontiguousarray(picture), *thresholds)
        assert np.array_equal(got[0].numpy() * 255, expected)
    assert c.shape == (len(images), 1, *images.shape[2:])
    assert set(c.unique().tolist()) == {0.0, 1.0}


def test_h_clamps_overshoot_and_rounds_to_8_bits():
    images = photographs(32)
    assert torch.equal(Canny().h(images + 0.4 / 255), Canny().h(images))
    assert torch.equal(Canny().h(images * 3 - 1), Canny().h((images * 3 - 1).clamp(0, 1)))


def test_h_keeps_dtype_and_carries_no_gradient():
    images = garments(2).double().requires_grad_()
    c = Canny().h(images)
    assert c.dtype == torch.float64
    assert not c.requires_grad


@pytest.mark.parametrize("picture", ["astronaut", "coffee", "chelsea", "rocket"])
def test_colour_photographs_give_opencvs_own_map(picture):
    rgb = np.ascontiguousarray(getattr(pytest.importorskip("skimage.data"), picture)())
    images = torch.from_numpy(rgb).permute(2, 0, 1)[None].float() / 255
    found = {control: (control.h(images)[0, 0] * 255).to(torch.uint8).numpy() for control in (Canny(), GreyCanny())}
    assert (found[Canny()] == cv2.Canny(rgb, 100, 200)).all()
    assert (found[GreyCanny()] == cv2.Canny(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), 100, 200)).all()
    assert (found[Canny()] != found[GreyCanny()]).mean() > 0.02


def test_grey_pictures_have_one_map_in_both_variants():
    images = garments(64)
    assert torch.equal(Canny().h(images), load_control("canny-grey").h(images))
    assert torch.equal(edge_magnitude(images), edge_magnitude(images[:, :1]))


def test_the_cards_preprocessor_names_picture_and_thresholds():
    assert Canny(low=50, high=150).preprocessor == {
        "function": "cv2.Canny", "picture": "RGB, 8 bits", "low_threshold": 50, "high_threshold": 150}
    assert GreyCanny().preprocessor["picture"] == "grey, 8 bits"


def test_hard_edges_respect_both_thresholds():
    """Every hard edge is above low; every isolated peak above high is a hard edge."""
    images = photographs(96)
    magnitude = edge_magnitude((images * 255).round().double() / 255).round()
    edges = Canny().h(images) > 0
    neighbours = torch.nn.functional.max_pool2d(magnitude, 3, 1, 1)
    peaks = (magnitude == neighbours) & (magnitude > 200)
    around = torch.nn.functional.unfold(magnitude, 3, padding=1)
    ties = (around == magnitude.flatten(1).unsqueeze(1)).sum(1) > 1
    assert magnitude[edges].min() > 100
    assert edges[peaks & ~ties.view_as(peaks)].all()


# log_prob


@pytest.mark.parametrize("likelihood", ["reference", "blurred"])
def test_each_likelihood_passes_gradcheck(likelihood):
    generator = torch.Generator().manual_seed(1)
    reference = torch.rand(2, 3, 7, 6, generator=generator, dtype=torch.float64)
    images = torch.rand(2, 3, 7, 6, generator=generator, dtype=torch.float64).requires_grad_()
    canny = Canny(likelihood=likelihood)
    c = canny.h(reference)
    assert torch.autograd.gradcheck(lambda x: canny.log_prob(x, c, reference), images)


def test_log_prob_is_zero_only_at_the_reference():
    images = photographs(32)
    canny = Canny()
    c = canny.h(images)
    assert canny.log_prob(images, c, images).abs().max() < 1e-5  # a float32 sum over 1,024 pixels
    for value in (canny.log_prob(images.roll(1, 0), c, images), canny.log_prob(images, c)):
        assert value.shape == (4,)
        assert (value < 0).all()
    one = canny.log_prob(images[1:2], c[1:2])
    assert torch.allclose(one, canny.log_prob(images, c)[1:2], atol=1e-5)


@pytest.mark.parametrize("with_reference", [True, False])
def test_the_true_picture_is_the_likeliest(with_reference):
    images = photographs(48)
    canny = Canny()
    c = canny.h(images)
    reference = images if with_reference else None
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    true = canny.log_prob(images, c, reference)
    for other in (images.roll(1, 0), torch.full_like(images, 0.5), noise):
        assert (true > canny.log_prob(other, c, reference) + 0.1).all()


def test_auto_uses_the_reference_where_one_is_given():
    images, other = photographs(32), photographs(32).flip(0)
    c = Canny().h(images)
    assert torch.equal(Canny().log_prob(other, c, images),
                       Canny(likelihood="reference").log_prob(other, c, images))
    assert torch.equal(Canny().log_prob(other, c), Canny(likelihood="blurred").log_prob(other, c, images))


def test_bfloat16_pictures_are_read_in_float32():
    images = photographs(32).bfloat16()
    value = Canny().log_prob(images, Canny().h(images))
    assert value.dtype == torch.float32


@pytest.mark.parametrize("with_reference", [True, False])
def test_the_gradient_draws_a_missing_edge(with_reference):
    target, flat = step(), nearly_flat()
    canny = Canny()
    c = canny.h(target)
    assert canny.h(flat).sum() == 0
    images = flat.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        canny.log_prob(images, c, target if with_reference else None).sum(), images)
    near = torch.zeros(16, dtype=torch.bool)
    near[6:10] = True
    assert gradient[..., near].abs().mean() > 5 * gradient[..., ~near].abs().mean()
    moved = flat + 0.05 * gradient.sign()
    edges = c.bool()
    assert edge_magnitude(moved)[edges].mean() > edge_magnitude(flat)[edges].mean() + 20
    drawn = ascended(canny, c, target if with_reference else None, flat, steps=60)
    assert edge_magnitude(drawn)[edges].min() > 100
    # Not all rows: |gx| leaves the sign of the step open, and between rows of opposite sign there is no edge.
    assert canny.h(drawn)[..., 6:10].amax(-1).mean() > 0.6


@pytest.mark.parametrize("with_reference", [True, False])
def test_a_spurious_edge_is_pushed_down(with_reference):
    flat, spurious = torch.full((1, 3, 16, 16), 0.5), step()
    canny = Canny()
    c = canny.h(flat)
    edges = canny.h(spurious).bool()
    images = spurious.clone().requires_grad_()
    reference = flat if with_reference else None
    (gradient,) = torch.autograd.grad(canny.log_prob(images, c, reference).sum(), images)
    moved = spurious + 0.05 * gradient.sign()
    assert (edge_magnitude(moved)[edges] < edge_magnitude(spurious)[edges] - 20).all()
    assert canny.h(ascended(canny, c, reference, spurious, steps=100)).sum() == 0


def test_the_blurred_likelihood_forgives_a_small_shift():
    images = photographs(48)
    canny = Canny(likelihood="blurred")
    c = canny.h(images)
    true = canny.log_prob(images, c)
    shift = true - canny.log_prob(images.roll(1, -1), c)
    miss = true - canny.log_prob(torch.full_like(images, 0.5), c)
    assert (shift > 0).all()
    assert (miss > 3 * shift).all()
    two = true - canny.log_prob(images.roll(2, -1), c)
    assert (two > 1.3 * shift).all()


# Measured: .36 to .10 with the reference and to .06 with c alone, where blank is .22 and chance .34.
@pytest.mark.parametrize(("with_reference", "bound"), [(True, 0.4), (False, 0.25)])
def test_ascent_on_log_prob_recovers_edges_from_noise(with_reference, bound):
    images = photographs(48)
    canny = Canny()
    c = canny.h(images)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    noisy = (images + 0.3 * noise).clamp(0, 1)
    found = ascended(canny, c, images if with_reference else None, noisy)
    before, after = ((canny.h(x) - c).abs().mean() for x in (noisy, found))
    assert after < bound * before
    assert after < 0.75 * c.mean()  # a blank picture's consistency
    near = torch.nn.functional.max_pool2d(torch.stack([c, canny.h(found)]).flatten(0, 1), 3, 1, 1).chunk(2)
    assert (near[1] * c).sum() / c.sum() > 0.9  # edges of c found within one pixel
    assert (near[0] * canny.h(found)).sum() / canny.h(found).sum() > 0.9  # edges drawn that c has


@pytest.mark.parametrize(("bad", "message"), [
    ({"low": 300}, "0 <= low <= high, got low 300 and high 200"),
    ({"temperature": 0}, "temperature must be above 0"),
    ({"blur": float("nan")}, "blur must be above 0"),
    ({"likelihood": "soft"}, "auto, reference or blurred, got 'soft'"),
])
def test_canny_refuses_settings_without_meaning(bad, message):
    with pytest.raises(UsageError, match=message):
        Canny(**bad)


def test_the_reference_likelihood_says_what_it_needs():
    with pytest.raises(UsageError, match=r"needs the pictures c came from.*'auto' or 'blurred'"):
        Canny(likelihood="reference").log_prob(step(), step()[:, :1])


# load_control


def test_known_names_files_and_modules_load():
    assert load_control("canny") == Canny()
    assert load_control("jdm.controls.canny:Canny") == Canny()
    assert type(load_control(f"{EXAMPLE}:Posterize")).__name__ == "Posterize"


def test_two_files_of_one_name_both_load(tmp_path):
    text = ("from __future__ import annotations\nfrom dataclasses import dataclass\n"
            "from jdm.controls import Control\n"
            "@dataclass(frozen=True)\nclass Mine(Control):\n    k: int = {}\n")
    for k in (1, 2):
        (tmp_path / str(k)).mkdir()
        (tmp_path / str(k) / "mine.py").write_text(text.format(k))
    assert [load_control(f"{tmp_path / str(k) / 'mine.py'}:Mine").k for k in (1, 2)] == [1, 2]


BROKEN = """
from jdm.controls import Control
class Good(Control): pass
class Needy(Control):
    def __init__(self, k): pass
class Other: pass
"""


@pytest.mark.parametrize(("spec", "message"), [
    ("cany", "no control 'cany'; did you mean 'canny'"),
    ("zzz", "the known ones are canny"),
    ("{file}", "name your own by file and class"),
    ("{folder}/none.py:Good", r"there is no file .*none.py"),
    ("{file}:Goood", "no class Goood; did you mean Good"),
    ("{file}:Zzz", "its controls are: Good, Needy"),
    ("{file}:Needy", "without arguments .TypeError.*default"),
    ("{file}:Other", "is not a control; write `class Other.Control.`"),
    ("{file}:Control", "is not a control"),
    ("{folder}/raises.py:Good", "raises.py could not be run .ZeroDivisionError: "),
    ("{folder}/syntax.py:Good", "syntax.py could not be run .SyntaxError: "),
    ("no.such.package:Good", "could not be imported .ModuleNotFoundError.*my_controls.py:Posterize"),
])
def test_an_unloadable_control_is_refused_in_one_line(spec, message, tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    (tmp_path / "raises.py").write_text("1 / 0")
    (tmp_path / "syntax.py").write_text("def")
    with pytest.raises(UsageError, match=message) as caught:
        load_control(spec.format(file=tmp_path / "broken.py", folder=tmp_path))
    assert "\n" not in str(caught.value)


# checked


class Grey(Control):
    def h(self, images: Tensor) -> Tensor:
        return images.mean(1, keepdim=True)


@pytest.mark.parametrize("size", [32, 33])
def test_good_controls_pass_and_come_back_themselves(size):
    example = load_control(f"{EXAMPLE}:Posterize")
    for control in (Canny(), Canny(likelihood="reference"), Canny(likelihood="blurred"), Grey(), example):
        assert checked(control, size) is control
    with torch.no_grad():
        checked(Grey(), size)


def grey_with(**methods) -> Control:
    return type("Mine", (Grey,), methods)()


@pytest.mark.parametrize(("control", "message"), [
    (Control(), "Control must define h"),
    (grey_with(channels=2), "Mine.channels must be 1 or 3, got 2"),
    (grey_with(h=lambda s, x: x.numpy().mean(1)), "Mine.h must return a tensor, got ndarray"),
    (grey_with(h=lambda s, x: x), r"here \[2, 1, 16, 16\], got \[2, 3, 16, 16\]; set Mine.channels"),
    (grey_with(h=lambda s, x: x[:, :1, ::2]), r"got \[2, 1, 8, 16\]"),
    (grey_with(h=lambda s, x: (x[:, :1] * 255).byte()), "got torch.uint8; divide by 255"),
    (grey_with(h=lambda s, x: x[:, :1] * 2 - 1), r"in \[0, 1\], got -1.000 to .*clamp"),
    (grey_with(h=lambda s, x: x[:, :1] / x[:, :1]), "must be finite"),
    (grey_with(h=lambda s, x: x @ x[0, 0, :3]), "Mine.h failed on two random pictures .RuntimeError"),
    (grey_with(h=lambda s, x: (x[:, :1] > 0.5).float()), "no gradient with respect to the picture"),
    (grey_with(h=lambda s, x: x[:, :1].round()), "gradient is 0 at every pixel; keep its operations"),
    (grey_with(h=lambda s, x: x[:, :1].sqrt()), "gradient must be finite.*small constant"),
    (grey_with(log_prob=lambda s, x, c, r=None: x.mean()), r"one value per picture, \[2\] here, got \[\]"),
    (grey_with(log_prob=lambda s, x, c, r=None: None), "got NoneType"),
    (grey_with(log_prob=lambda s, x, c, r=None: x.amin((1, 2, 3)).log()), "log_prob must be finite"),
    (grey_with(log_prob=lambda s, x, c, r=None: x.detach().mean((1, 2, 3))), "no gradient"),
    (grey_with(log_prob=lambda s, x, c, r=None: torch.tensor(x.numpy())), "log_prob failed on two random"),
    (grey_with(log_prob=lambda s, x, c, r=None: torch.ones(2, requires_grad=True)), "cannot be different"),
])
def test_a_bad_control_is_refused_with_a_remedy(control, message):
    with pytest.raises(UsageError, match=message) as caught:
        checked(control, 16)
    assert "\n" not in str(caught.value)
    assert type(control).__name__ in str(caught.value)


def test_a_single_channel_is_shown_as_three():
    c = Canny().h(garments(2))
    assert torch.equal(Canny().image(c), c.repeat(1, 3, 1, 1))
