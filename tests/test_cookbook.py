"""docs/z-image.md: its commands and its code, run in their order on a tiny model."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from families import made
from jdm.cli.parser import main
from jdm.models.folder import save_pipeline

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "z-image.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
# What makes a run of hours one of seconds; the page's own flags stay.
RANKS = "--method.student.rank 2 --method.fake.rank 2 --method.condition.posterior.rank 2"
SMALL = ("--model TEACHER --data.size 32 --data.split train[:4] --data.validation train[:4] --device cpu --steps 2 "
         f"{RANKS}")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with my_pictures, photo.jpg, the examples, and the models that the page fetches."""
    folder = tmp_path_factory.mktemp("cookbook")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = made("z-image")
    save_pipeline(model, folder / "teacher")
    save_pipeline(model, folder / "turbo")
    (folder / "my_pictures").mkdir()
    for i in range(8):
        picture = Image.effect_noise((40, 40), 20 + 10 * i).convert("RGB")
        picture.save(folder / "my_pictures" / f"{i}.png")
        (folder / "my_pictures" / f"{i}.txt").write_text(f"noise number {i}")
    picture.save(folder / "photo.jpg")
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


def small(command):
    """The command's words with the tiny model in place of the large one, and the flags that keep it short."""
    command = command.replace("Tongyi-MAI/Z-Image-Turbo", "turbo").replace("--nproc-per-node 8", "--nproc-per-node 2")
    command = command.replace("--batch 8 --shard 8", "--batch 2 --shard 2").replace("--rank 64", "--rank 2")
    if " train " in command or " estimate " in command or " prepare " in command:
        command += f" {SMALL}".replace("TEACHER", "teacher")
    if " export " in command and "--format lora" in command:
        command += " --base teacher"
    return shlex.split(command)


def test_the_page_has_every_step():
    kinds = [re.search(r"jdm (\w+)", command)[1] for command in COMMANDS]
    assert kinds == ["estimate", "prepare", "train", "sample", "train", "train", "train", "train", *["export"] * 4]


def test_every_command_of_the_page_runs(place, monkeypatch, capfd):
    monkeypatch.chdir(place)
    for command in COMMANDS:
        words = small(command)
        if words[0] == "torchrun":
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:]]
            own = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
            done = subprocess.run(launch, capture_output=True, text=True, timeout=900, check=False,
                                  env=own | {"OMP_NUM_THREADS": "1"})
            assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
            continue
        assert words[0] == "jdm"
        code = main(words[1:])
        assert code == 0, f"{command}\n{capfd.readouterr().err[-2000:]}"
    code = re.search(r"```python\n(.*?)```", PAGE, re.S)[1]
    exec(code, {})
    assert Image.open("fox.png").size == (32, 32)
    for name in re.findall(r"`(z_canny\w*\.safetensors)`", PAGE):
        folder = max((p for p in place.glob("z_canny*") if name.startswith(p.name)), key=lambda p: len(p.name))
        assert (folder / name).is_file(), name
