"""A table's numbers, gathered from its cells' files into one JSON object: all that its page shows."""

from __future__ import annotations

import platform
import statistics
import subprocess
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from jdm import __version__
from jdm.reproduce.cells import Cell, by_cell, columns, failed, stored
from jdm.reproduce.models import Setting
from jdm.reproduce.tables import Table
from jdm.reproduce.verdicts import answers, headline

KEYS = ("fd", "fd_floor", "fd_efflite0", "fd_floor_efflite0", "consistency", "consistency_chance",
        "consistency_same_prompt", "consistency_blank", "consistency_round_trip", "diversity", "prompt_agreement",
        "judge", "judge_accuracy", "hpsv2_anime", "hpsv2_concept_art", "hpsv2_paintings", "hpsv2_photo", "hpsv2",
        "aesthetic", "clip", "std", "nfe", "seconds_per_image", "seconds_per_image_batch1")
BASELINE = "controlnet"  # of the diversity's ratio


def gathered(table: Table, setting: Setting, found: Sequence[Cell], seeds: int, command: str) -> dict[str, Any]:
    """The table as it stands, partly filled or whole.

    Args:
        found: every cell of the table.
        command: what fills it.
    """
    groups = by_cell(found)
    rows = []
    for row in table.rows:
        own = {column: _cell(groups[row.key, column], setting) for column in columns(table, setting)
               if (row.key, column) in groups}
        rows.append({"row": row.key, "title": row.title, "part": row.part, "beside": row.beside, "steps": row.steps,
                     "published": row.published, "cells": own})
    _compare(rows)
    for row in rows:
        row["average"] = _average(row["cells"]) if len(columns(table, setting)) > 1 else None
    data = {"table": table.name, "title": table.title, "date": str(date.today()), "version": __version__,
            "commit": commit(), "python": platform.python_version(), "torch": torch.__version__,
            "processor": platform.machine(), "scale": setting.scale.name, "teacher": setting.scale.model,
            "source": setting.scale.source, "split": setting.scale.split, "n": setting.n, "seeds": seeds,
            "file": _file(table, setting), "columns": columns(table, setting),
            "measures": list(setting.scale.measures.get(table.name, table.measures)), "command": command, "rows": rows}
    return data | {"headline": headline(data), "answers": answers(data)}


def _file(table: Table, setting: Setting) -> str:
    """The page's name without suffix; a trial with other settings than the table's does not replace it."""
    trial = [setting.scale.name if setting.scale.name != "nano" else "",
             f"n{setting.n}" if setting.n != table.n else "", f"{setting.steps}steps" if setting.steps else "",
             "quick" if setting.quick else ""]
    return "-".join([str(date.today()), table.name, *filter(None, trial)])


def _cell(group: list[Cell], setting: Setting) -> dict[str, Any]:
    """One row on one column, over seeds."""
    records, reasons = [], []
    for cell in group:
        if reason := failed(cell, setting):
            reasons.append(reason)
        elif record := stored(cell, setting):
            kept = ("seed", "file", "weights", "measured", "tuning", "training")
            more = {"course": record.get("course", [])}
            more |= {"taken_from": record["taken_from"]} if "taken_from" in record else {}
            records.append({k: record[k] for k in kept} | more)
    state = "measured" if records else "failed" if reasons else "not measured" if group[0].default else "left out"
    return {"cell": group[0].name, "state": state, "reasons": reasons, "asked": len(group), "records": records,
            "values": _values([r["measured"] for r in records])}


def _values(measured: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean and spread of each measurement: over seeds where there are several, else by the bootstrap if it has one."""
    found = {}
    for key in KEYS:
        seen = [float(row[key]) for row in measured if row.get(key) is not None]
        if len(seen) > 1:
            found[key] = {"mean": statistics.fmean(seen), "spread": statistics.stdev(seen), "of": f"{len(seen)} seeds"}
        elif seen:
            spread = measured[0].get(f"{key}_spread")
            found[key] = {"mean": seen[0], "spread": spread, "of": "bootstrap" if spread is not None else None}
    return found


def _compare(rows: list[dict[str, Any]]) -> None:
    """Diversity as a ratio to the multi-step ControlNet's on the same column."""
    base = next((row["cells"] for row in rows if row["row"] == BASELINE), {})
    for row in rows:
        for column, cell in row["cells"].items():
            own, other = (c["values"].get("diversity") for c in (cell, base.get(column, {"values": {}})))
            if own and other and other["mean"] > 0:
                cell["values"]["diversity_ratio"] = {"mean": own["mean"] / other["mean"], "spread": None, "of": None}


def _average(cells: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]] | None:
    """Over the columns, where all of them are measured.

    Its spread is of the seeds' averages where every column has the same several seeds; else columns count as
    independent.
    """
    values = [cell["values"] for cell in cells.values()]
    shared = set.intersection(*(set(v) for v in values)) if values else set()
    found = {}
    for key in (k for k in (*KEYS, "diversity_ratio") if k in shared):
        spreads = [v[key]["spread"] for v in values]
        spread = None if None in spreads else sum(s**2 for s in spreads) ** 0.5 / len(spreads)
        seeds = [{r["seed"]: r["measured"].get(key) for r in cell["records"]} for cell in cells.values()]
        own = statistics.fmean(v[key]["mean"] for v in values)
        if key != "diversity_ratio" and len(seeds[0]) > 1 and all(s.keys() == seeds[0].keys() for s in seeds):
            each = [statistics.fmean(s[seed] for s in seeds) for seed in seeds[0]]
            found[key] = {"mean": own, "spread": statistics.stdev(each), "of": f"{len(each)} seeds"}
        else:
            found[key] = {"mean": own, "spread": spread, "of": "columns" if spread is not None else None}
    return found or None


def commit() -> str:
    """The commit of the source this package runs from; empty where it is installed without one."""
    try:
        done = subprocess.run(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
                              capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
