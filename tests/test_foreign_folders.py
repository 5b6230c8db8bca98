"""Every command that reads somebody's model, run or pictures: a hostile file in there leaves no trace."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from diffusers import AutoencoderTiny
from PIL import EpsImagePlugin, Image

import tiny
from hostile import fault_of, hold
from jdm import trust
from jdm.run import described
from jdm.training.loop import train
from tiny import nano_canny

PART = "diffusion_pytorch_model"
NETWORKS = ("unet", "vae", "text_encoder", "controlnet", "decoder")  # decoder is a tiny autoencoder, for --decoder
STRAY = ("optimizer.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "random_states_0.pkl", "training_args.bin",
         "pytorch_lora_weights.bin", "model.ckpt", "learned_embeds.pt", f"{PART}.bin", f"{PART}.fp16.bin",
         "pytorch_model.BIN", f"{PART}.bin.index.json", "adapter_model.bin", "tf_model.h5", "flax_model.msgpack")
EPS = (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%LanguageLevel: 2\n%%EndComments\n"
       b"newpath 0 0 moveto 40 40 lineto stroke\nshowpage\n%%EOF\n")
MODULE = """from pathlib import Path
Path(__file__).with_name("RAN").touch()
from jdm.controls import Canny
class Mine(Canny): pass
class UNet: pass
"""


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The working folder: pictures with captions, a picture, a control map, and a pickle that leaves a file RAN."""
    place = tmp_path_factory.mktemp("foreign")
    (place / "pictures").mkdir()
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((40, 40)).save(place / "pictures" / f"{number}.png")
        (place / "pictures" / f"{number}.txt").write_text("a boot")
    shutil.copy(place / "pictures" / "0.png", place / "photo.png")
    (place / "evil").write_bytes(pickle.dumps(Touch(place / "RAN")))
    pickle.loads((place / "evil").read_bytes()).close()
    assert (place / "RAN").exists(), "the pickle is harmless, so that nothing is tested"
    (place / "RAN").unlink()
    return place


@pytest.fixture(autouse=True)
def started(here, monkeypatch):
    """In the working folder, which Python imports from too, as `python -m jdm` does; the page is not served."""
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.setattr("jdm.evaluation.evaluate.judge", tiny.judge)
    monkeypatch.setattr("jdm.app.server.server", lambda *_: SimpleNamespace(run=lambda _: None))
    yield
    trust.start([])


def traces(here: Path) -> list[str]:
    """The files RAN that something has left, which are removed."""
    found = [*here.rglob("RAN")]
    for file in found:
        file.unlink()
    return [str(file) for file in found]


def left(here: Path, asked, capsys, codes=(0, 1, 2), words="") -> str:
    """What is wrong with a command: it left a trace, or it ended with more than one line."""
    for name in ("new", "drawn", "run", "prepared", "page.html"):
        shutil.rmtree(here / name, ignore_errors=True)
        (here / name).unlink(missing_ok=True)
    fault = fault_of(asked, capsys, codes, words)
    return f"left {', '.join(ran)}" if (ran := traces(here)) else fault


# --- models ---


def changed(file: Path, change: dict) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))


def its_card(folder: Path, evil: bytes) -> None:
    """Its card names a file of its own, or its own folder as a package, and pickles lie beside its weights."""
    changed(folder / "jdm.json", {"control": f"{folder / '__init__.py'}:Mine", "reward": f"{folder.name}:Mine"})
    for part in (folder, *(folder / name for name in NETWORKS)):
        for name in STRAY if part.is_dir() else ():
            (part / name).write_bytes(evil)


def its_package(folder: Path, evil: bytes) -> None:
    changed(folder / "jdm.json", {"control": f"{folder.name}:Mine"})


