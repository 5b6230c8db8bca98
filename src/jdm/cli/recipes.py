"""`jdm recipes`: print the recipes by group, without importing torch."""

from __future__ import annotations

import argparse

from jdm import recipes
from jdm.recipes import Entry


def command(asked: argparse.Namespace) -> int:
    groups = _groups()
    width = max(len(entry.name) for group in groups.values() for entry in group)
    for i, (title, group) in enumerate(groups.items()):
        print(("\n" if i else "") + title)
        for entry in group:
            print(f"  {entry.name:{width}}  {entry.summary}")
    return 0


def _groups() -> dict[str, list[Entry]]:
    """Recipes by the title of their group; by file, where jdm.recipes has no groups."""
    if grouped := getattr(recipes, "groups", None):
        return grouped()
    found: dict[str, list[Entry]] = {}
    for entry in recipes.entries().values():
        found.setdefault(entry.module.rpartition(".")[2].replace("_", " "), []).append(entry)
    return found
