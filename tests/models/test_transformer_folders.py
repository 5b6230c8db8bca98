"""Folders of SD3 and Z-Image: text encoders, ControlNets of others, second teachers, and what is refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3ControlNetModel,
    StableDiffusion3Pipeline,
    ZImageControlNetModel,
    ZImagePipeline,
)
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

import tiny
from families import flow_autoencoder, made
from jdm.errors import UsageError
from jdm.evaluation.sampling import Sampler
from jdm.formats.transformers import checkpoint_tensors
from jdm.generator import starting_noise
from jdm.library import load_controlnet, load_model
from jdm.loading import Loaded
from jdm.models.folder import save_pipeline
from jdm.prepare import prepare
from jdm.recipes import find
from jdm.recipes.scales import FOUR
from jdm.training.trainer import Trainer

pytestmark = [pytest.mark.usefixtures("untrained_judge"), pytest.mark.filterwarnings("ignore::UserWarning")]
PROMPTS = ["a coat", "", "an ankle boot"]
CONTROL = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def still(model):
    for part in model.modules().values():
        part.eval().requires_grad_(False)
    return model


def seeded(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return still(made(kind))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Kind -> the folder of its tiny model."""
    place = tmp_path_factory.mktemp("transformers")
    models = {kind: seeded(kind) for kind in ("sd3", "sd35", "z-image", "sdxl")}
    models["sd35"] = models["sd35"].with_parts(vae=models["sd3"].vae)
    return {kind: save_pipeline(model, place / kind) for kind, model in models.items()}


def with_t5(model):
    letters = [(letter, -2.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -1.0), *letters], extra_ids=0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=40, d_kv=8, d_ff=16, num_layers=1,
                                          num_heads=2))
    return still(model.with_parts(text_encoder_3=encoder, tokenizer_3=tokenizer))


@torch.no_grad()
@pytest.mark.parametrize("third", [False, True])
def test_sd3s_text_states_are_the_stock_pipelines(third, tmp_path):
    model = with_t5(seeded("sd3")) if third else seeded("sd3")
    loaded = load_model(str(save_pipeline(model, tmp_path / "model")))
    assert (loaded.text_encoder_3 is not None) == third
    pipe = StableDiffusion3Pipeline.from_pretrained(
        tmp_path / "model", **({} if third else {"text_encoder_3": None, "tokenizer_3": None}))
    exact, _, pooled, _ = pipe.encode_prompt([*PROMPTS], None, None, do_classifier_free_guidance=False,
                                             max_sequence_length=3)
    states, added = loaded.text()(PROMPTS)
    torch.testing.assert_close(states, exact)
    torch.testing.assert_close(added["pooled"], pooled)
    assert bool(states[:, -3:].any()) == third


@torch.no_grad()
def test_z_images_text_states_are_the_stock_pipelines(folders):
    pipe = ZImagePipeline.from_pretrained(folders["z-image"])
    exact, _ = pipe.encode_prompt([*PROMPTS], do_classifier_free_guidance=False)
    states, added = load_model(str(folders["z-image"])).text()(PROMPTS)
    for row, n, theirs in zip(states, added["lengths"].tolist(), exact, strict=True):
        torch.testing.assert_close(row[:n], theirs, atol=1e-5, rtol=1e-5)
    assert len(set(added["lengths"].tolist())) == 3


@pytest.mark.parametrize("kind", ["sd3", "z-image"])
def test_prepared_states_spare_the_text_encoder(kind, folders, tmp_path, monkeypatch):
    run = tiny.run(find("nano-canny")(), tmp_path / "run", folders[kind])
    prepare(run, tmp_path / "prepared")
    plain, cached = (Loaded(r) for r in (run, tiny.cached(run, tmp_path / "prepared")))
    encoder = cached.text()
    prompts = ["a picture of a coat", ""]
    assert all(p in encoder.stored for p in prompts[1:])
    monkeypatch.setattr(type(encoder), "encode", lambda *_: pytest.fail("a text encoder runs"))
    found = encoder([p for p in encoder.stored][:3])
    monkeypatch.undo()
    exact = plain.text()([p for p in encoder.stored][:3])
    assert torch.equal(found[0], exact[0])
    assert all(torch.equal(v, exact[1][k]) for k, v in found[1].items())
    moved = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_: moved.append(self) or self)
    fresh = Loaded(tiny.cached(run, tmp_path / "prepared"))
    texts = {id(part) for name, part in fresh.teacher.modules().items() if name.startswith("text_encoder")}
    assert moved
    assert not texts & set(map(id, moved))