def its_classes(folder: Path, evil: bytes) -> None:
    """Its configs name classes in files of its own, as diffusers and transformers let them."""
    for name in ("unet", "vae", "controlnet", "text_encoder"):
        own = {"auto_map": {"AutoModel": f"{folder.name}.UNet", "AutoConfig": f"{folder.name}.UNet"}}
        changed(folder / name / "config.json", own)
    own = {"auto_map": {"AutoTokenizer": [f"{folder.name}.UNet", None]}}
    changed(folder / "tokenizer" / "tokenizer_config.json", own)
    changed(folder / "model_index.json", {"unet": [folder.name, "UNet"], "custom_pipeline": str(folder)})


def only_pickles(*parts: str) -> Callable[[Path, bytes], None]:
    def harm(folder: Path, evil: bytes) -> None:
        for part in parts:
            (weights,) = (folder / part).glob("*.safetensors")
            for name in (f"{weights.stem}.bin", f"{PART}.bin", "pytorch_model.bin"):
                (folder / part / name).write_bytes(evil)
            weights.unlink()

    return harm


def disguised(folder: Path, evil: bytes) -> None:
    """A pickle under the name of safetensors."""
    (folder / "vae" / f"{PART}.safetensors").write_bytes(evil)


def by_index(folder: Path, evil: bytes) -> None:
    """The index of weights in several files names pickles."""
    (folder / "unet" / f"{PART}.safetensors").unlink()
    (folder / "unet" / "part.bin").write_bytes(evil)
    index = {"metadata": {}, "weight_map": {"conv_in.weight": "part.bin", "conv_in.bias": "part.bin"}}
    (folder / "unet" / f"{PART}.safetensors.index.json").write_text(json.dumps(index))


HARMS = {"card": its_card, "all": only_pickles(*NETWORKS), "disguised": disguised,
         "package": its_package, "classes": its_classes, "unet": only_pickles("unet"),
         "text": only_pickles("text_encoder"), "controlnet": only_pickles("controlnet"), "index": by_index}
FEW = 3  # of these are for commands that compute before they end; one for estimate, which reads no weights


@pytest.fixture(scope="module")
def models(here, student, controlled, teacher):
    """The tiny student and the tiny multi-step model, whole, and harmed in every way: name -> folder of them."""
    evil, narrow, once = (here / "evil").read_bytes(), (4, 4, 4), (1, 1, 1)
    decoder = AutoencoderTiny(encoder_block_out_channels=narrow, decoder_block_out_channels=narrow,
                              num_encoder_blocks=once, num_decoder_blocks=once,
                              latent_channels=tiny.VAE.latent_channels)
    for name, whole in {"student": student, "slow": controlled}.items():
        shutil.copytree(whole, here / name)
        for harm, do in HARMS.items():
            folder = here / f"{name}_{harm}"
            shutil.copytree(whole, folder)
            decoder.save_pretrained(folder / "decoder")
            (folder / "__init__.py").write_text(MODULE)
            do(folder, evil)
    shutil.copytree(teacher, here / "teacher")
    return here


PHOTO = ["--prompt", "x", "--n", "1", "--image", "photo.png", "--out", "drawn"]
RUN = ["--out", "run", "--steps", "1", "--batch", "2", "--data.split", "test[:2]", "--data.validation", "test[2:4]",
       "--probe-every", "0"]
