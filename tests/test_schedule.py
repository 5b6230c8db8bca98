"""The schedule and the one-step generator against diffusers' schedulers."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from jdm.errors import UsageError
from jdm.generator import Generator, starting_noise
from jdm.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.scaled_linear()
REFERENCE = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
ALL = torch.arange(1000)


def test_alphas_cumprod_are_those_of_stable_diffusion():
    # diffusers multiplies 1000 float32 numbers; here float64.
    ours = SCHEDULE.alphas_cumprod.float()
    torch.testing.assert_close(ours, REFERENCE.alphas_cumprod, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
def test_noised_is_add_noise_of_the_schedulers_at_every_level(scheduler):
    reference = scheduler.from_config(REFERENCE.config)
    x, eps = torch.randn(2, 1000, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(SCHEDULE.noised(x, SCHEDULE.t(ALL), eps), reference.add_noise(x, eps, ALL),
                               atol=1e-5, rtol=1e-5)


def test_noised_from_the_schedulers_own_table_is_add_noise_to_rounding():
    schedule = NoiseSchedule(REFERENCE.alphas_cumprod)
    x, eps = torch.randn(2, 1000, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(schedule.noised(x, schedule.t(ALL), eps), REFERENCE.add_noise(x, eps, ALL),
                               atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_index_survives_the_round_trip_through_t(dtype):
    assert torch.equal(SCHEDULE.index(SCHEDULE.t(ALL).to(dtype)), ALL)
    assert torch.equal(SCHEDULE.t(999), torch.tensor(1.0, dtype=torch.float64))


def test_t_zero_is_exactly_clean_and_alpha_and_sigma_preserve_variance():
    zero = torch.zeros(2)
    x = torch.randn(2, 3)
    assert torch.equal(SCHEDULE.noised(x, zero, torch.randn(2, 3)), x)
    t = SCHEDULE.t(ALL)
    torch.testing.assert_close(SCHEDULE.alpha(t) ** 2 + SCHEDULE.sigma(t) ** 2, torch.ones(1000))
    assert (SCHEDULE.sigma(t).diff() > 0).all()


def test_grid_draws_every_level_of_its_range_equally_often_and_never_t_zero():
    uniform = (torch.arange(9610) + 0.5) / 9610
    index, counts = SCHEDULE.index(SCHEDULE.grid(uniform, 0.02, 0.98)).unique(return_counts=True)
    assert torch.equal(index, torch.arange(19, 980))
    assert (counts == 10).all()
    assert SCHEDULE.grid(torch.zeros(1), 0.0, 1.0) == 1 / 1000
    assert SCHEDULE.grid(torch.tensor([1 - 2**-24]), 0.0, 1.0) == 1


def test_indices_in_place_of_t_and_empty_ranges_are_refused():
    with pytest.raises(UsageError, match="timestep indices"):
        SCHEDULE.alpha(torch.tensor([937.0]))
    with pytest.raises(UsageError, match="t must be in"):
        SCHEDULE.index(torch.tensor([-0.1]))
    for low, high in ((0.9, 0.2), (0.5, 1.5)):
        with pytest.raises(UsageError, match="t range"):
            SCHEDULE.grid(torch.zeros(1), low, high)


def test_a_schedule_of_zero_terminal_snr_is_refused():
    with pytest.raises(UsageError, match="zero"):
        NoiseSchedule(torch.tensor([0.9, 0.5, 0.0]))


def net(z, index, text, control):
    """A closed-form eps of everything a generator is given."""
    return 0.3 * torch.tanh(z) + 0.001 * index[:, None, None, None] + text + control.mean()


def prompts(y):
    return torch.tensor([len(p) for p in y]).float()[:, None, None, None]


@pytest.mark.filterwarnings("ignore:To copy construct:UserWarning")
@pytest.mark.parametrize("t_init", [0, 399, 625, 999])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_one_ddim_step_on_the_first_betas_is_the_generator(t_init, prediction):
    schedule = NoiseSchedule(REFERENCE.alphas_cumprod)
    generator = Generator(net, schedule, t_init, prompts, prediction)
    z, y, control = starting_noise((3, 4, 2, 2), seed=0), ["", "a", "bc"], torch.full((3, 3, 4, 4), 0.2)
    stock = DDIMScheduler(trained_betas=REFERENCE.betas[: t_init + 1], num_train_timesteps=t_init + 1,
                          timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False,
                          prediction_type=prediction)
    stock.set_timesteps(1)
    assert stock.timesteps.tolist() == [t_init]
    assert stock.init_noise_sigma == 1
    output = net(z, stock.timesteps.expand(3), prompts(y), control)
    x = stock.step(output, stock.timesteps[0], z).prev_sample
    # Our v becomes eps first, so its rounding is divided by alpha (.068 at 999); diffusers' does not.
    tolerance = 1e-6 if prediction == "epsilon" else 1e-5
    torch.testing.assert_close(generator(z, y, control), x, atol=tolerance, rtol=1e-6)


def test_the_generator_feeds_its_noise_as_it_is_at_its_own_level():
    seen = []

    def spy(z, index, text, control):
        seen.append((z, index, control))
        return torch.zeros_like(z)

    z = starting_noise((2, 4, 2, 2), seed=1)
    x = Generator(spy, SCHEDULE, 625, prompts)(z, ["", ""])
    ((fed, index, control),) = seen
    assert torch.equal(fed, z)
    assert index.tolist() == [625, 625]
    assert control is None
    torch.testing.assert_close(x, z / SCHEDULE.alphas_cumprod[625].sqrt().float())


def test_starting_noise_of_a_picture_does_not_depend_on_the_batch():
    assert torch.equal(starting_noise((8, 4, 2, 2), seed=7)[:3], starting_noise((3, 4, 2, 2), seed=7))
    pictures = starting_noise((400, 4, 4, 4), seed=7)
    assert not torch.equal(pictures[0], pictures[1])
    assert not torch.equal(pictures[0], starting_noise((1, 4, 4, 4), seed=8)[0])
    # 25,600 standard normal numbers: three standard errors.
    assert abs(float(pictures.mean())) < 0.019
    assert abs(float(pictures.var()) - 1) < 0.027
