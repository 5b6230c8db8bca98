"""One step's batch: prompt, control and reference from ONE picture, and random numbers of its own for every use."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from jdm.controls import Control, load_control
from jdm.data.batches import Batches
from jdm.data.noise import rows_at
from jdm.data.sources import load_pictures
from jdm.loading import Loaded
from jdm.methods.engine import Step
from jdm.methods.nct import Noises
from jdm.methods.networks import Branch
from jdm.models.stable_diffusion import StableDiffusion
from jdm.recipes import find
from jdm.run import Run
from jdm.schedule import NoiseSchedule
from jdm.sharing import sharing
from jdm.space import from_bytes

SCHEDULE = NoiseSchedule.scaled_linear()
PICTURES = load_pictures("fashion-mnist", tiny.DATA.split, 32)


# --- the joint law ---


def of_pictures(run: Run, step: int) -> tuple[Tensor, Tensor, list[tuple[str, ...]]]:
    """Pixels in [-1, 1], controls as a ControlNet takes them, and captions of a batch, picture by picture."""
    rows, control = rows_at(len(PICTURES), run.batch, run.seed, step), load_control(run.method.control)
    pixels = from_bytes(PICTURES.batch(rows))
    shown = torch.cat([control.image(control.h((one[None] + 1) / 2)) for one in pixels])
    return pixels, shown, captions(rows)


def captions(rows: Tensor) -> list[tuple[str, ...]]:
    """The captions that each picture may have."""
    labels = PICTURES.label(rows)
    assert labels is not None
    return [PICTURES.captions[label] for label in labels.tolist()]


def begun(name: str, run: Run) -> tuple[list[str], Tensor, Tensor]:
    """(y, what the ControlNet is shown, pictures or their latents) of a method's second step."""
    state = run.method.task(Loaded(run)).begin(1)
    if name == "nano-controlnet":
        return state[0].y, state[1], state[0].x
    return state.y, state.shown, 2 * state.images - 1 if name == "nano-canny" else state.x


@pytest.mark.parametrize("name", ["nano-canny", "nano-controlnet", "nano-dsm"])
def test_prompt_picture_and_control_are_one_pictures(name, teacher, tmp_path):
    run = tiny.run(find(name)(), tmp_path, teacher)
    if name == "nano-controlnet":
        run = replace(run, method=replace(run.method, dropout=0.0))
    y, shown, x = begun(name, run)
    pixels, controls, allowed = of_pictures(run, 1)
    assert torch.equal(shown, controls)
    assert all(not torch.equal(a, b) for a, b in combinations([*controls, *controls.flip(3)], 2))
    assert all(prompt in of for prompt, of in zip(y, allowed, strict=True))
    exact = pixels if name == "nano-canny" else StableDiffusion.load(str(teacher)).space.encode(pixels)
    torch.testing.assert_close(x, exact, atol=1e-5, rtol=1e-5)


def test_student_and_likelihood_see_one_control(teacher, student, tmp_path):
    run = tiny.run(tiny.nano_canny(), tmp_path, teacher)
    run = replace(run, method=replace(run.method, controlnet=Branch(str(student))))
    step = run.method.task(Loaded(run)).begin(0)
    assert torch.equal(step.shown, step.c.expand(-1, 3, -1, -1))
    model = StableDiffusion.load(str(student))
    draw = model.generator(model.text(), model.denoiser(controlnet=model.controlnet))
    with torch.no_grad():
        own, mirrored = draw(step.z, step.y, step.shown), draw(step.z, step.y, step.shown.flip(3))
    torch.testing.assert_close(step.x.detach(), own, atol=1e-5, rtol=1e-5)
    assert (own - mirrored).abs().mean() > 1e-3


class Recorded(Control):
    """Brightness to the right, and the pictures it was asked about."""

    def __init__(self):
        self.asked = []

    def h(self, images: Tensor) -> Tensor:
        self.asked.append(images)
        return images.mean(1, keepdim=True)


class Doubled:
    """A generator of one level: twice its noise."""

    levels = (625,)

    def __call__(self, z, y, control=None, renoise=None):
        assert control is None  # the frozen generator is asked without one
        return 2 * z


