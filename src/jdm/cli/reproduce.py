"""`jdm reproduce`: fill a table or figure of the paper; prints it and the file of its page."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from pathlib import Path

from jdm.cli import checks
from jdm.cli.console import remark
from jdm.cli.progress import TrainingProgress
from jdm.errors import RunError, plural
from jdm.reproduce import sitting
from jdm.reproduce.cells import selected
from jdm.reproduce.page import main_table
from jdm.reproduce.setups import SETUPS
from jdm.reproduce.tables import TABLES


def command(asked: argparse.Namespace) -> int:
    table = TABLES[asked.table]
    own = SETUPS[asked.scale]
    setup = replace(own.on(asked.model, asked.source), guide=asked.guide or own.guide,
                    scores=tuple(checks.names(asked.scores)) or own.scores, out=Path(asked.out),
                    device=asked.device or own.device, quick=asked.quick, prompts=asked.prompts or "",
                    known=tuple(asked.known))
    setup = setup.for_table(table.name, table.probes, asked.n or table.n, asked.steps)
    if asked.dry_run:
        print(sitting.listed(table, setup, asked.seeds, asked.cells))
        return 0
    selected(sitting.opened(table, setup, asked.seeds), asked.cells)  # refuses unknown cells before anything runs
    checks.device(setup.device)
    for folder in (setup.out, Path(asked.page)):
        checks.writable(folder)
    try:
        page, failures = sitting.reproduce(
            table, setup, asked.seeds, asked.cells, not asked.no_run, Path(asked.page), invocation(asked),
            lambda run: TrainingProgress(run.steps, run.device), remark)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command goes on where it was") from None
    print(f"{page.headline}\n\n{main_table(page)}\n")
    file = Path(asked.page) / f"{page.file}.md"
    print(file)
    if failures:
        raise RunError(f"{plural(len(failures), 'cell')} failed, the first with: {failures[0]} ({file} has them all)")
    return 0


def invocation(asked: argparse.Namespace) -> str:
    """The command line that was given, for the page: flags that differ from their defaults, without `--cells`."""
    defaults = {"scale": "nano", "model": None, "guide": None, "source": None, "seeds": 1, "n": None, "steps": None,
                "out": "runs/reproduce", "page": "docs/results", "prompts": None, "scores": None, "device": None}
    flags = [f"--{k} {shlex.quote(str(getattr(asked, k)))}" for k, v in defaults.items() if getattr(asked, k) != v]
    return " ".join([f"jdm reproduce {asked.table}", *flags, *(["--quick"] if asked.quick else [])])
