"""The teacher check: shipped models pass, each part that is of another model is found, random weights still run."""

import copy
import time
import warnings

import pytest
import torch

import families
import tiny
from jdm.data.sources import load_pictures
from jdm.errors import TeacherWarning, UsageError
from jdm.evaluation.sampling import Sampler, warn_of_misfit
from jdm.generator import starting_noise
from jdm.library import SHIPPED, load_model
from jdm.models import nano
from jdm.models.teacher_check import DEAF, PARTS, _heard, doubts
from jdm.space import from_bytes


@pytest.fixture(scope="module")
def teacher():
    return load_model("nano-sd")


@pytest.fixture(scope="module")
def pictures():
    return load_pictures("fashion-mnist", "test[:64]", 32)


def doubted(model, pictures, rows=range(4)) -> str:
    rows = torch.tensor([*rows])
    return doubts(model, from_bytes(pictures.batch(rows)), pictures.prompts(rows, torch.zeros(len(rows))))


@pytest.mark.parametrize("name", ["nano-sd", *(n for n in SHIPPED if n.startswith("nano-controlnet"))])
def test_shipped_models_raise_no_doubt(name, pictures):
    model = load_model(name)
    assert [doubted(model, pictures, range(k, k + 4)) for k in (0, 20, 40)] == ["", "", ""]


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"beta_schedule": "linear"}, "betas"), ({"beta_end": 0.02}, "betas"),
    ({"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}, "betas"),
    *(({"num_train_timesteps": n}, "number of levels") for n in (250, 500)),
    ({"num_train_timesteps": 2000}, "betas"),
    ({"prediction_type": "v_prediction"}, "predicts the noise"), ({"prediction_type": "sample"}, "predicts the noise"),
    ({"clip_sample": True}, "clips x0"), ({"thresholding": True}, "clips x0")], ids=str)
@pytest.mark.hostile("parts")
def test_another_scheduler_is_found(teacher, pictures, changes, sentence):
    assert sentence in doubted(teacher.with_parts(scheduler={**teacher.scheduler, **changes}), pictures)


@torch.no_grad()
@pytest.mark.hostile("parts")
def test_another_autoencoder_is_found(teacher, pictures):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert PARTS in doubted(teacher.with_parts(vae=nano.vae(nano.VAEConfig(), 32).eval()), pictures)
    turned = copy.deepcopy(teacher.vae)  # decodes what it encodes as well as before
    for value in (turned.quant_conv.weight[:4], turned.quant_conv.bias[:4], turned.post_quant_conv.weight[:, :4]):
        value.mul_(-1)
    assert PARTS in doubted(teacher.with_parts(vae=turned), pictures)


@pytest.mark.parametrize("how", ["new", "shuffled"])
@pytest.mark.hostile("parts")
def test_another_text_encoder_is_found(how, teacher, pictures):
    other = copy.deepcopy(teacher.text_encoder)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        if how == "new":
            other = type(other)(other.config).eval()
        else:
            for p in other.parameters():
                p.copy_(p.flatten()[torch.randperm(p.numel())].view_as(p))
    assert "the text encoder" in doubted(teacher.with_parts(text_encoder=other), pictures)


def test_prompts_that_are_alike_say_nothing(teacher, pictures):
    rows = torch.arange(4)
    assert doubts(teacher, from_bytes(pictures.batch(rows)), [""] * 4) == ""


def test_captions_of_other_pictures_are_found(teacher, pictures):
    rows = torch.tensor([0, 1, 2, 8])
    y = pictures.prompts(rows, torch.zeros(4))
    pixels, others = from_bytes(pictures.batch(rows)), [*y[1:], y[0]]
    assert "at t = 0.9" in doubts(teacher, pixels, others)
    assert doubts(teacher, pixels, y) == ""
    with torch.no_grad():
        x = teacher.space.encode(pixels)
        assert _heard(teacher, x, y) < DEAF < _heard(teacher, x, others)


@pytest.mark.hostile("parts")
def test_predictions_that_are_not_finite_are_refused(teacher, pictures):
    huge = copy.deepcopy(teacher.unet)
    for p in huge.parameters():
        p.data.mul_(1e8)
    with pytest.raises(UsageError, match="not finite"):
        doubted(teacher.with_parts(unet=huge), pictures)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.hostile("weights")
def test_a_layer_that_is_not_finite(part, value, teacher, pictures):
    """Reading a folder refuses it too (`weights.refuse_unsound`); the check sees what was changed since."""
    broken = copy.deepcopy(getattr(teacher, part))
    names = {"vae": "encoder.conv_in.weight", "unet": "conv_in.weight"}
    broken.get_parameter(names.get(part) or next(iter(dict(broken.named_parameters())))).data.view(-1)[:] = value
    with pytest.raises(UsageError, match="not finite"):
        doubted(teacher.with_parts(**{part: broken}), pictures)


@pytest.mark.parametrize("kind", ["sd15", "sd21-v", "sdxl", "sd3", "sd35", "z-image"])
def test_untrained_families_are_doubted_not_refused(kind, pictures):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = families.made(kind)
    assert doubted(model, pictures)


def test_random_weights_are_doubted_and_run(pictures):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tiny.model()
    with pytest.warns(TeacherWarning, match="mine: it predicts the noise"):
        warn_of_misfit("mine", model)
    Sampler(model, steps=2)(starting_noise(model.latent_shape(1, 32), 0), ["boot"])


def test_the_check_draws_from_no_shared_stream(teacher, pictures):
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_misfit("a copy", teacher, pictures)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_check_takes_less_than_a_second(teacher):
    def seconds() -> float:
        start = time.thread_time()  # whatever else the machine does
        warn_of_misfit("a copy", teacher)
        return time.thread_time() - start

    assert min(seconds() for _ in range(3)) < 1
