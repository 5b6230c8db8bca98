"""Image prompts: the likelihood in an encoder's embedding, the encoders themselves, and what trains on them."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional

import tiny
from jdm.cli.parser import main
from jdm.controls import ImagePrompt, checked, load_control
from jdm.controls.base import control_of
from jdm.cost.estimate import estimate
from jdm.data.sources import load_pictures
from jdm.errors import UsageError
from jdm.evaluation.questions import Questions, answers
from jdm.evaluation.sampling import Drawing, Sampler, control_named
from jdm.generator import starting_noise
from jdm.library import load_model
from jdm.metrics.consistency import chance
from jdm.metrics.extractors import EffLite0
from jdm.recipes import all_recipes
from jdm.space import from_bytes, to_bytes, unit
from jdm.training.loop import train

PICTURES = load_pictures("fashion-mnist", "test[:24]", 32)
IMAGES = unit(from_bytes(PICTURES.sound(torch.arange(24))[1]))
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
PROCESSOR = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "resample": 3,
             "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
PROCESSORS = {
    "clip": {**PROCESSOR, "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32},
             "do_center_crop": True, "crop_size": {"height": 32, "width": 32}},
    "siglip": {**PROCESSOR, "image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}},
    "dinov2": {**PROCESSOR, "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 36},
               "do_center_crop": True, "crop_size": {"height": 28, "width": 28}},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Folders of tiny vision models as transformers saves them: safetensors and a preprocessor_config.json."""
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        Dinov2Config,
        Dinov2Model,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    torch.manual_seed(0)
    vit = {**SMALL, "intermediate_size": 32, "image_size": 32, "patch_size": 8}
    models = {"clip": CLIPVisionModel(CLIPVisionConfig(**vit)),
              "siglip": SiglipVisionModel(SiglipVisionConfig(**vit)),
              "dinov2": Dinov2Model(Dinov2Config(**SMALL, mlp_ratio=2, image_size=28, patch_size=14))}
    place = tmp_path_factory.mktemp("encoders")
    for name, model in models.items():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # random weights large enough that pictures differ
                parameter.data = torch.randn(parameter.shape) / parameter[0].numel() ** 0.5
        model.save_pretrained(place / name)
        (place / name / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[name]))
    return {name: str(place / name) for name in models}


@pytest.fixture(scope="module")
def control() -> ImagePrompt:
    return ImagePrompt()


@pytest.fixture
def complaint(capsys):
    """Runs a command in this process; returns its exit code and the one line it complained with."""

    def run(*arguments) -> tuple[int, str]:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("jdm: "))
        return code, line

    return run


def smooth(height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3] of slow waves in 60..200, where bicubic does not leave 0..255."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 5 + k) * np.cos(y / (4 + k)) for k in range(3)]
    return (130 + 70 * np.stack(waves, -1)).astype(np.uint8)


def test_log_prob_is_von_mises_fisher(control):
    images, c = IMAGES[:2].clone().requires_grad_(), IMAGES[2:4]
    a, b = (functional.normalize(EffLite0().features(to_bytes(2 * x.detach() - 1)), dim=1) for x in (images, c))
    found = control.log_prob(images, c)
    torch.testing.assert_close(found.detach(), ((a * b).sum(1) - 1) / 0.1**2, atol=1e-3, rtol=1e-4)
    (gradient,) = torch.autograd.grad(found.sum(), images)
    assert gradient.isfinite().all()
    assert all(row.any() for row in gradient)


def test_log_prob_passes_gradcheck(folders):
    control = load_control(f"image-prompt:{folders['clip']}")
    images, c = 0.2 + 0.6 * torch.rand(2, 1, 3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda x: control.log_prob(x, c), images.requires_grad_(), fast_mode=True)


def test_the_reference_is_asked_for(control):
    shown = control.drawn(IMAGES[:2], torch.tensor([0.1, 0.8]))
    assert control.log_prob(IMAGES[:2], shown, IMAGES[:2]).abs().max() < 1e-3
    assert (control.log_prob(IMAGES[:2], shown) < -1).all()


def test_embeddings_tell_pictures_and_overlook_mirrors(control):
    embedded = control.compared(IMAGES)
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(24))
    torch.testing.assert_close(embedded[:1], control.compared(IMAGES[:1]))  # whatever batch a picture is in
    mirrored = control.distance(embedded, control.compared(IMAGES.flip(3)))
    others = 1 - embedded @ embedded.T + 2 * torch.eye(24)
    assert (mirrored < others.min(1).values).all()
    assert control.distance(embedded, embedded).abs().max() < 1e-5


