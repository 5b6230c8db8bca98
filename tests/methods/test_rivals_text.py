"""JDM for text-to-image: guidance across schedules, its sum of terms, and teachers that cannot guide."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import tiny
from jdm.errors import UsageError
from jdm.methods.diff_instruct import DiffInstruct
from jdm.methods.text_to_image import TextToImage, guidance_of, guide_of
from jdm.models.folder import save_pipeline
from jdm.models.stable_diffusion import StableDiffusion
from jdm.recipes import all_recipes
from jdm.schedule import NoiseSchedule, matched
from jdm.score import Estimate, ScoreModel
from jdm.terms import cfg_augmentation, picture_by_picture
from jdm.training.loop import Trainer
from worlds import Gaussian, Rows, cubature, tensor

OURS = NoiseSchedule.scaled_linear()
# Another family's ramp, of fewer levels and of a wider range: every ratio of OURS lies inside.
THEIRS = NoiseSchedule(torch.cumprod(1 - torch.linspace(4e-4, 0.04, 500).double(), 0))
PROMPTS = ("a", "coat", "dress")


def log_snr(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    return torch.logit(schedule.alphas_cumprod[schedule.timestep(t)])


def every(schedule: NoiseSchedule) -> Tensor:
    return schedule.t(torch.arange(schedule.n))


class GaussianNet:
    """eps or v of x ~ N(mean + text, cov) on a schedule of its own; text is [B, 3], the prompt's mean."""

    def __init__(self, mean: Tensor, cov: Tensor, schedule: NoiseSchedule, velocity: bool = False):
        self.mean, self.cov, self.schedule, self.velocity = mean, cov, schedule, velocity

    def __call__(self, x_t: Tensor, index: Tensor, text: Tensor) -> Tensor:
        t = self.schedule.t(index)
        alpha = self.schedule.alpha(t).double()[:, None]
        shifted = Gaussian(self.mean, self.cov, self.schedule).score(x_t - alpha * text, t)
        estimate = Estimate(x_t, shifted.eps, shifted.alpha, shifted.sigma)
        return estimate.v if self.velocity else estimate.eps

    def model(self, guidance: float = 1.0) -> ScoreModel:
        return ScoreModel(self, self.schedule, "v_prediction" if self.velocity else "epsilon", meant, guidance)


def meant(y) -> Tensor:
    """A prompt's mean: the empty one's is 0."""
    return tensor([[0.3 * len(prompt), -0.1 * len(prompt), 0.0] for prompt in y])


def gaussian(seed: int, schedule: NoiseSchedule, velocity: bool = False) -> GaussianNet:
    random = torch.Generator().manual_seed(seed)
    root, mean = torch.randn(3, 3, generator=random).double(), torch.randn(3, generator=random).double()
    return GaussianNet(mean, root @ root.T / 3 + 0.2 * torch.eye(3), schedule, velocity)


