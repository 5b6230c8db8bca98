"""From a folder of pictures to a model in stock diffusers, by commands alone: python examples/strangers_path.py OUT.

300 captioned pictures, of which one is broken, one has its caption in UTF-16 and one a mask beside it; a control of
one's own; a training that is killed and resumed; figures; an export; a picture by diffusers, without this package.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from jdm.data.sources import load_pictures

N = 300
BROKEN, UTF16, MASKED = "p007.png", "p008.txt", "p009_mask.png"
CONTROL = """from jdm.controls import Control


class Brightness(Control):
    \"\"\"c = the grey picture, averaged over patches of 4 x 4.\"\"\"

    name = "brightness"
    channels = 1

    def h(self, images):
        grey = images.mean(1, keepdim=True)
        coarse = grey.unflatten(3, (-1, 4)).unflatten(2, (-1, 4)).mean((3, 5))
        return coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)
"""
STOCK = """import sys
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image

pipe = StableDiffusionControlNetPipeline.from_pretrained(sys.argv[1])
image = pipe("ankle boot", image=Image.open(sys.argv[2]).convert("RGB").resize((32, 32)), num_inference_steps=1,
             guidance_scale=0.0, height=32, width=32, generator=torch.manual_seed(0)).images[0]
image.save(sys.argv[3])
assert "jdm" not in sys.modules
"""


def pictures(folder: Path) -> None:
    """Writes the pictures and their captions as somebody might have them."""
    folder.mkdir(parents=True)
    found = load_pictures("fashion-mnist", f"test[:{N}]", 32)
    rows = torch.arange(N)
    for i, (pixels, caption) in enumerate(zip(found.batch(rows), found.prompts(rows, torch.rand(N)), strict=True)):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"p{i:03d}.png")
        (folder / f"p{i:03d}.txt").write_text(caption, encoding="utf-8")
    whole = (folder / BROKEN).read_bytes()
    (folder / BROKEN).write_bytes(whole[: len(whole) // 2])
    (folder / UTF16).write_text((folder / UTF16).read_text(encoding="utf-8"), encoding="utf-16")
    Image.fromarray(np.full((32, 32), 255, np.uint8)).save(folder / MASKED)


def jdm(*arguments: object, expect: int = 0) -> str:
    """Runs a command, shows it, and returns what it printed."""
    words = [str(a) for a in arguments]
    print("$ jdm", *words, flush=True)
    done = subprocess.run([sys.executable, "-m", "jdm", *words], capture_output=True, text=True)
    print(done.stdout[-1500:], done.stderr[-1500:], flush=True)
    assert done.returncode == expect, f"it ended with {done.returncode}, not {expect}"
    return done.stdout + done.stderr


def killed(arguments: list[object], log: Path, step: int) -> None:
    """Starts a training and kills it, without a warning, once it has logged that step."""
    words = [str(a) for a in arguments]
    print("$ jdm", *words, f"   # killed after step {step}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", "jdm", *words], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while process.poll() is None:
        rows = log.read_text().splitlines() if log.is_file() else []
        if rows and json.loads(rows[-1])["step"] >= step:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.05)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"


def main(out: Path, steps: int = 200) -> None:
    folder, run = out / "pictures", out / "run"
    pictures(folder)
    (out / "control.py").write_text(CONTROL)
    control = f"{out / 'control.py'}:Brightness"

    layout = ("--data.size", 32, "--data.pictures", "p???.png")
    seen = jdm("doctor", folder, "--out", out / "doctor.html", *layout, "--control", control)
    assert BROKEN in seen
    train = ["train", "nano-canny", "--method.control", control, "--data.source", folder, *layout[2:], "--steps", steps,
             "--batch", 8, "--save-every", max(1, steps // 10), "--log-every", max(1, steps // 20), "--probe-every", 0,
             "--out", run]
    killed(train, run / "metrics.jsonl", steps // 2)
    jdm(*train)
    steps_logged = [json.loads(row)["step"] for row in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps_logged == sorted(set(steps_logged)), "a resumed log repeats steps"
    assert steps_logged[-1] == steps
    jdm("evaluate", run / "model", "--control", control, "--n", 15, "--quick", "--seed", 0, "--json",
        out / "measured.json", "--data.source", folder, *layout[2:])
    jdm("export", run / "model", out / "exported", "--format", "diffusers")
    map_ = next(folder.glob("p100.png"))
    (out / "stock.py").write_text(STOCK)
    subprocess.run([sys.executable, "-I", out / "stock.py", out / "exported", map_, out / "picture.png"], check=True)
    print(f"{out / 'picture.png'}: one step of {out / 'exported'} in stock diffusers")


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("out", type=Path, help="folder to make")
    asked.add_argument("--steps", type=int, default=200, help="training steps")
    flags = asked.parse_args()
    if flags.out.exists() and any(flags.out.iterdir()):
        sys.exit(f"{flags.out} is not empty; name a folder to make")
    start = time.perf_counter()
    main(flags.out, flags.steps)
    print(f"{time.perf_counter() - start:.0f} s")