def test_ascent_brings_another_picture_nearer(control):
    c, images = IMAGES[:4], IMAGES[4:8].clone().requires_grad_()
    start = control.log_prob(images, c).detach()
    optimiser = torch.optim.Adam([images], lr=0.02)
    for _ in range(15):
        optimiser.zero_grad()
        control.log_prob(images, c).sum().neg().backward()
        optimiser.step()
    assert (control.log_prob(images.detach().clamp(0, 1), c) > 0.6 * start).all()


def test_training_shows_other_views_by_luck(control):
    luck = torch.tensor([0.1, 0.6])
    shown = control_of(control, IMAGES[:2], luck=luck)
    assert torch.equal(shown, control.drawn(IMAGES[:2], luck))
    assert torch.equal(shown[1:], control.drawn(IMAGES[1:2], luck[1:]))  # each follows from its own number
    assert not torch.equal(shown, control.drawn(IMAGES[:2], luck.flip(0)))
    assert ((shown - IMAGES[:2]).abs().flatten(1).mean(1) > 0.02).all()
    near = control.distance(control.compared(shown), control.compared(IMAGES[:2]))
    assert (near < control.distance(control.compared(shown), control.compared(IMAGES[:2].flip(0)))).all()


def test_views_are_mirrored_half_of_the_time(control):
    halves = torch.zeros(200, 3, 8, 8)
    halves[..., :4] = 1  # bright on the left
    shown = control.drawn(halves, torch.arange(200) / 200)
    mirrored = shown[..., 4:].mean((1, 2, 3)) > shown[..., :4].mean((1, 2, 3))
    assert 70 < int(mirrored.sum()) < 130


