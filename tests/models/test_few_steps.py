"""A student of several steps: its folder, its pictures in stock diffusers, its README."""

import json

import diffusers
import pytest
import torch
from diffusers.schedulers import scheduling_lcm

import tiny
from jdm.errors import UsageError
from jdm.evaluation.sampling import Sampler, default_steps, generator
from jdm.export.writers import export
from jdm.generator import fresh_noise, starting_noise
from jdm.library import load_model
from jdm.models import nano
from jdm.models.folder import save_pipeline
from jdm.models.schedulers import evenly_spaced, scheduler_of, step_scheduler
from jdm.recipes import find
from jdm.training.loop import train

EVEN, UNEVEN = (999, 749, 499, 249), (999, 600, 100)
PROMPTS = ["an ankle boot", "a coat"]


def student(folder, levels):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tiny.with_controlnet(tiny.model())
    card = {"kind": "few-step", "method": "jdm", "control": "canny", "levels": list(levels)}
    return save_pipeline(model, folder, model.step_scheduler(levels), card=card)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("few")
    return {levels: student(place / str(len(levels)), levels) for levels in (EVEN, UNEVEN)}


@pytest.mark.parametrize("levels", [EVEN, UNEVEN])
def test_stock_diffusers_draws_a_few_step_students_pictures(levels, folders, monkeypatch):
    model = load_model(str(folders[levels]))
    shape = model.latent_shape(2, 32)
    z, noises = starting_noise(shape, 5), [fresh_noise(shape, 5, k) for k in range(1, len(levels))]
    control = (torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) < 0.2).float().expand(-1, 3, -1, -1)
    given = iter(noises)
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *_, **__: next(given))
    pipe = diffusers.StableDiffusionControlNetPipeline.from_pretrained(folders[levels])
    pipe.set_progress_bar_config(disable=True)
    steps = {"num_inference_steps": len(levels)} if levels is EVEN else {"timesteps": list(levels)}
    stock = pipe(PROMPTS, image=control, latents=z.clone(), guidance_scale=1.0, output_type="latent", **steps).images
    assert pipe.scheduler.timesteps.tolist() == list(levels)
    with torch.no_grad():
        ours = Sampler(model).x(z, PROMPTS, control, lambda k: noises[k - 1])
        other = Sampler(model).x(z, PROMPTS, control, lambda k: noises[k - 1].flip(0))
    assert (stock - ours).abs().max() < 1e-4
    assert (ours - other).abs().max() > 1e-2, "noise that changes nothing would prove nothing"


@pytest.mark.parametrize("name", ["canny-4", "ddmd-4"])
def test_a_trained_students_folder_runs_in_diffusers(name, teacher, tmp_path, untrained_judge, monkeypatch):
    """With a ControlNet in every step, and without one."""
    folder = train(tiny.run(find(f"nano-{name}")(), tmp_path, teacher))
    model = load_model(str(folder))
    assert model.levels == EVEN
    assert (model.controlnet is not None) == (name == "canny-4")
    shape = model.latent_shape(2, 32)
    z, noises = starting_noise(shape, 5), [fresh_noise(shape, 5, k) for k in range(1, 4)]
    shown = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) if model.controlnet else None
    given = iter(noises)
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *_, **__: next(given))
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    told = {} if shown is None else {"image": shown}
    stock = pipe(PROMPTS, latents=z.clone(), num_inference_steps=4, guidance_scale=1.0, output_type="latent", **told)
    assert pipe.scheduler.timesteps.tolist() == list(EVEN)
    with torch.no_grad():
        ours = Sampler(model).x(z, PROMPTS, shown, lambda k: noises[k - 1])
    assert (stock.images - ours).abs().max() < 1e-4


def test_the_folder_says_how_it_draws(folders):
    model = load_model(str(folders[EVEN]))
    assert model.levels == EVEN
    assert default_steps(model) == Sampler(model).steps == Sampler(model).nfe == 4
    assert default_steps(tiny.model()) == 50
    with pytest.raises(UsageError, match=r"draws in 4 steps; asked for 1; leave out .* \(it runs at levels 999, 749, "):
        Sampler(model, 1)


