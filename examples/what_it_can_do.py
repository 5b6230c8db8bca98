"""Draws the README's pictures with the shipped students: python examples/what_it_can_do.py OUT.

Each sheet shows a control above its student's one-step pictures; the last one combines a silhouette and a
low-resolution picture.
"""

import sys
from pathlib import Path

import torch

from jdm.controls import load_control
from jdm.data.pictures import grid
from jdm.data.sources import load_pictures
from jdm.evaluation.questions import Questions, answers
from jdm.evaluation.sampling import Sampler
from jdm.generator import starting_noise
from jdm.library import load_controlnet, load_model
from jdm.space import to_bytes

N, SEED, TOGETHER = 10, 3, ("silhouette", "lowres")


def main(out: Path) -> None:
    pictures = load_pictures("fashion-mnist", "test[5000:]", 32)
    controls = {name: load_control(name) for name in ("canny", "soft-edge", "silhouette", "lowres")}
    questions = {name: Questions.of(pictures, control, N, SEED) for name, control in controls.items()}
    shown = {name: control.image(questions[name].c) for name, control in controls.items()}
    for name, control in controls.items():
        made = answers(Sampler(load_model(f"nano-{name}")), questions[name], control)
        grid(torch.cat([to_bytes(shown[name] * 2 - 1), made]), N, scale=2).save(out / f"what-{name}.png")

    first, second = TOGETHER
    model = load_model(f"nano-{first}")
    sampler = Sampler(model, also=[load_controlnet(f"nano-{second}", model)[0]], strengths=[0.7, 0.7])
    both = torch.cat([shown[first], shown[second]], dim=1)
    made = sampler(starting_noise(model.latent_shape(N, 32), SEED), questions[first].y, both)
    rows = [to_bytes(shown[first] * 2 - 1), to_bytes(shown[second] * 2 - 1), made]
    grid(torch.cat(rows), N, scale=2).save(out / "what-two.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
