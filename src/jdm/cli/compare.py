"""`jdm compare`: the curves, settings and previews of runs on one page; prints its file."""

from __future__ import annotations

import argparse
from pathlib import Path

from jdm import files
from jdm.cli import checks
from jdm.evaluation import html
from jdm.training.report import compared


def command(asked: argparse.Namespace) -> int:
    out = Path(asked.out)
    runs = [Path(name) for name in asked.runs]
    checks.writable(out.parent)
    checks.free_of_others([out], [], html.is_ours, "--out")
    print(files.write(out, compared(runs)))
    return 0
