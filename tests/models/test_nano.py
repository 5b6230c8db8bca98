"""nano-sd's parts before any training."""

import os
import shutil
import subprocess
import sys

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from jdm.data.sources import load_pictures
from jdm.errors import UsageError
from jdm.evaluation.sampling import Sampler
from jdm.files import ASSETS
from jdm.generator import starting_noise
from jdm.library import load_model
from jdm.models import nano
from jdm.models.folder import save_pipeline
from jdm.space import from_bytes

CODE = """
from jdm.library import load_model
from jdm.models import nano
from jdm.space import from_bytes
print(sorted(nano.tokenizer(["a photo of an ankle boot", "one t-shirt", "two to ten photos"], 16).get_vocab().items()))
"""


def test_caption_words_are_one_token_each():
    captions = [c for row in load_pictures("fashion-mnist", "test[:2]", 32).captions for c in row]
    tokens = nano.tokenizer(captions, 16)
    for caption in captions:
        assert len(tokens.tokenize(caption)) == len(caption.replace("t-shirt", "t - shirt").split())
        assert len(tokens(caption).input_ids) <= 16
    assert "".join(tokens.tokenize("Zebra!")) == "zebra</w>!</w>"


def test_a_missing_autoencoder_weight_is_refused(tmp_path):
    shutil.copytree(ASSETS / "nano-sd" / "vae", tmp_path / "vae")
    (file,) = (tmp_path / "vae").glob("*.safetensors")
    tensors = load_file(file)
    assert nano.load_vae(str(tmp_path / "vae")).training is False
    del tensors["decoder.conv_out.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UsageError, match=r"not a complete autoencoder .*lacks 1 weight of the \w+, decoder\.conv"):
        nano.load_vae(str(tmp_path / "vae"))


def test_two_processes_make_the_same_vocabulary():
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    seen = {subprocess.run([sys.executable, "-c", CODE], env=env | {"PYTHONHASHSEED": str(seed)}, check=True,
                           capture_output=True, text=True).stdout for seed in (1, 2)}
    assert len(seen) == 1


def test_the_unet_has_at_most_4_million_parameters():
    assert sum(p.numel() for p in nano.unet(nano.TeacherConfig(), (8, 8, 8)).parameters()) <= 4_000_000


def test_defaults_are_nano_sds_sizes():
    shipped = load_model("nano-sd")
    ours = nano.unet(nano.TeacherConfig(), (8, 8, 8)), nano.vae(nano.VAEConfig(), 32)
    for made, known in zip(ours, (shipped.unet, shipped.vae), strict=True):
        assert {n: p.shape for n, p in made.named_parameters()} == {n: p.shape for n, p in known.named_parameters()}


@pytest.mark.parametrize(("widths", "latent"), [((8, 8), (6, 8, 12)), ((8, 8, 8, 16), (6, 2, 3))])
def test_every_level_but_the_last_halves(widths, latent):
    config = nano.VAEConfig(6, widths)
    pixels = torch.zeros(1, 3, 16, 24)
    vae = nano.vae(config, (16, 24))
    code = vae.encode(pixels).latent_dist.mean
    assert tuple(code.shape[1:]) == config.latent_shape((16, 24)) == latent
    assert vae.decode(code).sample.shape == pixels.shape


def test_size_must_fit_the_levels():
    with pytest.raises(UsageError, match=r"size must be a multiple of 8 for an autoencoder of 4 levels, got 36 x 36"):
        nano.vae(nano.VAEConfig(4, (8, 8, 8, 8)), 36)


def test_teacher_sizes_fit_together():
    config = nano.TeacherConfig(widths=(16, 16, 32), text_width=24, text_layers=1, tokens=20, merges=5)
    tokens = nano.tokenizer(["fox, 3d style", "owl, flat style"], config.tokens, config.merges)
    ids = tokens("a fox", padding="max_length", truncation=True, return_tensors="pt").input_ids
    states = nano.text_encoder(config, tokens)(ids)[0]
    assert states.shape == (1, 20, 24)
    assert nano.unet(config, (4, 8, 8))(torch.zeros(1, 4, 8, 8), 5, states).sample.shape == (1, 4, 8, 8)


def test_pooled_text_alone_moves_stock_pictures(tmp_path):
    """A student whose cross-attention is silent: what the prompt changes came through the pooled text."""
    config = nano.TeacherConfig(widths=(16, 32), text_width=64, text_layers=1, pooled=True, prediction="v_prediction")
    tokens, shape = nano.tokenizer(["an ankle boot", "a coat"], config.tokens), (4, 8, 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = config.networks(shape, tokens)
        for name, weight in made["unet"].named_parameters():
            if name.endswith("attn2.to_v.weight"):
                weight.data.zero_()
        model = config.model(made, nano.vae(nano.VAEConfig(4), 32), tokens)
        model = model.with_networks(controlnet=model.new_controlnet())
    card = {"kind": "one-step", "method": "jdm", "control": "canny", "levels": [625]}
    folder = save_pipeline(model, tmp_path, model.step_scheduler([625]), card=card)
    student = load_model(str(folder))
    assert student.prediction == "v_prediction"
    z, shown = starting_noise((1, *shape), 5).expand(2, -1, -1, -1), torch.rand(2, 3, 32, 32)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["an ankle boot", "a coat"]
    stock = pipe(prompts, image=shown, latents=z, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    with torch.no_grad():
        ours = Sampler(student).x(z, prompts, shown)
    assert (stock.images - ours).abs().max() < 1e-4
    assert (ours[0] - ours[1]).abs().max() > 1e-2


def test_pooled_text_needs_a_width_of_heads():
    with pytest.raises(UsageError, match=r"multiple of 64, got 96; change --method\.network\.text-width"):
        nano.unet(nano.TeacherConfig(pooled=True), (4, 8, 8))


def test_bound_on_merges_keeps_the_most_frequent():
    tokens = nano.tokenizer(["fox fox fox", "owl"], 16, merges=2)
    assert tokens.tokenize("fox owl") == ["fox</w>", "o", "w", "l</w>"]
    assert len(tokens) == 2 * 256 + 2 + 2


def test_the_packaged_autoencoder_keeps_held_out_pictures():
    vae, pictures = nano.load_vae("emoji-vae"), load_pictures("emoji", "test[:64]", 64)
    pixels = from_bytes(pictures.batch(torch.arange(64)))
    with torch.no_grad():
        found = vae.decode(vae.encode(pixels).latent_dist.mean).sample
    assert (found - pixels).square().mean() < 0.01, "26 dB"
    assert vae.encode(pixels[:1]).latent_dist.mean.shape == (1, 4, 16, 16)