@pytest.mark.parametrize("shape", [(64, 64), (45, 67), (20, 24)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_encoders_equal_transformers_own_output(name, shape, folders):
    from transformers import AutoImageProcessor, AutoModel

    picture = smooth(*shape)
    processor = AutoImageProcessor.from_pretrained(folders[name])
    pixels = processor(images=Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    images = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    encoder = load_control(f"image-prompt:{folders[name]}").loaded
    # PIL rounds to 8 bits after each of its two passes: at most 1.8 levels of 1 / 255, divided by std.
    assert (encoder.pixels(images) - pixels).abs().max() < 1.8 / 255 / 0.26
    with torch.no_grad():
        expected = AutoModel.from_pretrained(folders[name]).eval()(pixel_values=pixels).pooler_output
        found = encoder.pooled(encoder.network, pixels)
    torch.testing.assert_close(found, expected)  # the same network
    # Those roundings, through two layers of random weights.
    assert (encoder(images) * functional.normalize(expected, dim=1)).sum() > 0.999
    assert not any(parameter.requires_grad for parameter in encoder.network.parameters())


def test_a_whole_clip_lends_its_vision_half(clip, folders, tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    for file in clip.iterdir():
        (folder / file.name).symlink_to(file)
    side = json.loads((clip / "config.json").read_text())["vision_config"]["image_size"]
    (folder / "preprocessor_config.json").write_text(json.dumps(
        PROCESSORS["siglip"] | {"size": {"height": side, "width": side}}))
    encoder = load_control(f"image-prompt:{folder}").loaded
    assert type(encoder.network).__name__ == "CLIPVisionModel"
    assert encoder(IMAGES[:2]).shape[0] == 2


def test_the_card_says_which_encoder_it_was(folders):
    assert ImagePrompt().preprocessor["encoder"] == "efflite0"
    assert load_control(f"image-prompt:{folders['clip']}").preprocessor["encoder"] == folders["clip"]
    assert checked(load_control(f"image-prompt:{folders['clip']}"), 32).channels == 3


@pytest.mark.parametrize("recipe", ["nano-canny", "nano-nct"])
def test_a_student_trains_and_is_evaluated(recipe, folders, teacher, tmp_path, capsys):
    """One step; the image prompts of the exported student are then asked and measured without a flag."""
    run = tiny.run(all_recipes()[recipe](), tmp_path / "run", teacher, steps=1)
    spec = f"image-prompt:{folders['clip']}"
    folder = train(replace(run, method=replace(run.method, control=spec)))
    card = json.loads((folder / "jdm.json").read_text())
    assert card["control"] == spec
    assert card["preprocessor"] == load_control(spec).preprocessor
    trained = load_file(next((tmp_path / "run" / "checkpoints").glob("*/state.safetensors")))
    assert not any("encoder.layers.0.self_attn.k_proj" in k and "text" not in k for k in trained)
    main(["evaluate", str(folder), "--n", "8", "--quick", "--json", str(tmp_path / "out.json")])
    row = json.loads((tmp_path / "out.json").read_text())
    assert "consistency" in capsys.readouterr().out
    asked, control = Questions.of(PICTURES, load_control(spec), 8, 0), load_control(spec)
    drawn = unit(from_bytes(answers(Sampler(load_model(str(folder))), asked, control)))
    distances = control.distance(*(control.compared(images) for images in (asked.images, drawn)))
    assert row["consistency"] == pytest.approx(float(distances.mean()), abs=1e-5)
    assert 0 < row["consistency_round_trip"] <= 2
    seen, asked = (control.compared(images) for images in (drawn, asked.images))
    assert row["consistency_chance"] == pytest.approx(float(chance(asked, seen, control=control).mean()), abs=1e-5)


def test_the_control_image_is_the_picture(student, tmp_path):
    """Stock diffusers draws from the picture itself what this package draws; the encoder is not read for it."""
    folder = shutil.copytree(student, tmp_path / "student")
    card = json.loads((folder / "jdm.json").read_text())
    (folder / "jdm.json").write_text(json.dumps(card | {"control": "image-prompt:nowhere/at-all"}))
    drawing = Drawing(load_model(str(folder)), control_named(load_model(str(folder))))
    shown = drawing.shown(to_bytes(2 * IMAGES[0] - 1))
    torch.testing.assert_close(shown, IMAGES[:1], atol=1e-6, rtol=0)
    pipe = StableDiffusionControlNetPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    z = starting_noise(drawing.model.latent_shape(1, 32), 0)
    stock = pipe("a coat", image=IMAGES[:1], height=32, width=32, num_inference_steps=1, guidance_scale=1.0,
                 latents=z.clone(), output_type="pt").images
    ours = unit(from_bytes(drawing.sampler(z, ["a coat"], shown)))
    torch.testing.assert_close(ours, stock, atol=1.01 / 255, rtol=0)  # ours is rounded to 8 bits


def text_model(folder):
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(**SMALL, intermediate_size=16, vocab_size=32)).save_pretrained(folder)


def only_a_pickle(folder):
    file = folder / "model.safetensors"
    torch.save(load_file(file), folder / "pytorch_model.bin")
    file.unlink()


def its_own_code(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('it ran')")


def unknown_resizing(folder):
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS["clip"] | {"resample": 1}))


@pytest.mark.hostile("parts")
@pytest.mark.parametrize(("harm", "said"), [
    (shutil.rmtree, "is not a folder here, and HF_HUB_OFFLINE is set"),
    (text_model, "is no vision model but BertConfig"),
    (only_a_pickle, "pytorch_model.bin is a pickle, which is not read"),
    (lambda folder: (folder / "model.safetensors").unlink(), "could not be loaded"),
    (lambda folder: (folder / "preprocessor_config.json").unlink(), "preprocessor_config.json of"),
    (its_own_code, "could not be loaded"),
    (unknown_resizing, "cannot differentiate the preprocessing"),
], ids=["missing", "text", "pickle", "no-weights", "no-preprocessor", "own-code", "kernel"])
def test_a_bad_encoder_is_one_line(harm, said, folders, teacher, tmp_path, complaint):
    folder = tmp_path / "encoder"
    shutil.copytree(folders["clip"], folder)
    harm(folder)
    code, line = complaint("train", "nano-canny", "--method.control", f"image-prompt:{folder}", "--model", teacher,
                           "--data.split", "test[:8]", "--data.validation", "test[8:16]", "--steps", "1", "--batch",
                           "2", "--out", tmp_path / "run")
    assert code == 2
    assert said in line


def test_a_hub_id_offline_is_one_line(complaint, tmp_path):
    code, line = complaint("train", "nano-canny", "--method.control", "image-prompt:somebody/vit", "--out", tmp_path)
    assert code == 2
    assert "somebody/vit is not a folder here, and HF_HUB_OFFLINE is set" in line


def test_names_take_a_place_only_where_declared():
    with pytest.raises(UsageError, match="canny is followed by nothing, got 'canny:folder'"):
        load_control("canny:folder")
    with pytest.raises(UsageError, match="temperature must be above 0 and finite, got 0"):
        ImagePrompt(temperature=0)


def test_an_estimate_counts_the_encoder(folders, teacher, tmp_path):
    run = tiny.run(all_recipes()["nano-canny"](), tmp_path, teacher)
    for spec in ("image-prompt", f"image-prompt:{folders['clip']}"):
        network = load_control(spec).loaded.network
        wanted = sum(p.numel() * p.element_size() for p in network.parameters())
        found = estimate(replace(run, method=replace(run.method, control=spec)))
        assert found.memory["control: encoder"] == pytest.approx(wanted, rel=0.02)
