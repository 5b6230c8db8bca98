"""What hands give: strokes and blobs of paint, exact for measuring, random for training."""

import pytest
import torch

from jdm.controls import ColourHints, Control, Strokes, checked, load_control
from jdm.controls.base import control_of
from jdm.controls.colour_hints import DARKEST
from jdm.data.sources import load_pictures
from jdm.errors import UsageError
from jdm.space import from_bytes, unit

BOTH = [Strokes(), ColourHints()]


@pytest.fixture(scope="module")
def emoji() -> torch.Tensor:
    """Real pictures, [24, 3, 64, 64] in [0, 1]."""
    pictures = load_pictures("emoji", "test", 64)
    return unit(from_bytes(pictures.batch(torch.arange(0, len(pictures), len(pictures) // 24)[:24])))


def luck(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("control", BOTH, ids=lambda c: c.name)
def test_each_picture_is_drawn_by_its_own_luck(control, emoji):
    first = control.drawn(emoji, luck(24))
    assert torch.equal(control.drawn(emoji, luck(24)), first)
    assert torch.equal(control.drawn(emoji[5:9], luck(24)[5:9]), first[5:9])
    again = control.drawn(emoji[:1].expand(24, -1, -1, -1), luck(24))
    assert len({picture.numpy().tobytes() for picture in again}) > 20
    assert first.min() >= 0
    assert first.max() <= 1


@pytest.mark.parametrize("control", BOTH, ids=lambda c: c.name)
def test_only_training_draws_at_random(control, emoji):
    assert torch.equal(control_of(control, emoji), control.h(emoji))
    assert torch.equal(control_of(control, emoji, luck=luck(24)), control.drawn(emoji, luck(24)))
    canny = load_control("canny")
    assert torch.equal(control_of(canny, emoji, luck=luck(24)), canny.h(emoji))


@pytest.mark.parametrize("control", BOTH, ids=lambda c: c.name)
def test_the_drawn_picture_is_likelier_than_any_other(control, emoji):
    c = control.h(emoji)
    true, other = control.log_prob(emoji, c, emoji), control.log_prob(emoji.roll(1, 0), c, emoji)
    assert true.abs().max() < 1e-3
    assert (other < true - 50).sum() >= 23
    alone = control.log_prob(emoji, c) > control.log_prob(emoji.roll(1, 0), c)
    assert alone.sum() >= 23


@pytest.mark.parametrize("control", BOTH, ids=lambda c: c.name)
def test_ascent_draws_what_was_asked(control, emoji):
    asked, images = control.h(emoji[:8]), emoji[:8].roll(1, 0).clone().requires_grad_()
    before = (control.h(images) - asked).abs().mean()
    optimizer = torch.optim.Adam([images], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        (-control.log_prob(images, asked, emoji[:8]).sum()).backward()
        optimizer.step()
    assert (control.h(images.detach().clamp(0, 1)) - asked).abs().mean() < 0.5 * before


def test_a_hand_differs_but_follows_the_lines(emoji):
    control = Strokes()
    exact, drawn = control.h(emoji), control.drawn(emoji, luck(24))
    own = (exact - drawn).abs().mean()
    assert 0.01 < own < (exact - drawn.roll(1, 0)).abs().mean()
    assert (drawn.flatten(1).sum(1) > 10).all()  # no empty sheet


def test_strokes_find_the_outline_of_a_disc():
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    away = ((rows - 31.5).square() + (columns - 31.5).square()).sqrt()
    c = Strokes().h((away < 20).float().expand(1, 3, 64, 64))[0, 0]
    assert c[(away - 20).abs() < 0.5].mean() > 0.8
    assert not c[(away - 20).abs() > 3].any()


def test_strokes_of_a_larger_picture_are_wider(emoji):
    large = torch.nn.functional.interpolate(emoji, scale_factor=4, mode="bilinear")
    small, own = torch.nn.functional.avg_pool2d(Strokes().h(large), 4), Strokes().h(emoji)
    assert (small - own).abs().mean() < 0.5 * (small - own.roll(1, 0)).abs().mean()


def test_black_paint_is_not_bare_paper(emoji):
    control, black = ColourHints(), torch.zeros(1, 3, 64, 64)
    c = control.h(black)
    assert c.max() == pytest.approx(DARKEST)
    assert control.log_prob(black, c) == 0
    assert control.log_prob(black + 1, c) < -100
    assert control.log_prob(black + 1, torch.zeros_like(c)) == 0  # no paint asks for nothing


@pytest.mark.parametrize(("settings", "message"), [
    ({"low": 300}, "0 <= low <= high, got low 300 and high 240"),
    ({"smoothing": 0}, "strokes' smoothing must be above 0 and finite, got 0"),
    ({"width": float("nan")}, "strokes' width must be above 0 and finite, got nan")])
def test_strokes_refuse_settings_out_of_range(settings, message):
    with pytest.raises(UsageError, match=message):
        Strokes(**settings)


def test_colour_hints_refuse_settings_out_of_range():
    with pytest.raises(UsageError, match="colour-hints' radius must be above 0 and finite, got -1"):
        ColourHints(radius=-1)


def test_a_drawing_of_the_wrong_shape_is_refused():
    class Thin(Control):
        def h(self, images):
            return images.mean(1, keepdim=True)

        def drawn(self, images, luck):
            return images[:, :1, ::2]

    with pytest.raises(UsageError, match=r"Thin.drawn must return \[B, channels, H, W\], here \[2, 1, 32, 32\]"):
        checked(Thin(), 32)
