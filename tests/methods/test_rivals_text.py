"""JDM for text-to-image: guidance across schedules, its sum of terms, and teachers that cannot guide."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from jdm.directions import cfg_augmentation
from jdm.errors import UsageError
from jdm.levels import Bound
from jdm.loading import Loaded
from jdm.methods.diff_instruct import DiffInstruct
from jdm.methods.engine import Distillation
from jdm.methods.networks import Fake, Student, guide
from jdm.methods.text_to_image import TextToImage
from jdm.models.execution import picture_by_picture
from jdm.models.folder import save_pipeline
from jdm.models.stable_diffusion import StableDiffusion
from jdm.posterior import ConsistencyPosterior
from jdm.recipes import all_recipes
from jdm.run import Needs
from jdm.schedule import NoiseSchedule, matched
from jdm.score import Estimate, ScoreModel
from jdm.terms import CFGAugmentation, CleanReward, Fidelity, Reward
from jdm.training.trainer import Trainer
from worlds import Gaussian, Rows, cubature, scene, tensor

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


def test_matched_levels_agree_to_half_a_level():
    t = every(OURS)
    own, wanted = log_snr(THEIRS, every(THEIRS)), log_snr(OURS, t)
    assert own.min() < wanted.min()
    assert own.max() > wanted.max()
    found = log_snr(THEIRS, matched(THEIRS, OURS, t))
    above = torch.searchsorted(-own, -wanted).clamp(1, len(own) - 1)
    half = (own[above - 1] - own[above]) / 2  # the two levels around the wanted ratio
    assert ((found - wanted).abs() <= half + 1e-9).all()


def test_a_self_guided_teacher_keeps_its_own_guidance():
    step, model = rows(), gaussian(0, OURS).model()
    x_t, t, _ = step.noised("", OURS, 0, 1)
    ours = model.guidance_on(OURS, x_t, t, list(step.y))
    own = model.conditional_and_unconditional(x_t, t, list(step.y))
    for a, b in zip(ours, own, strict=True):
        torch.testing.assert_close(a.score, b.score)
    torch.testing.assert_close(cfg_augmentation(*ours), cfg_augmentation(*own))


def test_a_guide_on_another_schedule_gives_its_score():
    step, guide = rows(), gaussian(1, THEIRS, velocity=True)
    x_t, t, _ = step.noised("", OURS, 0, 1)
    ours = guide.model().guidance_on(OURS, x_t, t, list(step.y))
    for estimate, text in zip(ours, (meant(step.y), 0 * meant(step.y)), strict=True):
        alpha = OURS.alpha(t).double()[:, None]
        exact = Gaussian(guide.mean, guide.cov, OURS).score(x_t - alpha * text, t)
        apart = (log_snr(THEIRS, matched(THEIRS, OURS, t)) - log_snr(OURS, t)).abs()  # half a level at most
        # u = sigma / alpha moves by half of that, and eps = u (cov + u^2 I)^-1 (x_t / alpha - mean) by no more than u.
        gap = (estimate.eps - exact.eps).norm(dim=1) / exact.eps.norm(dim=1)
        assert (gap < (apart / 2).expm1() + 1e-4).all()
        assert 0.001 < apart.max() < 0.03
        torch.testing.assert_close(estimate.x_t, x_t)


def test_a_guide_is_exact_where_levels_match():
    """Its schedule holds every second level of ours, and no other."""
    guide = gaussian(1, NoiseSchedule(OURS.alphas_cumprod[1::2]), velocity=True)
    step = rows()
    t = OURS.t(2 * (torch.arange(60) * 8) + 1)
    x_t = OURS.noised(step.x, t, step.eps)
    cond, _ = guide.model().guidance_on(OURS, x_t, t, list(step.y))
    exact = Gaussian(guide.mean, guide.cov, OURS).score(x_t - OURS.alpha(t).double()[:, None] * meant(step.y), t)
    torch.testing.assert_close(cond.score, exact.score, atol=1e-4, rtol=1e-4)


# --- the sum ---


PLAIN: dict[str, Any] = {"lambda_t": "constant", "normaliser": "none"}
FREE = Bound(0.0, 0.0)


def text(w: float = 0.0, teacher: str = "", prompt: bool = True, reward: Any = None) -> TextToImage:
    return TextToImage(fake=Fake(prompt=prompt), fidelity=Fidelity(**PLAIN, guidance=1.0),
                       guidance=CFGAugmentation(**PLAIN, weight=w, teacher=teacher), reward=reward)


def direction(method: Any, step: Rows, guidance: float = 1.0, **more: Any) -> tuple[Tensor, dict]:
    networks = scene(OURS, gaussian(0, OURS).model(guidance), told(gaussian(2, OURS).model()), **more)
    return method.distillation().direction(networks, step)


def told(model: ScoreModel) -> Any:
    """A fake score that takes no control."""
    return lambda x_t, t, y, control=None: model(x_t, t, y)


@pytest.mark.parametrize("w", [1.0, 2.0, 7.5])
def test_own_prompt_guidance_is_guided_diff_instruct(w):
    """Without a normaliser, which differs: the plain real score's in one, the guided one's in the other."""
    ours, _ = direction(text(w - 1), rows())
    exact, _ = direction(DiffInstruct(fidelity=Fidelity(**PLAIN, guidance=w)), rows(), w)
    torch.testing.assert_close(ours, exact, atol=1e-4, rtol=1e-4)


def test_blind_fidelity_compares_scores_without_the_prompt():
    step = rows()
    ours, _ = direction(text(3.0, prompt=False), step)
    x_t, t, _ = step.noised("", OURS, 0, 1)
    cond, uncond = gaussian(0, OURS).model().conditional_and_unconditional(x_t, t, step.y)
    fake = gaussian(2, OURS).model()(x_t, t, [""] * len(x_t))
    exact = cond.alpha * (uncond.score - fake.score + 3 * (cond.score - uncond.score))
    torch.testing.assert_close(ours, exact, atol=1e-4, rtol=1e-4)


def test_another_teachers_guidance_replaces_only_the_guidance():
    step, other = rows(), gaussian(1, THEIRS, velocity=True).model()
    own, _ = direction(text(2.0), step)
    ours, _ = direction(text(2.0, teacher="other"), step, guides={"guide other": other})
    x_t, t, _ = step.noised("", OURS, 0, 1)
    alpha = OURS.alpha(t, x_t)
    theirs = cfg_augmentation(*other.guidance_on(OURS, x_t, t, list(step.y)))
    before = cfg_augmentation(*gaussian(0, OURS).model().conditional_and_unconditional(x_t, t, step.y))
    torch.testing.assert_close(ours - own, 2 * alpha * (theirs - before), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("on", ["posterior", "sample"])
def test_a_reward_adds_its_gradient(on, together):
    """For its own prompt, through the posterior or on the sample, picture by picture or at once."""
    step, aim = rows(), meant(rows().y) + tensor([1.0, -1.0, 0.5])

    def reward(images: Tensor, y) -> Tensor:
        assert len(images) == len(y)
        return -(images - meant(y) - tensor([1.0, -1.0, 0.5])).square().sum(1) / 2

    term: Any = CleanReward(weight=0.3, bound=FREE) if on == "sample" else Reward(**PLAIN, weight=0.3, bound=FREE)
    more: dict[str, Any] = {} if together else {"of_pictures": picture_by_picture}
    plain, _ = direction(text(1.0), step)
    ours, logs = direction(text(1.0, reward=term), step, reward=reward,
                           posteriors={ConsistencyPosterior(): lambda x_t, t, y: 0.5 * x_t}, **more)
    x_t, t, _ = step.noised("", OURS, 0, 1)
    exact = aim - step.x if on == "sample" else 0.5 * OURS.alpha(t, x_t) * (aim - 0.5 * x_t)
    torch.testing.assert_close(ours - plain, 0.3 * exact, atol=1e-4, rtol=1e-4, check_dtype=False)
    torch.testing.assert_close(logs["reward"], reward(step.x, step.y).mean())


def test_a_bounded_reward_never_exceeds_the_rest():
    step = rows()
    plain, _ = direction(text(1.0), step)
    ours, _ = direction(text(1.0, reward=Reward(**PLAIN, weight=1e6)), step, reward=lambda images, y: images.sum(1),
                        posteriors={ConsistencyPosterior(): lambda x_t, t, y: x_t})
    torch.testing.assert_close((ours - plain).norm(dim=1), plain.norm(dim=1).mean().expand(60), atol=1e-4, rtol=1e-4,
                               check_dtype=False)


@pytest.mark.parametrize("pairs", [0, 1, 2])
def test_one_pass_serves_terms_at_equal_levels(pairs):
    """Two augmentations and a fidelity term at shared levels ask the teacher once."""
    calls = []

    class Counted(ScoreModel):
        def _estimate(self, x_t, *more):
            calls.append(len(x_t))
            return super()._estimate(x_t, *more)

    net = gaussian(0, OURS)
    terms = {"fidelity": Fidelity(**PLAIN, guidance=1.0),
             **{f"guidance {k}": CFGAugmentation(**PLAIN) for k in range(pairs)}}
    networks = scene(OURS, Counted(net, OURS, "epsilon", meant), told(gaussian(2, OURS).model()))
    Distillation("", Student(), Fake(), terms).direction(networks, rows())
    assert calls == [60 if not pairs else 120]


@pytest.mark.parametrize("prompt", [True, False])
def test_the_fake_learns_with_or_without_prompts(prompt, teacher, tmp_path):
    run = tiny.run(all_recipes()["nano-text-guided"](), tmp_path, teacher)
    method = replace(run.method, fake=replace(run.method.fake, prompt=prompt))
    task = method.task(Loaded(replace(run, method=method)))
    step, (fake, *_) = task.begin(0), task.phases
    loss, _ = fake.loss(step, 0)
    loaded = StableDiffusion.load(str(teacher))
    x_t, t, eps = step.noised("fake/0", loaded.schedule, method.fake.low, method.fake.high)
    score = loaded.score_of(loaded.text(), loaded.denoiser())
    with torch.no_grad():  # at the start the fake score is the teacher's
        errors = {kind: score(x_t, t, y).eps - eps for kind, y in ((True, step.y), (False, [""] * 4))}
    torch.testing.assert_close(loss.detach(), errors[prompt].square().mean(), atol=1e-6, rtol=1e-5)
    assert abs(float(errors[True].square().mean() / errors[False].square().mean()) - 1) > 1e-3


# --- who may guide ---


def test_a_guide_computes_as_the_run_says(teacher, tmp_path, untrained_judge):
    run = tiny.run(all_recipes()["nano-text-guided"](), tmp_path / "run", teacher, steps=2, precision="bf16")
    trainer = Trainer(run)
    other = trainer.task.frozen[-2]  # before the decoder
    assert other.autocast is torch.bfloat16
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16}
    before = [p.clone() for p in other.parameters()]
    logs = trainer.step(0)
    assert 0 < logs["guidance"] < float("inf")
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


def loaded_with(teacher, folder) -> Loaded:
    run = tiny.run(all_recipes()["nano-text-guided"](), folder, teacher)
    return Loaded(run, Needs({"teacher": str(teacher), "guide": str(folder)}, prompts=("teacher", "guide")))


def test_a_teacher_of_another_latent_space_cannot_guide(teacher, tmp_path):
    own = StableDiffusion.load(str(teacher))
    x_t, t, y = torch.randn(2, 8, 8, 8), OURS.t(torch.tensor([30, 800])), ["a coat", ""]
    with torch.no_grad():
        guided = guide(loaded_with(teacher, teacher), "guide")(x_t, t, y)
        eps = own.backbone(x_t, OURS.timestep(t), own.text()(y)).sample
    torch.testing.assert_close(guided.eps, eps, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(guided.score, -eps / OURS.sigma(t, eps), atol=1e-4, rtol=1e-4)
    other = StableDiffusion.load(str(teacher))
    for parameter in other.vae.encoder.parameters():
        parameter.mul_(1.5)
    save_pipeline(other, tmp_path / "weights")
    with pytest.raises(UsageError, match=r"latents of a probe picture differ by \d+% .*one latent space"):
        guide(loaded_with(teacher, tmp_path / "weights"), "guide")
    other.vae.register_to_config(scaling_factor=0.5)
    save_pipeline(other, tmp_path / "config")
    with pytest.raises(UsageError, match=r"autoencoder has scaling_factor 0.5, the teacher's .*one latent space"):
        guide(loaded_with(teacher, tmp_path / "config"), "guide")


def test_a_guide_has_its_own_text_and_schedule(teacher, tmp_path):
    from jdm.models import nano

    own = StableDiffusion.load(str(teacher))
    other = tiny.model().with_parts(vae=own.vae, scheduler={
        **nano.SCHEDULER, "num_train_timesteps": 500, "prediction_type": "v_prediction"})
    save_pipeline(other, tmp_path / "guide")
    found = guide(loaded_with(teacher, tmp_path / "guide"), "guide")
    assert (found.schedule.n, found.prediction) == (500, "v_prediction")
    assert found.text is not None
    torch.testing.assert_close(found.text(["a coat"]), other.text()(["a coat"]))
    assert not torch.allclose(found.text(["a coat"]), own.text()(["a coat"]))
