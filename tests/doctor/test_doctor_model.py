"""`jdm doctor MODEL`: the parts of a teacher's folder, its schedule and tokenizer, and the recipes that fit."""

import json
import shutil

import pytest

from jdm.cli.parser import main
from jdm.doctor.model import examined, is_model


@pytest.fixture
def folder(teacher, tmp_path):
    return shutil.copytree(teacher, tmp_path / "model")


def fitting(found, words):
    """What is said of the recipe, in one of the kinds that hold these words."""
    return {name for said, names in found.fits.items() if words in said for name in names}


def test_a_teacher_is_described(teacher):
    found = examined(str(teacher))
    facts = dict(found.facts)
    assert [row[0] for row in found.parts] == ["unet", "vae", "text_encoder"]
    assert {row[3] for row in found.parts} == {"F32"}
    assert facts["pictures"] == "32 x 32 pixels, latents 8 x 8 x 8"
    assert "DDIMScheduler, 1000 levels, beta_schedule scaled_linear" in facts["scheduler"]
    assert facts["tokenizer"].endswith("prompts of at most 16 tokens")
    assert {"nano-canny", "nano-diff-instruct", "nano-controlnet"} <= fitting(found, "fit")
    assert fitting(found, "need runs/nano-ddmd-4/model first") == {"nano-adapter-4", "nano-nct-4"}
    assert not any(name.startswith(("sd15", "sdxl", "z-image")) for names in found.fits.values() for name in names)


def test_a_student_is_no_guide(student):
    found = examined(str(student))
    assert "levels, by its card" in dict(found.facts)
    assert dict(found.facts)["as a teacher"] == "without guidance: it is a student of 1 step"
    assert "nano-canny" in fitting(found, "do not fit: term fidelity asks")


@pytest.mark.parametrize(("damage", "said"), [
    (lambda place: (place / "model_index.json").unlink(), "model_index.json is missing"),
    (lambda place: shutil.rmtree(place / "tokenizer"), "holds no tokenizer"),
    (lambda place: (place / "scheduler" / "scheduler_config.json").unlink(), "scheduler_config.json is missing"),
    (lambda place: next((place / "unet").glob("*.safetensors")).write_bytes(b"x"), "could not be loaded")])
def test_a_damaged_folder_is_refused(damage, said, folder, capsys):
    damage(folder)
    assert main(["doctor", str(folder)]) == 1
    assert f"{said}" in (text := capsys.readouterr().out)
    assert text.startswith("refused: ")
    assert len(text.strip().splitlines()) == 1


def test_a_scheduler_of_another_kind_is_refused(folder, capsys):
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "FlowMatchEulerDiscreteScheduler"}))
    assert main(["doctor", str(folder)]) == 1
    assert "the schedulers that are read for this family" in capsys.readouterr().out


def test_models_are_told_from_pictures(teacher, tmp_path):
    assert is_model(str(teacher))
    assert is_model("nano-canny")
    assert is_model("some/file.safetensors")
    assert not is_model("fashion-mnist")
    assert not is_model(str(tmp_path))
    assert not is_model("shards/*.tar")


def test_flags_for_pictures_are_refused(teacher, capsys):
    assert main(["doctor", str(teacher), "--data.size", "64"]) == 2
    assert "--data.size is for pictures" in capsys.readouterr().err