def stirred(net):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net.eval().requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["blind", "without text"])
def test_sd3_controlnets_of_others_run(kind, folders, tmp_path):
    """Told no pooled states, as many public ones are; and the large one's, which reads no text and no positions."""
    model = load_model(str(folders["sd3"]))
    own = {k: v for k, v in model.transformer.config.items() if not k.startswith("_")}
    more = {} if kind == "blind" else {"joint_attention_dim": None, "use_pos_embed": False}
    net = stirred(SD3ControlNetModel.from_config({**own, "num_layers": 2, **more}))
    net.save_pretrained(tmp_path / "net")
    loaded, control = load_controlnet(str(tmp_path / "net"), model)
    assert control is None
    z = starting_noise(model.latent_shape(2, 32), 0)
    ours = model.with_networks(controlnet=loaded)
    pipe = ours.pipeline(FlowMatchEulerDiscreteScheduler.from_config(model.scheduler))
    pipe.set_progress_bar_config(disable=True)
    stock = pipe(PROMPTS[:2], control_image=2 * CONTROL - 1, latents=z, num_inference_steps=2, guidance_scale=1.0,
                 output_type="latent", max_sequence_length=3).images
    found = Sampler(load_model(str(folders["sd3"])).with_networks(controlnet=load_controlnet(
        str(tmp_path / "net"), model)[0]), 2).x(z, PROMPTS[:2], CONTROL)
    assert (stock - found).abs().max() < 1e-5
    assert (Sampler(model, 2).x(z, PROMPTS[:2]) - found).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("refiner", [None, "control_layers", "control_noise_refiner"])
def test_z_image_union_controlnets_run(refiner, folders):
    """With room for a mask beside the control, as the later public ones have it."""
    model = load_model(str(folders["z-image"]))
    config = model.transformer.config
    shared = {k: config[k] for k in ("dim", "n_heads", "n_kv_heads", "n_refiner_layers")}
    net = stirred(ZImageControlNetModel(control_layers_places=[0, 2], control_refiner_layers_places=[0],
                                        control_in_dim=config["in_channels"] + 3, add_control_noise_refiner=refiner,
                                        **shared))
    ours = model.with_networks(controlnet=net)
    z = starting_noise(model.latent_shape(2, 32), 0)
    pipe = ours.pipeline(FlowMatchEulerDiscreteScheduler.from_config(model.scheduler))
    pipe.set_progress_bar_config(disable=True)
    stock = pipe(PROMPTS[:2], control_image=2 * CONTROL - 1, latents=z, num_inference_steps=2, guidance_scale=0.0,
                 controlnet_conditioning_scale=1.0, output_type="latent").images
    found = Sampler(ours, 2).x(z, PROMPTS[:2], CONTROL)
    assert (stock - found).abs().max() < 1e-5
    assert (Sampler(model, 2).x(z, PROMPTS[:2]) - found).abs().max() > 1e-2


def several(folders, out, first, second):
    run = tiny.run(find("nano-canny")(), out, folders[first])
    also = ((str(folders[second]), 0.5),)
    return replace(run, method=replace(run.method, fidelity=replace(run.method.fidelity, also=also)))


def test_sd3_and_sd35_teach_together(folders, tmp_path):
    both = several(folders, tmp_path / "both", "sd3", "sd35")
    alone = replace(both, out=tmp_path / "alone", method=replace(both.method, fidelity=replace(both.method.fidelity,
                                                                                              also=())))
    together, one = (Trainer(run).step(0) for run in (both, alone))
    assert together["fidelity"] != one["fidelity"]
    assert together["condition_raw"] == one["condition_raw"], "the second teacher pulls by fidelity alone"


@pytest.mark.hostile("parts")
def test_a_teacher_of_other_latents_is_refused(folders, tmp_path):
    with pytest.raises(UsageError, match=r"sdxl cannot guide this teacher: its autoencoder has \w+ .* latent space"):
        Trainer(several(folders, tmp_path, "sd3", "sdxl"))


@pytest.mark.parametrize("name", ["nano-canny", "nano-canny-4"])
def test_a_distilled_teacher_gives_no_guidance(name, folders, tmp_path):
    turbo = shutil.copytree(folders["z-image"], tmp_path / "Z-Image-Turbo")
    run = tiny.run(find(name)(), tmp_path / "run", turbo)
    with pytest.raises(UsageError, match=r"for guidance, which it no longer has: its name says that it is distilled"):
        Trainer(run)
    method = replace(run.method, augmentation=None, fidelity=replace(run.method.fidelity, guidance=1.0))
    Trainer(replace(run, method=method)).step(0)


def test_a_turbo_starts_a_student_at_its_sigmas(folders, tmp_path):
    turbo = shutil.copytree(folders["z-image"], tmp_path / "Z-Image-Turbo")
    file = turbo / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shift": 3.0}))
    run = tiny.run(find("nano-canny-4")(), tmp_path / "run", folders["z-image"])
    student = replace(run.method.student, start=str(turbo))
    with pytest.raises(UsageError, match=r"runs at sigmas 1.000, 0.955, .* use --levels among 999 777 .* 66") as said:
        Trainer(replace(run, method=replace(run.method, student=student)))
    levels = tuple(int(word) for word in str(said.value).split("among ")[1].split())[::2]
    trainer = Trainer(replace(run, method=replace(run.method, student=replace(student, levels=levels))))
    assert torch.isfinite(torch.tensor(trainer.step(0)["generator/loss"]))


