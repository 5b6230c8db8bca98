"""`jdm data`: make a data set that can be trained on, from public packages."""

from __future__ import annotations

import argparse
from pathlib import Path

from jdm.cli import checks
from jdm.cli.progress import PartsProgress
from jdm.data.emoji.making import make


def command(asked: argparse.Namespace) -> int:
    out = Path(asked.out)
    checks.writable(out)
    try:
        with PartsProgress() as progress:
            made = make(out, asked.size, asked.drawings, progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command starts again, with the packages it has") from None
    for split, count in made["splits"].items():
        print(f"{split:11} {count['pictures']:6,} pictures of {count['things']:5,} things")
    near = made["near_duplicates"]
    print(f"near duplicates of training pictures (data.json names them): {near['validation']} in validation, "
          f"{near['test']} in test")
    print(f"licences and authors: {out / 'NOTICE.txt'}")
    return 0
