"""`jdm prepare`: what every training step would compute again, stored on disk; prints the size of each part."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from jdm.cli import checks
from jdm.cli.parser import own_parser, prepare_flags
from jdm.cli.progress import PartsProgress
from jdm.cli.run_flags import configured
from jdm.prepare import prepare


def command(asked: argparse.Namespace) -> int:
    parser = own_parser("prepare", prepare_flags)
    own, flags = parser.parse_known_args(asked.flags)
    named = Path(asked.recipe)
    name = {".py": named.stem, ".json": named.absolute().parent.name}.get(named.suffix, asked.recipe)
    folder = Path(own.out or asked.out or f"runs/prepared/{name}")
    run = configured(asked.recipe, flags, parser)
    checks.device(run.device)
    checks.writable(folder.parent)
    try:
        with PartsProgress(run.device) as progress:
            written = prepare(run, folder, asked.recipe, progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command goes on from the last whole part") from None
    for part, size in {**written, "in all": sum(written.values())}.items():
        print(f"{part.partition('-')[0]:9} {size:>16,} bytes")
    print(shlex.join(["jdm", "train", asked.recipe, *flags, "--data.prepared", str(folder)]))
    return 0