def close(a, b):
    """Pictures of other batch sizes: their sums have another order, so that a grey value may round the other way."""
    torch.testing.assert_close(a.int(), b.int(), atol=1, rtol=0)


def test_pictures_are_a_function_of_seed_and_row(folders):
    model = load_model(str(folders[EVEN])).with_networks(controlnet=None)
    draw = generator(model)
    first = draw("a coat", n=5, seed=3)
    close(first[:2], draw("a coat", n=2, seed=3))
    z = starting_noise(model.latent_shape(5, 32), 3)
    sampler = Sampler(model)
    close(sampler(z, ["a coat"] * 5, batch=2, seed=3), sampler(z, ["a coat"] * 5, batch=5, seed=3))
    other = sampler(z, ["a coat"] * 5, seed=4).int() - first.int()
    assert other.abs().max() > 20, "the noise between steps has the seed too"


@pytest.mark.parametrize(("levels", "said"), [(EVEN, "num_inference_steps=4, guidance_scale=1.0"),
                                              (UNEVEN, "timesteps=[999, 600, 100], guidance_scale=1.0")])
def test_the_readme_says_how_to_call_it(levels, said, folders, tmp_path):
    text = (export(folders[levels], tmp_path / "mine") / "README.md").read_text()
    for part in (said, f"that draws in {len(levels)} steps", "tags: [few-step, controlnet]",
                 f"| levels | {', '.join(map(str, levels))} (sigma / alpha = 14.6146 at the first) |"):
        assert part in text, part
    other = (export(folders[levels], tmp_path / "one", format="single-file") / "README.md").read_text()
    assert "No settings of these programs were worked out for that; use diffusers." in other


def test_a_few_step_lora_names_its_scheduler(folders, tmp_path):
    base = save_pipeline(tiny.model(), tmp_path / "base")
    out = export(folders[EVEN], tmp_path / "lora", format="lora", rank=2, base=str(base))
    assert 'scheduler = LCMScheduler.from_pretrained("scheduler")' in (out / "README.md").read_text()
    assert diffusers.LCMScheduler.from_pretrained(out / "scheduler").config["original_inference_steps"] == 4


@pytest.mark.parametrize(("levels", "even"), [(EVEN, True), ((499, 249), True), ((999, 499), True), ((999, 500), False),
                                              ((999, 749), False), (UNEVEN, False), ((625,), True)])
def test_even_spacing_goes_down_to_the_last_step(levels, even):
    assert evenly_spaced(levels) == even


@pytest.mark.parametrize("levels", [EVEN, UNEVEN])
def test_stock_schedulers_take_levels_without_warning(levels, monkeypatch):
    said = []
    monkeypatch.setattr(scheduling_lcm.logger, "warning", lambda text, *_: said.append(text))
    scheduler = scheduler_of(step_scheduler(nano.SCHEDULER, levels))
    scheduler.set_timesteps(**({"num_inference_steps": 4} if levels is EVEN else {"timesteps": list(levels)}))
    assert scheduler.timesteps.tolist() == list(levels)
    assert said == []


def test_the_stock_scheduler_skips_nothing():
    """LCM's c_skip, which would keep a share of x_t, at the cleanest level that it takes."""
    scheduler = scheduler_of(step_scheduler(nano.SCHEDULER, (999, 1)))
    c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(1)
    assert 0 <= c_skip < 1e-6
    assert c_out == pytest.approx(1, abs=1e-6)


def test_a_scheduler_cannot_end_at_level_zero():
    with pytest.raises(UsageError, match="level 0 cannot be one of several"):
        step_scheduler(nano.SCHEDULER, (625, 0))
    assert step_scheduler(nano.SCHEDULER, (0,))["_class_name"] == "DDIMScheduler"


def test_a_one_step_card_without_levels_is_refused(folders, tmp_path):
    folder = student(tmp_path / "old", (625,))
    (folder / "jdm.json").write_text(json.dumps({"kind": "one-step"}))
    with pytest.raises(UsageError, match=r'says one-step and names no levels; add "levels": \[625\]'):
        load_model(str(folder))
