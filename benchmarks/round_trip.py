"""What an autoencoder loses: PSNR and Canny consistency of the round trip on pictures it was not trained on.

    python benchmarks/round_trip.py runs/emoji-vae/model [--source emoji] [--size 64] [--split validation] [--sheet F]
"""

import argparse
import json

import torch

from jdm.controls import load_control
from jdm.data.pictures import grid
from jdm.data.sources import load_pictures
from jdm.metrics.consistency import chance, consistency
from jdm.models.nano import load_vae
from jdm.space import Space, from_bytes, to_bytes, unit


@torch.no_grad()
def measured(folder: str, source: str, size: int, split: str, n: int, sheet: str) -> dict[str, float]:
    """Mean over the pictures of each picture's PSNR in dB; Canny consistency of the round trip, and by chance."""
    pictures, space, canny = load_pictures(source, split, size), Space(load_vae(folder)), load_control("canny")
    rows = torch.arange(min(n, len(pictures)))
    real = pictures.batch(rows)
    made = torch.cat([to_bytes(space.decode(space.encode(from_bytes(part)))) for part in real.split(50)])
    mse = ((real.float() - made.float()) / 255).square().flatten(1).mean(1).clamp(min=1e-6)
    c, again = canny.h(unit(from_bytes(real))), canny.h(unit(from_bytes(made)))
    if sheet:
        grid(torch.stack([real[:96], made[:96]], 1).flatten(0, 1), 16).save(sheet)
    psnr = -10 * mse.log10()
    trip, by_chance = consistency(c, again).mean().item(), chance(c).mean().item()
    return {"pictures": len(rows), "psnr": psnr.mean().item(), "psnr_of_mean_error": -10 * mse.mean().log10().item(),
            "canny": trip, "canny_chance": by_chance, "canny_of_chance": trip / by_chance}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vae", help="folder of an autoencoder")
    parser.add_argument("--source", default="emoji", help="as in jdm train --data.source")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels")
    parser.add_argument("--split", default="validation", help="pictures to measure on")
    parser.add_argument("--n", type=int, default=1000, help="pictures at most")
    parser.add_argument("--sheet", default="", help="PNG file of pictures, each beside its round trip")
    asked = parser.parse_args()
    print(json.dumps(measured(asked.vae, asked.source, asked.size, asked.split, asked.n, asked.sheet), indent=1))


if __name__ == "__main__":
    main()
