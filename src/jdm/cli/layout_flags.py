"""The flags that say what are pictures, captions and control maps, for commands that train nothing."""

from __future__ import annotations

import argparse
from typing import Any

from jdm.cli.values import Among, share, text

SPLITS = ("folders", "held-out")  # of jdm.run.Data
LAYOUT = {  # field of jdm.run.Data -> (type, help)
    "pictures": (text, "what the pictures are, as in jdm train: a column, a pattern ('*.jpg'), an ending, a folder"),
    "captions": (text, "what the captions are: a column, an ending (.caption), a folder, a key of the .json"),
    "controls": (text, "control maps of your own, read in place of measuring the control; named as pictures are"),
    "table": (text, "table to read in a folder that holds several, or none"),
    "encoding": (text, "encoding of captions that are not UTF-8, such as cp1252 or gbk"),
    "splits": (Among(SPLITS), "whether sub-folders are splits (folders), or all is one set (held-out)"),
    "unreadable": (share, "largest share of the pictures that may be unreadable and skipped (default: 0.05)"),
}


def layout_flags(parser: argparse.ArgumentParser) -> None:
    """Add them, each None where it is not given."""
    for name, (kind, said) in LAYOUT.items():
        parser.add_argument(f"--data.{name}", dest=f"data_{name}", type=kind, metavar=name.upper(), help=said)


def given(asked: argparse.Namespace) -> dict[str, Any]:
    """The fields of jdm.run.Data that were given."""
    found = {name: getattr(asked, f"data_{name}") for name in LAYOUT}
    return {name: value for name, value in found.items() if value is not None}
