"""`jdm evaluate`: measure a model; prints a table and can write JSON."""

from __future__ import annotations

import argparse

from jdm import files
from jdm.cli import checks, console
from jdm.cli.layout_flags import given
from jdm.errors import UsageError
from jdm.evaluation import evaluate as evaluation
from jdm.metrics.scores import read_prompts
from jdm.run import Data


def command(asked: argparse.Namespace) -> int:
    file = checks.json_output(asked.json, [asked.prompts, asked.model, asked.source], ("model", "seed"))
    checks.device(asked.device)
    scored = checks.names(asked.scores)
    if asked.prompts and (flags := given(asked)):
        raise UsageError(f"--prompts reads no pictures; leave out --data.{next(iter(flags))}, or --prompts")
    if asked.prompts:
        row = evaluation.evaluate_prompts(asked.model, read_prompts(asked.prompts), scored, asked.n, asked.seed,
                                          asked.steps, asked.guidance, asked.device)
    else:
        row = evaluation.evaluate(asked.model, asked.control, asked.n, asked.seed, asked.source, asked.split,
                                  asked.steps, asked.guidance, asked.teacher, asked.quick, scored, asked.extractor,
                                  asked.device, Data(**given(asked)))
    console.table(["measurement", "value"],
                  [[key.replace("_", " "), f"{value:.5g}" if isinstance(value, float) else str(value)]
                   for key, value in row.items()], title=asked.model)
    if file:  # last, so that a disk that fails does not hide what took an hour
        files.write_json(file, row)
    return 0
