"""The blocks of README.md and docs/*.md, and what makes their commands short: tiny models, few pictures, two steps."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

from families import made
from jdm.cli.parser import main
from jdm.models.folder import save_pipeline

ROOT = Path(__file__).parents[1]
PAGES = {str(page.relative_to(ROOT)): page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
# A command that begins so, by its page ("" for any) -> why nothing here runs it.
NOT_RUN = {
    ("", "make "): "installs an environment; CI runs make lint and make test, tests/cli/test_demo.py the demo",
    ("", "pip install "): "needs a package registry",
    ("", "python -m http.server"): "serves until it is stopped; Python's own",
    ("", "jdm app --static"): "fetches onnxruntime-web; tests/app/test_static.py runs it where that can be had",
    ("README.md", ". .venv/bin/activate"): "the suite runs inside the environment",
    ("docs/app.md", "jdm app nano-canny nano-lowres"): "serves until it is stopped; tests/app/test_api.py",
    ("docs/app.md", "curl "): "needs a server that runs; tests/app/test_api.py asks the same of it",
    ("docs/emoji.md", "jdm data emoji"): "fetches npm packages; tests/data/test_emoji.py makes the data of small ones",
    ("docs/emoji.md", "jdm train emoji-"): "needs that data set; tests/training/test_every_recipe.py trains each",
    ("docs/emoji.md", "python examples/hand_drawings.py"): "needs that student; tests/evaluation/test_sketches.py",
    ("docs/extending.md", "jdm train sd15-image-prompt"): "needs CLIP; tests/controls/test_image_prompt.py",
    ("docs/scale.md", "python benchmarks/gpu.py"): "needs a GPU; tests/benchmarks/test_gpu_benchmark.py has its smoke",
    ("docs/scale.md", "torchrun --nnodes 4"): "needs four machines",
    ("docs/scale.md", "#!/bin/bash"): "needs SLURM",
    ("docs/scale.md", "jdm train sd15-canny --data.source 's3:"): "needs a network; tests/data/test_shards.py",
}
# Blocks of Python that another test runs.
ELSEWHERE = {"docs/extending.md": "tests/test_extending.py"}
FAMILIES = {"sd15": "sd15", "sdxl": "sdxl", "sd35": "sd35", "z-image": "z-image"}  # recipe's prefix -> tiny model
HUB = {"Tongyi-MAI/Z-Image-Turbo": "turbo"}  # a hub's model -> a tiny one's folder, named as distilled
POSTERIOR = "--method.condition.posterior.rank 2"
LORAS = f"--method.student.rank 2 --method.fake.rank 2 {POSTERIOR}"
# The ranks of a recipe's LoRAs, which no tiny model has room for.
RANKS = {"sd15-canny": f"--method.fake.rank 2 {POSTERIOR}", "sdxl-canny": f"--method.fake.rank 2 {POSTERIOR}",
         "sd15-shared": f"--method.fake.rank 2 {POSTERIOR}", "sd15-canny-lora": LORAS, "z-image-canny": LORAS,
         "z-image-scribble-8": LORAS, "sd35-canny": LORAS}
# A number that costs hours -> the one that costs seconds; the last word of a flag that is given twice counts.
SHORTER = {"--nproc-per-node 8": "--nproc-per-node 2", "--batch 8": "--batch 2", "--batch 128": "--batch 2",
           "--shard 8": "--shard 2", "--rank 64": "--rank 2", "--n 1000": "--n 8 --quick", "-every 100": "-every 1"}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page].read_text(), re.S)


def commands_of(block: str) -> list[str]:
    """The commands of a sh block, without comments; a script that names its shell is one command."""
    joined = re.sub(r"\\\n\s*", "", re.sub(r"[ \t]+# .*", "", block))
    return [block] if block.startswith("#!") else [line.strip() for line in joined.splitlines() if line.strip()]


def commands(page: str) -> list[str]:
    return [command for block in blocks(page, "sh") for command in commands_of(block)]


def reason(page: str, command: str) -> str:
    """Why a command is not run; empty if it is."""
    return next((why for (where, start), why in NOT_RUN.items()
                 if where in ("", page) and command.startswith(start)), "")


def steps(page: str) -> Iterator[tuple[str, str]]:
    """(sh or python, text) of what is run of a page, in its order."""
    for language, text in re.findall(r"```(sh|python)\n(.*?)```", PAGES[page].read_text(), re.S):
        if language == "sh":
            yield from (("sh", each) for each in commands_of(text) if not reason(page, each))
        elif page not in ELSEWHERE:
            yield "python", text


def working_folder(folder: Path) -> Path:
    """A folder with what the pages take for granted: my_pictures, photo.jpg, the examples; and tiny models."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for kind in FAMILIES.values():
            save_pipeline(made(kind), folder / "models" / kind)
        save_pipeline(made("z-image"), folder / "turbo")
    (folder / "my_pictures").mkdir()
    for i in range(8):
        picture = Image.effect_noise((40, 40), 20 + 10 * i).convert("RGB")
        picture.save(folder / "my_pictures" / f"{i}.jpg")
        (folder / "my_pictures" / f"{i}.txt").write_text(f"noise number {i}")
    picture.save(folder / "photo.jpg")
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / ".local" / "share" / "bash-completion" / "completions").mkdir(parents=True)
    (folder / ".config" / "fish" / "completions").mkdir(parents=True)
    return folder


def family_of(recipe: str) -> str:
    """The tiny model that stands for a recipe's teacher; empty for those that ship."""
    return next((kind for prefix, kind in FAMILIES.items() if recipe.startswith(prefix)), "")


def shortened(command: str) -> list[str]:
    """The command's words with tiny models in place of large ones, and the flags that keep a run short."""
    for long, short in {**HUB, **SHORTER}.items():
        command = command.replace(long, short)
    words = shlex.split(command)
    if found := re.search(r"\bjdm doctor .*--recipe (sd\S+)", command):
        words += ["--model", f"models/{family_of(found[1])}", "--data.size", "32"]
    found = re.search(r"\bjdm (train|prepare|estimate) (\S+)", command)
    if found:
        recipe = found[2]
        family = family_of(recipe)
        if "--data.source" not in words and not family:
            words += ["--data.split", "test[:8]", "--data.validation", "test[8:16]"]
        else:
            words += ["--data.split", "train[:4]", "--data.validation", "train[:4]"]
        words += ["--steps", "2", "--device", "cpu"]
        words += [] if "--batch" in words else ["--batch", "2"]
        if family:
            words += ["--model", f"models/{family}", "--data.size", "32", *RANKS.get(recipe, "").split()]
    if "--format lora" in command:
        words += ["--base", f"models/{'z-image' if 'z-' in command or 'z_' in command else 'sd15'}"]
    return words


def run(command: str) -> None:
    """Runs a command in the working folder; an error ends the test with what it said."""
    if "runs/other" in command and not Path("runs/other").exists():  # a second run like the first
        shutil.copytree("runs/mine", "runs/other")
    if re.search(r"[>|;&]", command):
        words = ["bash", "-ec", f'jdm() {{ "{sys.executable}" -m jdm "$@"; }}; {command}']
    else:
        words = shortened(command)
        if words[0] == "jdm":
            assert main(words[1:]) == 0, command
            return
        launch = {"torchrun": ["-m", "torch.distributed.run", "--standalone"], "python": []}[words[0]]
        words = [sys.executable, *launch, *(word for word in words[1:] if word != "--standalone")]
    own = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(words, capture_output=True, text=True, timeout=900, check=False,
                          env=own | {"OMP_NUM_THREADS": "1", "HOME": os.getcwd()})
    assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