def test_noise_consistency_measures_clamped_unmirrored_samples(teacher, tmp_path):
    run = tiny.run(find("nano-nct")(), tmp_path, teacher)
    networks: Any = SimpleNamespace(
        loaded=SimpleNamespace(run=run, pictures=PICTURES), generator=Doubled(),
        teacher=SimpleNamespace(latent_shape=lambda n, size: (n, 3, size, size)),
        space=SimpleNamespace(decode=lambda x: x + 0.5))
    control = Recorded()
    noises = Noises.of(networks, control, 3)
    (images,) = control.asked
    assert torch.equal(noises.x, 2 * noises.z)
    torch.testing.assert_close(images, ((2 * noises.z + 1.5) / 2).clamp(0, 1))
    assert (images == 0).any()
    assert (images == 1).any()
    torch.testing.assert_close(noises.shown, images.mean(1, keepdim=True).expand(-1, 3, -1, -1))
    rows = rows_at(len(PICTURES), run.batch, run.seed, 3)
    assert all(prompt in of for prompt, of in zip(noises.y, captions(rows), strict=True))
    assert unrelated(noises.z, noises.eps)


# --- random numbers ---


class Generator:
    """A generator of four levels whose sample is z, and what it was asked for."""

    levels = (999, 749, 499, 249)

    def __init__(self):
        self.asked = []

    def rollout(self, z, y, control, last, renoise):
        self.asked.append((last, [renoise(k) for k in range(1, last + 1)]))
        return z


def bare(step: int, generator: Generator | None = None, batch: int = 8) -> Step:
    """A step without control on latents [batch, 4, 8, 8]."""
    run = Run(None, Path(), batch=batch, steps=100)
    networks: Any = SimpleNamespace(
        loaded=SimpleNamespace(run=run), generator=generator or Generator(), settings=Generator,
        teacher=SimpleNamespace(latent_shape=lambda n, size: (n, 4, 8, 8)))
    return Step(networks, Batches(PICTURES, run.batch, run.seed), None, step)


def unrelated(*noises: Tensor) -> bool:
    """No two share a correlation beyond five standard errors."""
    flat = torch.stack([noise.flatten() for noise in noises])
    return bool((torch.corrcoef(flat) - torch.eye(len(flat))).abs().max() < 5 / flat.shape[1] ** 0.5)


def test_each_stream_has_its_own_level_and_noise():
    step = bare(0)
    drawn = {stream: step.noised(stream, SCHEDULE, 0.02, 0.98)
             for stream in ("generator", "condition", "fake/0", "fake/1", "fake/2")}
    assert unrelated(step.z, *(eps for _, _, eps in drawn.values()))
    assert all((a != b).sum() >= 6 for a, b in combinations([t for _, t, _ in drawn.values()], 2))  # 961 levels
    for stream, (x_t, t, eps) in drawn.items():
        torch.testing.assert_close(x_t, SCHEDULE.noised(step.x, t, eps))
        assert all(torch.equal(a, b) for a, b in zip(step.noised(stream, SCHEDULE, 0.02, 0.98), (x_t, t, eps),
                                                     strict=True))


def test_noise_levels_lie_between_their_ends():
    step = bare(0, batch=512)
    _, t, _ = step.noised("condition", SCHEDULE, 0.2, 0.3)
    assert 0.2 <= float(t.min()) < 0.205
    assert 0.295 < float(t.max()) <= 0.3


def test_a_step_repeats_nothing_of_another():
    a, b = bare(0), bare(1)
    assert unrelated(a.z, b.z, a.noised("fake/0", SCHEDULE, 0, 1)[2], b.noised("fake/0", SCHEDULE, 0, 1)[2])
    assert not torch.equal(a.images, b.images)


def test_few_step_students_train_at_every_level():
    generator, drawn = Generator(), []
    for number in range(16):
        step = bare(number, generator)
        assert torch.equal(step.x, step.z)
        drawn.append(generator.asked[-1][0])
    assert set(drawn) == {0, 1, 2, 3}
    last, fresh = next(asked for asked in generator.asked if asked[0] == 3)
    assert len(fresh) == last
    z = bare(drawn.index(3)).z
    assert unrelated(z, *fresh)


def test_shares_of_a_batch_draw_one_level():
    wholes, parts = Generator(), Generator()
    for number in range(8):
        assert len(bare(number, wholes).x) == 8
        for turn in (0, 1):
            with sharing(turn, 2):
                step = bare(number, parts)
                assert len(step.x) == 4
    assert [last for last, _ in parts.asked] == [last for last, _ in wholes.asked for _ in (0, 1)]