@pytest.mark.hostile("parts")
def test_a_unets_controlnet_is_refused(folders, student):
    for kind in ("sd3", "z-image"):
        with pytest.raises(UsageError, match=r"it is a ControlNetModel for Stable-Diffusion-format models, and this is "
                                             rf"a {load_model(str(folders[kind])).NAME} model"):
            load_controlnet(str(student), load_model(str(folders[kind])))


def test_a_long_prompt_asks_for_t5(folders):
    text = load_model(str(folders["sd3"])).text()
    with pytest.raises(UsageError, match=r"has \d+ tokens, CLIP reads 40 and this model has no T5"):
        text(["a coat " * 40])
    with_t5(load_model(str(folders["sd3"]))).text()(["a coat " * 40])


@pytest.mark.parametrize("kind", ["sd3", "z-image"])
@pytest.mark.hostile("parts")
def test_an_autoencoder_of_other_channels_is_refused(kind, folders, tmp_path):
    model = load_model(str(folders[kind]))
    folder = save_pipeline(model.with_parts(vae=flow_autoencoder(8)), tmp_path / "model")
    with pytest.raises(UsageError, match=r"the transformer takes 4 channels, its autoencoder writes latents of 8"):
        load_model(str(folder))


@pytest.mark.parametrize(("kind", "part", "changes", "said"), [
    ("sd3", "vae", {"shift_factor": None}, "names no shift_factor"),
    ("z-image", "vae", {"shift_factor": None}, "names no shift_factor"),
    ("sd3", "scheduler", {"shift": 0}, r"shift must be a number in \(0, 1000\], got 0"),
    ("sd3", "scheduler", {"shift_terminal": 0.1}, "shift_terminal must be null"),
    ("z-image", "scheduler", {"use_karras_sigmas": True}, "use_karras_sigmas"),
    ("z-image", "scheduler", {"_class_name": "DDIMScheduler"}, "is of DDIMScheduler; the schedulers that are read"),
])
@pytest.mark.hostile("parts")
def test_a_config_that_makes_no_sense(kind, part, changes, said, folders, tmp_path):
    folder = shutil.copytree(folders[kind], tmp_path / "model")
    file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UsageError, match=said):
        load_model(str(folder))


@pytest.mark.hostile("parts")
def test_text_encoders_of_other_widths_are_refused(folders, tmp_path):
    for kind, swapped in (("sd3", "text_encoder_2"), ("z-image", "text_encoder")):
        folder = shutil.copytree(folders[kind], tmp_path / kind)
        config = json.loads((folder / "transformer" / "config.json").read_text())
        key = "pooled_projection_dim" if kind == "sd3" else "cap_feat_dim"
        wide = load_model(str(folders[kind]))
        net = type(wide.transformer).from_config({k: v for k, v in config.items()} | {key: config[key] * 2})
        net.save_pretrained(folder / "transformer")
        with pytest.raises(UsageError, match=r"the transformer reads .*text states of width \d+"):
            load_model(str(folder))
        assert swapped in wide.modules()


def test_students_levels_are_four_of_the_turbos(folders):
    """FOUR are among EIGHT, so that a four-step student may begin as an eight-step release of equal shift."""
    model = load_model(str(folders["z-image"]))
    turbo = model.with_parts(card={"kind": "distilled"})
    assert turbo.begins(FOUR, model.schedule) == ""
    assert "use --levels among" in turbo.begins((900,), model.schedule)
    assert "is not a one-step generator" in model.begins(FOUR, model.schedule)


def test_a_file_of_a_transformer_replaces_its_folders(folders, tmp_path):
    base = shutil.copytree(folders["z-image"], tmp_path / "tuned")
    tuned = load_model(str(base))
    stirred(tuned.transformer)
    file = tmp_path / "tuned.safetensors"
    save_file({k: v.contiguous() for k, v in checkpoint_tensors(tuned).items()}, file)
    found = load_model(str(file))
    assert all(torch.equal(v, found.transformer.state_dict()[k]) for k, v in tuned.transformer.state_dict().items())
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if "cap_embedder.1" not in k}, file)
    with pytest.raises(UsageError, match=r"tuned.safetensors(: cap_embedder.1.\w+ is missing| could not be read)"):
        load_model(str(file))
    shutil.rmtree(base)
    save_file(tensors, file)
    with pytest.raises(UsageError, match="is a transformer of SD3 or Z-Image; put its base's diffusers folder beside"):
        load_model(str(file))