def rows(n: int = 60) -> Rows:
    """x, t over the whole range, prompts in turn."""
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(0)).double()
    t = OURS.grid(torch.linspace(0, 0.999, n), 0.02, 0.98)
    return Rows(x, t, cubature(n // 2)[:, :3], y=PROMPTS * (n // 3))


# --- two schedules ---


def test_on_one_schedule_matching_is_the_identity():
    t = every(OURS)
    torch.testing.assert_close(matched(OURS, NoiseSchedule.scaled_linear(), t), t)


def test_matched_levels_of_two_schedules_agree_in_signal_to_noise_to_half_a_level():
    t = every(OURS)
    own, wanted = log_snr(THEIRS, every(THEIRS)), log_snr(OURS, t)
    assert own.min() < wanted.min()
    assert own.max() > wanted.max()
    found = log_snr(THEIRS, matched(THEIRS, OURS, t))
    above = torch.searchsorted(-own, -wanted).clamp(1, len(own) - 1)
    half = (own[above - 1] - own[above]) / 2  # the two levels around the wanted ratio
    assert ((found - wanted).abs() <= half + 1e-9).all()


def test_a_ratio_beyond_the_guides_schedule_is_refused():
    with pytest.raises(UsageError, match="lies outside the other schedule's"):
        matched(NoiseSchedule(OURS.alphas_cumprod[:500]), OURS, tensor([1.0]))


def test_a_teacher_that_guides_itself_gives_its_own_guidance():
    step, model = rows(), gaussian(0, OURS).model()
    x_t, t, _ = step.noised("", OURS, (0, 1))
    ours = guidance_of(model, OURS, x_t, t, list(step.y))
    own = model.conditional_and_unconditional(x_t, t, list(step.y))
    for a, b in zip(ours, own, strict=True):
        torch.testing.assert_close(a.score, b.score)
    torch.testing.assert_close(cfg_augmentation(*ours), cfg_augmentation(*own))


def test_a_guide_on_another_schedule_in_v_gives_its_score_of_this_schedules_x_t():
    step, guide = rows(), gaussian(1, THEIRS, velocity=True)
    x_t, t, _ = step.noised("", OURS, (0, 1))
    ours = guidance_of(guide.model(), OURS, x_t, t, list(step.y))
    for estimate, text in zip(ours, (meant(step.y), 0 * meant(step.y)), strict=True):
        alpha = OURS.alpha(t).double()[:, None]
        exact = Gaussian(guide.mean, guide.cov, OURS).score(x_t - alpha * text, t)
        apart = (log_snr(THEIRS, matched(THEIRS, OURS, t)) - log_snr(OURS, t)).abs()  # half a level at most
        # u = sigma / alpha moves by half of that, and eps = u (cov + u^2 I)^-1 (x_t / alpha - mean) by no more than u.
        gap = (estimate.eps - exact.eps).norm(dim=1) / exact.eps.norm(dim=1)
        assert (gap < (apart / 2).expm1() + 1e-4).all()
        assert 0.001 < apart.max() < 0.03
        torch.testing.assert_close(estimate.x_t, x_t)


def test_a_guide_is_exact_where_its_level_has_this_levels_ratio():
    """Its schedule holds every second level of ours, and no other."""
    guide = gaussian(1, NoiseSchedule(OURS.alphas_cumprod[1::2]), velocity=True)
    step = rows()
    t = OURS.t(2 * (torch.arange(60) * 8) + 1)
    x_t = OURS.noised(step.x, t, step.eps)
    cond, _ = guidance_of(guide.model(), OURS, x_t, t, list(step.y))
    exact = Gaussian(guide.mean, guide.cov, OURS).score(x_t - OURS.alpha(t).double()[:, None] * meant(step.y), t)
    torch.testing.assert_close(cond.score, exact.score, atol=1e-4, rtol=1e-4)


# --- the sum ---


def networks_of(guidance: float = 1.0) -> SimpleNamespace:
    return SimpleNamespace(schedule=OURS, real=gaussian(0, OURS).model(guidance), fake=gaussian(2, OURS).model(),
                           posterior=None, of_pictures=lambda value: lambda x: value(x, slice(None)),
                           space=SimpleNamespace(decode=lambda x: 2 * x - 1))


@pytest.mark.parametrize("w", [1.0, 2.0, 7.5])
def test_own_guidance_with_fidelity_on_the_prompt_is_guided_diff_instruct(w):
    """Without a normaliser, which differs: the plain real score's in one, the guided one's in the other."""
    ours, _ = TextToImage(guidance=w, weighting="constant").direction(networks_of(), None, None, rows())
    exact, _ = DiffInstruct(weighting="constant").direction(networks_of(w), rows())
    torch.testing.assert_close(ours, exact, atol=1e-4, rtol=1e-4)


def test_blind_fidelity_is_the_unconditional_scores_difference_plus_w_times_the_guidance():
    step, networks = rows(), networks_of()
    ours, _ = TextToImage(guidance=3.0, fidelity="blind", weighting="constant").direction(networks, None, None, step)
    x_t, t, _ = step.noised("", OURS, (0, 1))
    cond, uncond = networks.real.conditional_and_unconditional(x_t, t, step.y)
    fake = networks.fake(x_t, t, [""] * len(x_t))
    exact = cond.alpha * (uncond.score - fake.score + 3 * (cond.score - uncond.score))
    torch.testing.assert_close(ours, exact, atol=1e-4, rtol=1e-4)


def test_another_teachers_guidance_replaces_only_the_guidance():
    step, networks, guide = rows(), networks_of(), gaussian(1, THEIRS, velocity=True).model()
    method = TextToImage(guidance=3.0, weighting="constant")
    own, _ = method.direction(networks, None, None, step)
    ours, _ = method.direction(networks, guide, None, step)
    x_t, t, _ = step.noised("", OURS, (0, 1))
    alpha = OURS.alpha(t, x_t)
    theirs = cfg_augmentation(*guidance_of(guide, OURS, x_t, t, list(step.y)))
    before = cfg_augmentation(*networks.real.conditional_and_unconditional(x_t, t, step.y))
    torch.testing.assert_close(ours - own, 2 * alpha * (theirs - before), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("on", ["posterior", "sample"])
def test_a_reward_adds_its_gradient_for_its_own_prompt_through_the_posterior_or_on_the_sample(on, together):
    step, networks = rows(), networks_of()
    networks.posterior = lambda x_t, t, y: 0.5 * x_t
    if not together:
        networks.of_pictures = picture_by_picture
    aim = meant(step.y) + tensor([1.0, -1.0, 0.5])

    def reward(images: Tensor, y) -> Tensor:
        assert len(images) == len(y)
        return -(images - meant(y) - tensor([1.0, -1.0, 0.5])).square().sum(1) / 2

    method = TextToImage(weighting="constant", reward_weight=0.3, reward_clip=0.0, reward_on=on)
    plain, _ = method.direction(networks, None, None, step)
    ours, logs = method.direction(networks, None, reward, step)
    x_t, t, _ = step.noised("", OURS, (0, 1))
    exact = aim - step.x if on == "sample" else 0.5 * OURS.alpha(t, x_t) * (aim - 0.5 * x_t)
    torch.testing.assert_close(ours - plain, 0.3 * exact, atol=1e-4, rtol=1e-4, check_dtype=False)
    torch.testing.assert_close(logs["reward"], reward(step.x, step.y).mean())


def test_a_clipped_reward_is_at_most_as_long_as_fidelity():
    step, networks = rows(), networks_of()
    networks.posterior = lambda x_t, t, y: x_t
    method = TextToImage(weighting="constant", reward_weight=1e6)
    plain, _ = method.direction(networks, None, None, step)
    ours, _ = method.direction(networks, None, lambda images, y: images.sum(1), step)
    torch.testing.assert_close((ours - plain).norm(dim=1), plain.norm(dim=1).mean().expand(60), atol=1e-4, rtol=1e-4,
                               check_dtype=False)


@pytest.mark.parametrize("fidelity", ["prompt", "blind"])
def test_the_fake_score_learns_with_the_prompt_unless_fidelity_is_blind_to_it(fidelity, teacher, tmp_path):
    run = tiny.run(all_recipes()["nano-text-guided"](), tmp_path, teacher)
    task = replace(run.method, fidelity=fidelity).task(run)
    step, (fake, *_) = task.begin(0), task.phases
    loss, _ = fake.loss(step, 0)
    loaded = StableDiffusion.load(str(teacher))
    x_t, t, eps = step.noised("fake/0", loaded.schedule, run.method.fake_range)
    with torch.no_grad():  # at the start the fake score is the teacher's
        errors = {kind: loaded.score_of(loaded.text(), loaded.denoiser())(x_t, t, y).eps - eps
                  for kind, y in (("prompt", step.y), ("blind", [""] * 4))}
    torch.testing.assert_close(loss.detach(), errors[fidelity].square().mean(), atol=1e-6, rtol=1e-5)
    assert abs(float(errors["prompt"].square().mean() / errors["blind"].square().mean()) - 1) > 1e-3


# --- who may guide ---


def test_a_guide_computes_as_the_run_says_and_trains_with_it(teacher, tmp_path, untrained_judge):
    run = tiny.run(all_recipes()["nano-text-guided"](), tmp_path / "run", teacher, steps=2, precision="bf16")
    trainer = Trainer(run)
    guide = trainer.task.frozen[-1]
    assert guide.autocast is torch.bfloat16
    assert {p.dtype for p in guide.parameters()} == {torch.bfloat16}
    before = [p.clone() for p in guide.parameters()]
    logs = trainer.step(0)
    assert 0 < logs["guidance"] < float("inf")
    assert all(torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))


def test_a_teacher_of_another_latent_space_cannot_guide(teacher, tmp_path):
    loaded = StableDiffusion.load(str(teacher))
    run = SimpleNamespace(device="cpu", data=tiny.DATA)
    x_t, t, y = torch.randn(2, 8, 8, 8), OURS.t(torch.tensor([30, 800])), ["a coat", ""]
    with torch.no_grad():
        guided = guide_of(str(teacher), loaded, run)(x_t, t, y)  # type: ignore[arg-type]
        eps = loaded.unet(x_t, OURS.timestep(t), loaded.text()(y)).sample
    torch.testing.assert_close(guided.eps, eps, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(guided.score, -eps / OURS.sigma(t, eps), atol=1e-4, rtol=1e-4)
    other = StableDiffusion.load(str(teacher))
    for parameter in other.vae.encoder.parameters():
        parameter.mul_(1.5)
    save_pipeline(other, tmp_path / "weights")
    with pytest.raises(UsageError, match=r"encodes a probe picture \d+% apart .*one latent space"):
        guide_of(str(tmp_path / "weights"), loaded, run)  # type: ignore[arg-type]
    other.vae.register_to_config(scaling_factor=0.5)
    save_pipeline(other, tmp_path / "config")
    with pytest.raises(UsageError, match=r"autoencoder has scaling_factor 0.5, the teacher's .*one latent space"):
        guide_of(str(tmp_path / "config"), loaded, run)  # type: ignore[arg-type]


def test_a_guide_has_its_own_text_encoder_schedule_and_prediction(teacher, tmp_path):
    from jdm.models import nano

    loaded = StableDiffusion.load(str(teacher))
    other = tiny.model().with_parts(vae=loaded.vae, scheduler={
        **nano.SCHEDULER, "num_train_timesteps": 500, "prediction_type": "v_prediction"})
    save_pipeline(other, tmp_path / "guide")
    run = SimpleNamespace(device="cpu", data=replace(tiny.DATA))
    guide = guide_of(str(tmp_path / "guide"), loaded, run)  # type: ignore[arg-type]
    assert (guide.schedule.n, guide.prediction) == (500, "v_prediction")
    assert guide.text is not None
    torch.testing.assert_close(guide.text(["a coat"]), other.text()(["a coat"]))
    assert not torch.allclose(guide.text(["a coat"]), loaded.text()(["a coat"]))
