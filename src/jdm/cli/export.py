"""`jdm export`: a run's model as a folder for other programs; prints the folder, and its address if uploaded."""

from __future__ import annotations

import argparse

import torch

from jdm.export import hub, writers

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def command(asked: argparse.Namespace) -> int:
    name = hub.checked_name(asked.push) if asked.push else None
    folder = writers.export(asked.run, asked.out, DTYPES[asked.dtype], asked.format, asked.rank, asked.base,
                            asked.metrics)
    print(folder)
    if name:
        print(hub.push(folder, name))
    return 0