READ = {  # command -> its words, where {} is a student's folder and {slow} that of a multi-step model
    "sample": ["sample", "{}", *PHOTO],
    "sample --also": ["sample", "student", "--also", "{}", *PHOTO],
    "evaluate": ["evaluate", "{}", "--n", "2", "--quick", "--split", "test[:2]"],
    "doctor MODEL": ["doctor", "{}"],
    "export": ["export", "{}", "new"],
    "export --format single-file": ["export", "{}", "new", "--format", "single-file"],
    "export --format controlnet": ["export", "{}", "new", "--format", "controlnet"],
    "app": ["app", "{}", "--port", "0", "--threads", "1"],
}
COMPUTED = {
    "estimate": ["estimate", "nano-controlnet", "--model", "{slow}", "--batch", "1", "--gpu", "h100"],
    "sample, slow": ["sample", "{slow}", "--steps", "2", *PHOTO],
    "sample --posterior": ["sample", "teacher", "--steer", "canny", "--posterior", "{slow}", "--steps", "2", *PHOTO],
    "train --model": ["train", "nano-canny", "--model", "{slow}", *RUN],
    "train --method.student.start": ["train", "nano-canny", "--model", "teacher", "--method.student.start", "{}", *RUN],
    "train --method.controlnet.start": ["train", "nano-nct", "--model", "teacher", "--method.base", "student",
                                        "--method.controlnet.start", "{}", *RUN],
    "train --decoder": ["train", "nano-canny", "--model", "teacher", "--decoder", "{}/decoder", *RUN],
    "prepare": ["prepare", "nano-canny", "--model", "{slow}", "--out", "prepared", *RUN[2:8]],
    "doctor DATA --recipe": ["doctor", "pictures", "--recipe", "nano-canny", "--model", "{slow}", "--out", "page.html"],
    "export --format lora": ["export", "student", "new", "--format", "lora", "--rank", "2", "--base", "{slow}"],
    "app --also": ["app", "student", "--also", "{}", "--port", "0", "--threads", "1"],
    "app --compare": ["app", "student", "--compare", "{slow}", "--port", "0", "--threads", "1"],
}


MEASURED = ("sample", "sample --also", "evaluate", "app", "sample, slow", "app --also", "app --compare")


def refusal(command: str, harm: str) -> str:
    """What the command must say of the harm; empty where it does not read what is harmed."""
    if harm in ("card", "package"):
        return "names code" if command in MEASURED else ""
    return "is a pickle" if harm == "all" and command != "estimate" else ""


@pytest.mark.parametrize("command", [*READ, *COMPUTED])
@pytest.mark.hostile("pickle")
def test_no_command_runs_a_models_files(command, models, capsys, record_property):
    def outcomes():
        for harm in [*HARMS][:None if command in READ else 1 if command == "estimate" else FEW]:
            asked = [word.format(f"student_{harm}", slow=f"slow_{harm}") for word in (READ | COMPUTED)[command]]
            yield f"{command}, {harm}", left(models, asked, capsys, words=refusal(command, harm))

    hold(outcomes(), record_property)


# --- runs ---


@pytest.fixture(scope="module")
def run(here, teacher):
    """A run of one step."""
    made = tiny.run(nano_canny(), here / "mine", teacher, steps=1)
    train(made)
    return made


def theirs(here: Path, run, harm: str) -> Path:
    """A copy of the run's folder, harmed."""
    folder, evil = here / "theirs", (here / "evil").read_bytes()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run.out, folder)
    (folder / "__init__.py").write_text(MODULE)
    said = described(replace(run, out=folder, steps=2))
    (place,) = (folder / "checkpoints").iterdir()
    if harm == "code":
        said["method"]["control"] = f"{folder / '__init__.py'}:Mine"
    elif harm == "package":
        said["method"]["control"] = "theirs:Mine"
    elif harm == "model":
        only_pickles("unet", "controlnet")(folder / "model", evil)
    elif harm == "stray":
        its_card(folder / "model", evil)
        for name in STRAY:
            (folder / name).write_bytes(evil)
            (place / name).write_bytes(evil)
    elif harm == "state":
        (place / "state.safetensors").write_bytes(evil)
    else:
        (place / "state.safetensors").unlink()
        (place / ".metadata").write_bytes(evil)
        (place / "__0_0.distcp").write_bytes(evil)
    (folder / "run.json").write_text(json.dumps({"run": said, "versions": {}}, default=str))
    return folder


