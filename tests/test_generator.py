"""The generator: one step against diffusers' DDIM, several against their closed form, and its noise."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from jdm.errors import UsageError
from jdm.generator import Generator, blended_noise, fresh_noise, starting_noise
from jdm.schedule import FlowSchedule, NoiseSchedule
from worlds import LinearGaussianWorld, cubature

REFERENCE = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
SCHEDULE = NoiseSchedule.scaled_linear()
LEVELS = (999, 749, 499, 249)


def net(z, timestep, text, control):
    """A closed-form output of everything a generator is given."""
    return 0.3 * torch.tanh(z) + 0.001 * timestep[:, None, None, None] + text + control.mean()


def prompts(y):
    return torch.tensor([len(p) for p in y]).float()[:, None, None, None]


@pytest.mark.filterwarnings("ignore:To copy construct:UserWarning")
@pytest.mark.parametrize("level", [0, 399, 625, 999])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_one_step_is_ddims_on_the_first_betas(level, prediction):
    schedule = NoiseSchedule(REFERENCE.alphas_cumprod)
    generator = Generator(net, schedule, [level], prompts, prediction)
    z, y, control = starting_noise((3, 4, 2, 2), seed=0), ["", "a", "bc"], torch.full((3, 3, 4, 4), 0.2)
    stock = DDIMScheduler(trained_betas=REFERENCE.betas[: level + 1], num_train_timesteps=level + 1,
                          timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False,
                          prediction_type=prediction)
    stock.set_timesteps(1)
    assert stock.timesteps.tolist() == [level]
    assert stock.init_noise_sigma == 1
    output = net(z, stock.timesteps.expand(3), prompts(y), control)
    x = stock.step(output, stock.timesteps[0], z).prev_sample
    torch.testing.assert_close(generator(z, y, control), x, atol=1e-6, rtol=1e-6)


def test_the_generator_feeds_its_noise_as_it_is():
    seen = []

    def spy(z, timestep, text, control):
        seen.append((z, timestep, control))
        return torch.zeros_like(z)

    z = starting_noise((2, 4, 2, 2), seed=1)
    x = Generator(spy, SCHEDULE, [625], prompts)(z, ["", ""])
    ((fed, timestep, control),) = seen
    assert torch.equal(fed, z)
    assert timestep.tolist() == [625, 625]
    assert control is None
    torch.testing.assert_close(x, z / SCHEDULE.alphas_cumprod[625].sqrt().float())


def test_a_flow_generator_is_told_its_own_times():
    schedule, seen = FlowSchedule(shift=3.0), []

    def spy(z, timestep, text, control):
        seen.append(timestep.tolist())
        return torch.zeros_like(z)

    z = starting_noise((1, 4, 2, 2), seed=1)
    Generator(spy, schedule, [999, 499], prompts, "flow")(z, [""], renoise=lambda k: z)
    assert seen == [[1000.0], [750.0]]


@pytest.mark.parametrize("levels", [(), (499, 999), (500, 500), (1000,), (-1,)])
def test_levels_that_cannot_be_run_are_refused(levels):
    with pytest.raises(UsageError, match=r"one or more indices in 0\.\.999 that strictly decrease, got"):
        Generator(net, SCHEDULE, levels, prompts)


def test_several_steps_without_fresh_noise_are_refused():
    generator, z = Generator(net, SCHEDULE, LEVELS, prompts), torch.zeros(1, 4, 2, 2)
    control = torch.zeros(1, 3, 4, 4)
    for run in (lambda: generator(z, [""], control), lambda: generator.rollout(z, [""], control, 1)):
        with pytest.raises(UsageError, match="a generator of 4 steps needs fresh noise between them; pass renoise="):
            run()
    with pytest.raises(UsageError, match="has no step 4"):
        generator.rollout(z, [""], control, 4)
    assert generator.rollout(z, [""], control, 0).shape == z.shape, "the first step needs none"


# --- backward simulation ---


class Linear:
    """A denoiser x0 = mean + gains[k] (x_t - alpha_k mean) at level k, in float64; it predicts the sample."""

    def __init__(self, world: LinearGaussianWorld):
        t = SCHEDULE.t(torch.tensor(LEVELS))
        self.mean, self.alpha = world.data.mean, SCHEDULE.alpha(t).double()
        self.sigma = SCHEDULE.sigma(t).double()
        self.gains = [gain.clone().requires_grad_() for gain in world.data.posterior_gain(t)]

    def __call__(self, x_t, timestep, text, control):
        k = LEVELS.index(int(timestep[0]))
        return self.mean + (x_t - self.alpha[k] * self.mean) @ self.gains[k].T


@pytest.mark.parametrize("last", range(4))
def test_a_rollouts_gradient_is_that_of_its_step(last):
    """d/dG of E|x|^2 / 2 at the drawn step is E[x u^T], u = x_t - alpha mean: its moments go from step to step."""
    linear = Linear(LinearGaussianWorld.example(SCHEDULE))
    noise = cubature(3 * len(LEVELS)).split(3, dim=1)  # their average is the expectation, exactly
    z = noise[0].clone().requires_grad_()
    generator = Generator(linear, SCHEDULE, LEVELS, lambda y: None, "sample")
    x = generator.rollout(z, [], None, last, lambda k: noise[k])
    (x.square().sum(1).mean() / 2).backward()

    mean, cov = -linear.alpha[0] * linear.mean, torch.eye(3).double()  # of u at the first step: z - alpha mean
    for k in range(last):
        gain, alpha, sigma = linear.gains[k].detach(), linear.alpha[k + 1], linear.sigma[k + 1]
        mean, cov = alpha * gain @ mean, alpha**2 * gain @ cov @ gain.T + sigma**2 * torch.eye(3).double()
    exact = torch.outer(linear.mean, mean) + linear.gains[last].detach() @ (cov + torch.outer(mean, mean))
    torch.testing.assert_close(linear.gains[last].grad, exact, atol=1e-10, rtol=1e-10)
    assert [k for k in range(4) if linear.gains[k].grad is not None] == [last]
    assert (z.grad is not None) == (last == 0)


def test_a_whole_rollout_draws_the_generators_sample():
    linear = Linear(LinearGaussianWorld.example(SCHEDULE))
    noise = torch.randn(4, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    generator = Generator(linear, SCHEDULE, LEVELS, lambda y: None, "sample")
    whole = generator(noise[0], [], renoise=lambda k: noise[k])
    assert torch.equal(generator.rollout(noise[0], [], None, 3, lambda k: noise[k]), whole)
    assert not torch.equal(generator.rollout(noise[0], [], None, 2, lambda k: noise[k]), whole)


# --- noise ---


def test_starting_noise_does_not_depend_on_the_batch():
    assert torch.equal(starting_noise((8, 4, 2, 2), seed=7)[:3], starting_noise((3, 4, 2, 2), seed=7))
    pictures = starting_noise((400, 4, 4, 4), seed=7)
    assert not torch.equal(pictures[0], pictures[1])
    assert not torch.equal(pictures[0], starting_noise((1, 4, 4, 4), seed=8)[0])
    # 25,600 standard normal numbers: three standard errors.
    assert abs(float(pictures.mean())) < 0.019
    assert abs(float(pictures.var()) - 1) < 0.027


def test_each_step_has_noise_of_its_own():
    steps = [fresh_noise((400, 4, 4, 4), 7, k) for k in range(4)]
    assert torch.equal(steps[0], starting_noise((400, 4, 4, 4), 7))
    assert torch.equal(steps[3][:3], fresh_noise((3, 4, 4, 4), 7, 3))
    flat = torch.stack([step.flatten() for step in steps])
    # Four standard errors of a correlation of 25,600 pairs.
    assert (torch.corrcoef(flat) - torch.eye(4)).abs().max() < 4 / 160


def test_blended_noise_stays_standard_normal():
    shape = (2, 4, 64, 64)
    a, b = starting_noise(shape, 1), starting_noise(shape, 2)
    assert torch.equal(blended_noise(shape, 1, 2, 0), a)
    assert torch.equal(blended_noise(shape, 1, 2, 1), b)
    middle = blended_noise(shape, 1, 2, 0.5)
    torch.testing.assert_close(middle, (a + b) / 2**0.5)
    assert float(middle.std()) == pytest.approx(1, abs=0.01)  # 32,768 numbers: an error of 0.004
    with pytest.raises(UsageError, match=r"blend must be in \[0, 1\], got 1.5"):
        blended_noise(shape, 1, 2, 1.5)
