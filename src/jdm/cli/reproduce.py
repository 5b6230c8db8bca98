"""`jdm reproduce`: fill a table or figure of the paper; prints it and the file of its page."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from jdm.cli import checks
from jdm.cli.console import remark
from jdm.cli.progress import TrainingProgress
from jdm.errors import RunError
from jdm.reproduce import sitting
from jdm.reproduce.cells import selected
from jdm.reproduce.models import Setting
from jdm.reproduce.page import paper_form
from jdm.reproduce.scales import SCALES
from jdm.reproduce.tables import TABLES


def command(asked: argparse.Namespace) -> int:
    table = TABLES[asked.table]
    scale = SCALES[asked.scale].on(asked.model, asked.source, asked.guide, tuple(checks.names(asked.scores)))
    setting = Setting(scale, Path(asked.out), asked.n or table.n, asked.steps, asked.device or scale.device,
                      asked.quick, asked.prompts or "", tuple(asked.known))
    if asked.dry_run:
        print(sitting.listed(table, setting, asked.seeds, asked.cells))
        return 0
    selected(sitting.opened(table, setting, asked.seeds), asked.cells)  # refuses unknown cells before anything runs
    checks.device(setting.device)
    for folder in (setting.out, Path(asked.page)):
        checks.writable(folder)
    try:
        data, failures = sitting.reproduce(
            table, setting, asked.seeds, asked.cells, not asked.no_run, Path(asked.page), invocation(asked),
            lambda run: TrainingProgress(run.steps), remark)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command goes on where it was") from None
    print(f"{data['headline']}\n\n{paper_form(data)}\n")
    page = Path(asked.page) / f"{data['file']}.md"
    print(page)
    if failures:
        raise RunError(f"{len(failures)} cells failed, the first with: {failures[0]} ({page} has them all)")
    return 0


def invocation(asked: argparse.Namespace) -> str:
    """The command line that was given, for the page: flags that differ from their defaults, without `--cells`."""
    defaults = {"scale": "nano", "model": None, "guide": None, "source": None, "seeds": 1, "n": None, "steps": None,
                "out": "runs/reproduce", "page": "docs/results", "prompts": None, "scores": None, "device": None}
    flags = [f"--{k} {shlex.quote(str(getattr(asked, k)))}" for k, v in defaults.items() if getattr(asked, k) != v]
    return " ".join([f"jdm reproduce {asked.table}", *flags, *(["--quick"] if asked.quick else [])])