OF_A_RUN = {
    "train run.json": ["train", "theirs/run.json"],
    "train run.json, elsewhere": ["train", "theirs/run.json", "--out", "run"],
    "estimate": ["estimate", "theirs/run.json", "--gpu", "h100"],
    "prepare": ["prepare", "theirs/run.json", "--out", "prepared"],
    "doctor": ["doctor", "pictures", "--recipe", "theirs/run.json", "--out", "page.html"],
    "export": ["export", "theirs", "new"],
    "export without model": ["export", "theirs", "new"],
    "compare": ["compare", "theirs", "mine", "--out", "page.html"],
    "sample": ["sample", "theirs/model", *PHOTO],
}
OF_RUNS = ("code", "package", "model", "stray", "state", "metadata")
NAMED = ("train run.json", "train run.json, elsewhere", "estimate", "doctor")  # commands that load the control
QUIET = {  # commands that read nothing of what is harmed, beside what they compute
    "prepare": ("code", "package"), "doctor": ("code", "package"), "estimate": ("code", "package"),
    "train run.json, elsewhere": ("code", "package"), "sample": ("model", "stray")}


@pytest.mark.parametrize("command", OF_A_RUN)
@pytest.mark.hostile("code")
def test_no_command_runs_a_runs_files(command, run, here, capsys, record_property):
    def outcomes():
        for harm in QUIET.get(command, OF_RUNS):
            folder = theirs(here, run, harm)
            if "without" in command:
                shutil.rmtree(folder / "model")
            words = "names code" if harm in ("code", "package") and command in NAMED else ""
            yield f"{command}, {harm}", left(here, OF_A_RUN[command], capsys, words=words)

    hold(outcomes(), record_property)


# --- pictures and links ---


@pytest.mark.hostile("pickle")
def test_no_command_starts_ghostscript(models, capsys, record_property, monkeypatch):
    program = models / "programs" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {models / 'RAN'}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    (models / "script").mkdir()
    for name in ("a.png", "b.jpg", "c.webp"):
        (models / "script" / name).write_bytes(EPS)
        (models / "script" / name).with_suffix(".txt").write_text("a boot")
    with pytest.raises(Exception, match=r"Ghostscript|gs"), Image.open(models / "script" / "a.png") as image:
        image.load()
    assert traces(models), "Pillow itself starts no program, so that nothing is tested"
    data = ["--data.source", "script"]
    commands = [
        ["sample", "student", "--prompt", "x", "--n", "1", "--image", "script/a.png", "--out", "drawn"],
        ["sample", "student", "--prompt", "x", "--n", "1", "--control-map", "script/a.png", "--out", "drawn"],
        ["evaluate", "student", "--n", "2", "--quick", *data],
        ["train", "nano-canny", "--model", "teacher", *RUN[:6], *data],
        ["prepare", "nano-canny", "--model", "teacher", *data, "--out", "prepared"],
        ["doctor", "script", "--out", "page.html"]]
    hold(((" ".join(asked), left(models, asked, capsys)) for asked in commands), record_property)


@pytest.mark.parametrize("format", ["diffusers", "single-file", "controlnet", "lora"])
@pytest.mark.hostile("pickle")
def test_an_export_of_a_run_copies_no_secret(format, run, here, capsys, record_property):
    """Neither a link out of the model's folder nor a pickle in it reaches the exported folder."""
    def outcomes():
        (here / "secret").write_text("token")
        for name in ("vae/notes.txt", "README.md", f"unet/{PART}.safetensors", "unet/more/x.json"):
            folder = theirs(here, run, "stray") / "model"
            shutil.copy(run.out / "model" / "jdm.json", folder)
            (folder / name).unlink(missing_ok=True)
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).symlink_to(here / "secret")
            fault = left(here, ["export", "theirs", "new", "--format", format], capsys, codes=(2,))
            yield name, fault or ("something was written" if (here / "new").exists() else "")
        folder = theirs(here, run, "stray") / "model"
        shutil.copy(run.out / "model" / "jdm.json", folder)
        for name in STRAY:  # beside weights in safetensors they are passed over, alone they are refused
            (folder / name).unlink()
        fault = left(here, ["export", "theirs", "new", "--format", format], capsys, codes=(0,))
        copied = [file.name for file in (here / "new").rglob("*") if file.name in STRAY[:-2]]
        yield "pickles", fault or ", ".join(copied)

    hold(outcomes(), record_property)
