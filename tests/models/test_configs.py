"""The JSON of a model's folder: every type is checked before it counts, and shipped folders pass."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest

from jdm.errors import UsageError
from jdm.files import ASSETS
from jdm.library import load_model, tiny_decoder
from jdm.models import configs
from jdm.models.folder import folder_json


@pytest.mark.parametrize("file", sorted(ASSETS.rglob("*.json")), ids=lambda file: str(file.relative_to(ASSETS)))
def test_shipped_files_fit_their_schemas(file):
    found = json.loads(file.read_text())
    assert configs.check(found, str(file.relative_to(ASSETS)), str(file)) is found


# What published folders say that is unusual, and right.
PUBLISHED = {
    "unet/config.json": {
        "sample_size": [96, 64], "attention_head_dim": [5, 10, 20, 20], "transformer_layers_per_block": [1, 2, 10],
        "upcast_attention": None, "mid_block_only_cross_attention": None, "dropout": 0, "norm_eps": 1e-05,
        "reverse_transformer_layers_per_block": None, "_diffusers_version": "0.6.0", "only_cross_attention": False},
    "vae/config.json": {"scaling_factor": 0.13025, "force_upcast": True, "latents_mean": None, "shift_factor": None},
    "text_encoder/config.json": {"torch_dtype": "float16", "dropout": 0.0, "attention_dropout": 0.0,
                                 "eos_token_id": 2, "transformers_version": "4.21.0.dev0"},
    "tokenizer/tokenizer_config.json": {"model_max_length": 1000000000000000019884624838656, "pad_token": {}},
    "scheduler/scheduler_config.json": {"clip_sample": False, "trained_betas": None, "skip_prk_steps": True,
                                        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "model_index.json": {"_class_name": "StableDiffusionPipeline", "safety_checker": ["stable_diffusion", "X"],
                         "feature_extractor": [None, None], "requires_safety_checker": None},
    "jdm.json": {"kind": "one-step", "control": None, "levels": [625], "guidance": 2, "parts": {"a": "b"}},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values_fit(name):
    found = {"sample_size": 64} | PUBLISHED[name]
    assert configs.check(found, name, name) is found


@pytest.mark.parametrize(("name", "change", "key"), [
    ("jdm.json", {"control": 5}, "control"), ("jdm.json", {"guidance": "x"}, "guidance"),
    ("jdm.json", {"guidance": 1e308}, "guidance"), ("jdm.json", {"levels": 625}, "levels"),
    ("jdm.json", {"levels": ["x"]}, r"levels\[0\]"), ("jdm.json", {"levels": [-1]}, r"levels\[0\]"),
    ("jdm.json", {"levels": [10**30]}, r"levels\[0\]"), ("jdm.json", {"kind": []}, "kind"),
    ("model_index.json", {"controlnet": []}, "controlnet"), ("model_index.json", {"controlnet": 5}, "controlnet"),
    ("model_index.json", {"unet": {"a": 1}}, "unet"), ("model_index.json", {"_class_name": 7}, "_class_name"),
    ("unet/config.json", {"sample_size": None}, "sample_size"), ("unet/config.json", {"sample_size": 0}, "sample_size"),
    ("vae/config.json", {"_class_name": [[]]}, "_class_name"), ("unet/config.json", {"_class_name": 5}, "_class_name"),
    ("text_encoder/config.json", {"architectures": [[]]}, "architectures"),
    ("text_encoder/config.json", {"architectures": 10**30}, "architectures"),
    ("unet/config.json", {"sample_size": 10**9}, "sample_size"), ("unet/config.json", {"sample_size": [8]}, "sample_s"),
    ("unet/config.json", {"layers_per_block": 10**6}, "layers_per_block"),
    ("unet/config.json", {"block_out_channels": [10**9]}, "block_out_channels"),
    ("unet/config.json", {"block_out_channels": [1] * 999}, "block_out_channels"),
    ("unet/config.json", {"down_block_types": "x"}, "down_block_types"),
    ("vae/config.json", {"scaling_factor": "x"}, "scaling"), ("vae/config.json", {"scaling_factor": None}, "sca"),
    ("vae/config.json", {"shift_factor": [1]}, "shift_factor"),
    ("scheduler/scheduler_config.json", {"trained_betas": ["x"]}, "trained_betas"),
    ("scheduler/scheduler_config.json", {"trained_betas": []}, "trained_betas"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": -5}, "num_train_timesteps"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}, "num_train_timesteps"),
    ("scheduler/scheduler_config.json", {"beta_end": 7}, "beta_end"),
    ("tokenizer/tokenizer_config.json", {"model_max_length": "x"}, "model_max_length"),
    ("tokenizer/tokenizer_config.json", {"model_max_length": -5}, "model_max_length"),
    ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ("text_encoder/config.json", {"hidden_size": "x"}, "hidden_size"),
    ("text_encoder/config.json", {"_attn_implementation": "somebody/kernel"}, "_attn_implementation"),
])
@pytest.mark.hostile("json")
def test_a_wrong_value_is_named(name, change, key):
    place = ASSETS / "nano-canny" / name
    with pytest.raises(UsageError, match=rf"m/{name}: {key}.*; put back the original or fetch the model again"):
        configs.check({**json.loads(place.read_text()), **change}, name, f"m/{name}")


@pytest.mark.parametrize(("card", "control"), [
    ({"control": "canny"}, "canny-grey"), ({"control": "canny", "preprocessor": {"function": "cv2.Canny"}}, "canny"),
    ({"control": "lowres"}, "lowres"), ({"control": None}, None)], ids=str)
def test_an_old_cards_canny_is_grey(card, control, tmp_path):
    (tmp_path / "jdm.json").write_text(json.dumps(card))
    assert (folder_json(str(tmp_path), "jdm.json") or {})["control"] == control


def test_an_old_card_says_its_level(student, tmp_path):
    folder = shutil.copytree(student, tmp_path / "m")
    card = json.loads((folder / "jdm.json").read_text())
    del card["levels"], card["preprocessor"]
    (folder / "jdm.json").write_text(json.dumps({**card, "t_init": 300}))
    model = load_model(str(folder))
    assert (model.levels, (model.card or {})["control"]) == ((300,), "canny-grey")


@pytest.mark.parametrize("text", ["[]", "5", "null", '"x"', "[" * 100_000, '{"a":' * 100_000, "{", "", '{"a": NaN}'])
@pytest.mark.hostile("json")
def test_a_file_that_is_no_object_is_named(text, tmp_path):
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(UsageError, match=r"model_index\.json.*fetch the model again"):
        folder_json(str(tmp_path), "model_index.json")


@pytest.mark.parametrize(("part", "kind"), [("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"),
                                            ("text_encoder", "model"), ("controlnet", "diffusion_pytorch_model")])
@pytest.mark.hostile("pickle")
def test_weights_in_a_pickle_are_refused(part, kind, student, tmp_path):
    shutil.copytree(student, tmp_path / "m")
    weights = tmp_path / "m" / part / f"{kind}.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin" if kind == "model" else f"{kind}.bin"))
    with pytest.raises(UsageError, match=rf"{part}/\w+\.bin is a pickle.*as \.safetensors"):
        load_model(str(tmp_path / "m"))


def test_a_tiny_decoder_is_checked_by_its_class(teacher, tmp_path):
    diffusers.AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                              num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(tmp_path)
    config = json.loads(Path(tmp_path, "config.json").read_text())
    Path(tmp_path, "config.json").write_text(json.dumps({**config, "num_decoder_blocks": [10**7]}))
    with pytest.raises(UsageError, match=r"config\.json: num_decoder_blocks"):
        tiny_decoder(str(tmp_path), load_model(str(teacher)))
