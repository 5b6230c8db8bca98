"""What the teacher still sees at each noise level, for docs/method.md: python examples/noise_levels.py OUT.png.

The first row has pictures, each further row the clean picture that nano-sd guesses from them at a noise level t. For
each t it prints how many edges of the guess differ from the picture's: where the guess has lost the edges, no gradient
can say how to move x_t towards them.
"""

import sys

import torch

from jdm.controls import Canny
from jdm.data.pictures import grid
from jdm.data.sources import load_pictures
from jdm.library import load_model
from jdm.metrics.consistency import blank, consistency
from jdm.space import from_bytes, to_bytes, unit

LEVELS, SHOWN, N, SEED = (0.05, 0.15, 0.3, 0.5, 0.7, 0.9), 10, 200, 0


@torch.no_grad()
def main(out: str) -> None:
    model, canny, luck = load_model("nano-sd"), Canny(), torch.Generator().manual_seed(SEED)
    pictures = load_pictures("fashion-mnist", "test[5000:]", 32)
    rows = torch.randperm(len(pictures), generator=luck)[:N]
    pixels, prompts = from_bytes(pictures.batch(rows)), pictures.prompts(rows, torch.rand(N, generator=luck))
    x, c = model.space.encode(pixels), canny.h(unit(pixels))
    eps = torch.randn(x.shape, generator=luck)
    teacher = model.score_of(model.text(), model.denoiser())
    shown = [to_bytes(pixels[:SHOWN])]
    for level in LEVELS:
        t = model.schedule.t(torch.full((N,), round(level * 1000) - 1))
        guess = model.space.decode(teacher(model.schedule.noised(x, t, eps), t, prompts).x0)
        shown.append(to_bytes(guess[:SHOWN]))
        print(f"t = {level:.2f}: |h(guess) - c| {consistency(c, canny.h(unit(guess).clamp(0, 1))).mean():.3f}")
    print(f"a blank picture: {blank(canny, c, 32).mean():.3f}")
    grid(torch.cat(shown), SHOWN, scale=2).save(out)


if __name__ == "__main__":
    main(sys.argv[1])
