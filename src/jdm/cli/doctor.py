"""`jdm doctor`: reads a source of pictures or a model once, and says what was found and what to do about it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from jdm import files
from jdm.cli import checks, console
from jdm.cli.parser import doctor_flags, own_parser
from jdm.cli.progress import PartsProgress
from jdm.cli.run_flags import changed, run_of
from jdm.doctor import model
from jdm.doctor.data import examined
from jdm.doctor.page import page_of
from jdm.doctor.reading import Looking
from jdm.errors import UsageError
from jdm.evaluation import html
from jdm.run import Run
from jdm.size import spelled

REFUSES = 1  # the exit code where training would refuse


def command(asked: argparse.Namespace) -> int:
    parser = own_parser("doctor", doctor_flags, "DATA|MODEL")
    own, flags = parser.parse_known_args(asked.flags)
    if model.is_model(asked.what):
        return _of_model(asked.what, asked.flags)
    recipe = own.recipe or ""
    run = run_of(recipe) if recipe else Run(Looking(), Path("none"))
    run = changed(run, ["--data.source", asked.what, *flags], f"jdm doctor {asked.what}", parser)
    out = Path(own.out)
    checks.writable(out.parent)
    checks.free_of_others([out], [], html.is_ours, "--out")
    with PartsProgress() as progress:
        found = examined(run, progress)
    title = f"{asked.what}, {f'as {recipe} reads it' if recipe else 'as training reads it'}, {spelled(run.data.size)}"
    if found.rows:
        console.table(["", *found.splits], found.rows, title=title)
    for line in found.lines():
        print(line)
    print("training would refuse this" if found.refused else "training would take this")
    print(files.write(out, page_of(found, title)))
    return REFUSES if found.refused else 0


def _of_model(name: str, flags: Sequence[str]) -> int:
    if flags:
        raise UsageError(f"{flags[0]} is for pictures, and {name} is a model; leave it out")
    found = model.examined(name)
    if found.refused:
        print(f"refused: {found.refused}")
        return REFUSES
    console.table(["part", "class", "parameters", "on disk"], found.parts, title=name)
    console.table(["", ""], found.facts)
    console.table(["recipes with this teacher", ""], [[said, ", ".join(names)] for said, names in found.fits.items()])
    return 0
