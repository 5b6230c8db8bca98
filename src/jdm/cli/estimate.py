"""`jdm estimate`: a run's memory, FLOPs and GPU-hours before it starts; prints tables and can write JSON."""

from __future__ import annotations

import argparse

from jdm import files
from jdm.cli import checks, console
from jdm.cli.parser import GPUS, estimate_flags, own_parser
from jdm.cli.run_flags import configured
from jdm.cost.estimate import estimate, tables


def command(asked: argparse.Namespace) -> int:
    parser = own_parser("estimate", estimate_flags)
    own, flags = parser.parse_known_args(asked.flags)
    gpus, out = own.gpu or asked.gpu or [*GPUS], own.json or asked.json
    file = checks.json_output(out, [asked.recipe], ("peak_phase", "passes"))
    found = estimate(configured(asked.recipe, flags, parser))
    for table in tables(found, asked.recipe, gpus):
        console.printed(table)
    for note in found.notes:
        console.printed(note)
    if file:
        files.write_json(file, found.described(gpus))
    return 0
