"""`jdm recipes`: print the recipes by group, without importing torch."""

from __future__ import annotations

import argparse

from jdm import recipes


def command(asked: argparse.Namespace) -> int:
    groups = recipes.groups()
    width = max(len(entry.name) for group in groups.values() for entry in group)
    for i, (title, group) in enumerate(groups.items()):
        print(("\n" if i else "") + title)
        for entry in group:
            print(f"  {entry.name:{width}}  {entry.summary}")
    return 0
