"""Spoils students on purpose, for docs/troubleshooting.md: python examples/symptoms.py OUT [STEPS].

Each run begins as a healthy shipped student and trains for a few steps with one setting that is wrong. OUT/symptoms.png
has the control maps, the healthy student, the same without its control, and each spoilt one; two columns share a
prompt and a control map and differ in noise. The numbers that the monitors watch are printed.
"""

import json
import sys
from pathlib import Path

import torch

from jdm.cli.parser import main as jdm
from jdm.controls import Canny
from jdm.data.pictures import grid
from jdm.data.sources import load_pictures
from jdm.evaluation.questions import Questions
from jdm.evaluation.sampling import Sampler
from jdm.generator import starting_noise
from jdm.library import load_model
from jdm.space import to_bytes

SAMPLED, SEED = 5, 3  # questions, each drawn from two noises
HEALTHY = "--method.student.start nano-canny --method.controlnet.start nano-canny"
COMMON = "--data.split test[:5000] --data.validation test[5000:] --batch 8 --ema 0.9 --log-every 2 --probe-every 0"
SPOILT = {  # what is wrong -> the flags that cause it
    "fake-score-stands-still": f"{HEALTHY} --method.fake.optimiser.lr 1e-8 --method.student.optimiser.lr 1e-3",
    "too-much-guidance": f"{HEALTHY} --method.fidelity.guidance 40 --method.student.optimiser.lr 1e-3",
    "too-long-a-likelihood": f"{HEALTHY} --method.condition.weight 100 --method.condition.bound.early 50 "
                             "--method.condition.bound.late 50 --method.student.optimiser.lr 1e-3",
}


def pictures_of(folder: str, questions: Questions, strength: float = 1.0) -> torch.Tensor:
    model = load_model(folder)
    z = starting_noise(model.latent_shape(2 * SAMPLED, 32), SEED)
    twice = torch.arange(SAMPLED).repeat_interleave(2)
    shown = Canny().image(questions.c)[twice]
    return Sampler(model, strengths=[strength])(z, [questions.y[k] for k in twice], shown, seed=SEED)


def main(out: Path, steps: int) -> None:
    questions = Questions.of(load_pictures("fashion-mnist", "test[5000:]", 32), Canny(), SAMPLED, SEED)
    maps = to_bytes(Canny().image(questions.c).repeat_interleave(2, 0) * 2 - 1)
    rows = [maps, pictures_of("nano-canny", questions), pictures_of("nano-canny", questions, strength=0.0)]
    for wrong, flags in SPOILT.items():
        folder = out / wrong
        words = f"train nano-canny {flags} {COMMON} --steps {steps} --out {folder}".split()
        assert jdm(words) == 0, wrong
        rows.append(pictures_of(str(folder / "model"), questions))
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        print(wrong, {key: round(last[key], 3) for key in ("fake/loss", "std_x", "saturation", "spread_x")})
        grid(torch.cat(rows), 2 * SAMPLED, scale=2).save(out / "symptoms.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 40)
