"""Control at sampling: Tweedie's formula in the Gaussian world, its cost, and its pictures."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from jdm.cli.parser import main
from jdm.evaluation.sampling import Sampler
from jdm.evaluation.steering import Steering, frozen_posterior
from jdm.generator import fresh_noise, starting_noise
from jdm.library import load_model
from jdm.schedule import NoiseSchedule
from worlds import LinearGaussianWorld

SCHEDULE = NoiseSchedule.scaled_linear()
WORLD = LinearGaussianWorld.example(SCHEDULE)


def rows(n: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    x_t, c = torch.randn(n, 3, generator=random).double(), torch.randn(n, 2, generator=random).double()
    return x_t, SCHEDULE.grid(torch.rand(n, generator=random), 0.05, 0.95), c


def conditional_mean(x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
    """E[x | x_t, c]: c = A x + noise observed beside x_t."""
    mean, cov = WORLD.data.posterior_mean(x_t, t), WORLD.data.posterior_cov(t)
    gain = cov @ WORLD.A.T @ torch.linalg.inv(WORLD.A @ cov @ WORLD.A.T + WORLD.R)
    return mean + (gain @ (c - mean @ WORLD.A.T)[:, :, None]).squeeze(2)


def test_the_exact_likelihood_steers_to_the_conditional_mean():
    x_t, t, c = rows()
    steering = Steering(lambda v: WORLD.log_prob_t(c, v, t), lambda v, t, y: v, bound=math.inf)
    ours = steering(lambda v: WORLD.data.score(v, t), x_t, t, [])
    torch.testing.assert_close(ours.x0, conditional_mean(x_t, t, c), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("own", [True, False])
def test_the_plug_in_has_its_closed_form(own):
    """Through the sampler's own x0, the posterior mean; or through the consistency function."""
    x_t, t, c = rows()
    data = WORLD.data
    f, gain = (None, data.posterior_gain(t)) if own else (data.consistency, data.consistency_gain(t))
    steering = Steering(lambda x: WORLD.log_prob(c, x), f, weight=0.5, bound=math.inf)
    ours = steering(lambda v: data.score(v, t), x_t, t, [])
    alpha, sigma = (v.double()[:, None] for v in (SCHEDULE.alpha(t), SCHEDULE.sigma(t)))
    exact = data.posterior_mean(x_t, t) + 0.5 * sigma**2 / alpha * WORLD.plug_in_gradient(c, x_t, t, gain)
    torch.testing.assert_close(ours.x0, exact, atol=1e-4, rtol=1e-4)
    assert not ours.x0.requires_grad
    # What the scheduler is given reads back as the same x0.
    torch.testing.assert_close((x_t - sigma * ours.read("epsilon")) / alpha, ours.x0)


def test_a_step_moves_x0_within_its_bound():
    x_t, t, c = rows()
    plain = WORLD.data.score(x_t, t).x0
    steering = Steering(lambda x: 1e6 * WORLD.log_prob(c, x), WORLD.data.consistency, bound=0.3)
    moved = (steering(lambda v: WORLD.data.score(v, t), x_t, t, []).x0 - plain).norm(dim=1)
    torch.testing.assert_close(moved, 0.3 * plain.norm(dim=1), atol=1e-6, rtol=1e-6)


# --- models ---


def bright(x: Tensor) -> Tensor:
    """log p(c | x), highest where the first channel is 2 everywhere."""
    return -(x[:, 0] - 2).square().flatten(1).sum(1)


@pytest.mark.parametrize("steps", [6, 4])
@pytest.mark.parametrize("by", ["posterior", "x0"])
def test_samples_follow_the_control(by, steps, teacher):
    """The multi-step teacher in 6 steps, and the student of four."""
    model: Any = load_model(str(teacher if steps == 6 else teacher.with_name("student-4")))
    model = model.with_networks(controlnet=None)
    f = frozen_posterior(load_model(str(teacher)), model.schedule) if by == "posterior" else None
    shape = model.latent_shape(2, 32)
    z = starting_noise(shape, 0)
    plain, steered = (Sampler(model, steps, 1.0, steering=s) for s in (None, Steering(bright, f)))
    with torch.no_grad():
        a, b = (s.x(z, ["a coat"] * 2, None, lambda k: fresh_noise(shape, 0, k)) for s in (plain, steered))
    assert (bright(b) > bright(a)).all()
    assert (plain.nfe, steered.nfe) == (steps, 2 * steps if f else steps)


def test_sample_steers_from_the_command_line(teacher, tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (32, 32), (200, 10, 10)).save(tmp_path / "photo.png")
    start = ["sample", str(teacher), "--prompt", "a coat", "--steps", "2", "--n", "1", "--out", str(tmp_path / "out")]
    image = ["--image", str(tmp_path / "photo.png")]
    assert main([*start, *image, "--steer", "soft-edge", "--posterior", str(teacher)]) == 0
    assert main([*start, *image, "--steer", "soft-edge"]) == 0
    for flags, said in ((["--steer", "canny"], "give one with --image"), (["--posterior", "x"], "add --steer"),
                        ([*image, "--steer", "canny", "--steer-weight", "0"], "must be above 0 and finite, got 0"),
                        ([*image, "--steer", "canny", "--steer-weight", "nan"], "must be above 0 and finite, got nan")):
        assert main([*start, *flags]) == 2
        assert said in capsys.readouterr().err
