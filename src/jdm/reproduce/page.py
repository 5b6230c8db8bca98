"""A table's page: markdown made from its JSON and from nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jdm.reproduce.tables import TABLES, TEXT_HEAD, TEXT_PUBLISHED

NAMES = {"fd": "distance", "fd_floor": "floor", "fd_efflite0": "FD-EffLite0", "fd_floor_efflite0": "its floor",
         "consistency": "consistency", "diversity": "diversity", "diversity_ratio": "x ControlNet's",
         "prompt_agreement": "prompt agreement", "judge": "judge, nats", "judge_accuracy": "judge's accuracy",
         "hpsv2": "HPSv2.1 average", "hpsv2_anime": "animation", "hpsv2_concept_art": "concept art",
         "hpsv2_paintings": "painting", "hpsv2_photo": "photo", "aesthetic": "aesthetic", "clip": "CLIP",
         "std": "std of pixels", "nfe": "NFE", "seconds_per_image": "ms / picture"}
DIGITS = {"fd_efflite0": 1, "fd_floor_efflite0": 1, "consistency": 4, "consistency_chance": 3,
          "consistency_same_prompt": 4, "consistency_blank": 3, "consistency_round_trip": 3, "prompt_agreement": 3,
          "judge": 3, "judge_accuracy": 3, "std": 3, "nfe": 0}
DETAILS = ("fd", "fd_floor", "fd_efflite0", "fd_floor_efflite0", "consistency", "diversity", "diversity_ratio",
           "prompt_agreement", "nfe", "seconds_per_image")
ANCHORS = ("consistency_chance", "consistency_same_prompt", "consistency_blank", "consistency_round_trip")
NONE = "–"


def markdown(data: dict[str, Any]) -> str:
    """The whole page; its first line says who wins."""
    parts = [f"# {_label(data['table'])}: {data['headline']}", _about(data)]
    if data.get("picture"):
        parts.append(f"![{data['title']}]({data['picture']})")
    parts.append(paper_form(data))
    if list(data["columns"]) == ["text"] and not data.get("picture"):
        parts.append("Published, on SD1.5 with HPSv2.1 and its four styles, aesthetic and CLIP scores: other pictures, "
                     "other measurements, for reference only.\n\n" + aligned([TEXT_HEAD, *TEXT_PUBLISHED]))
    if data["answers"]:
        lines = [f"- {a['question']} **{a['verdict']}**, over {', '.join(a['columns'])}: {a['text']}."
                 for a in data["answers"]]
        parts.append("## What it was asked\n\n" + "\n".join(lines))
    parts += [_details(data), _course(data), _training(data), _missing(data), _terms(data),
              f"Made by\n\n```sh\n{data['command']}\n```"]
    return "\n\n".join(part for part in parts if part) + "\n"


def paper_form(data: dict[str, Any]) -> str:
    """The table in the paper's form, the published numbers in the line below each row, under the paper's own names."""
    published = TABLES[data["table"]].published
    several = len(data["columns"]) > 1
    head = ["method", *(["NFE"] if published else []), *_heads(data), *(["average"] if several and published else [])]
    body: list[Sequence[Any]] = []
    for row in data["rows"]:
        cells = row["cells"]
        values = next((c["values"] for c in cells.values() if c["values"]), {})
        line = [_title(row), *([number(values, "nfe")] if published else [])]
        if published:
            line += [_paired(cells.get(column), data["measures"]) for column in data["columns"]]
            line += [pair(row["average"], data["measures"]) if row["average"] else NONE] if several else []
        else:
            cell = next(iter(cells.values()), None)
            line += [number(cell["values"], key) if cell and cell["values"] else _state(cell)
                     for key in data["measures"]]
        body.append(line)
        if row["published"] in published:
            body.append(_published(data, row["published"], several))
    return aligned([head, *body])


def _heads(data: dict[str, Any]) -> list[str]:
    if not TABLES[data["table"]].published:
        return [NAMES[key] for key in data["measures"]]
    return [own if own == theirs else f"{own} [theirs: {theirs}]" for own, theirs in data["columns"].items()]


def _published(data: dict[str, Any], key: str, several: bool) -> list[str]:
    printed = TABLES[data["table"]].published[key]
    names = [*data["columns"].values(), *(["average"] if several else [])]
    cells = []
    for name in names:
        fid, consistency = printed.cells.get(name, (None, None))
        cells.append(NONE if fid is None else f"{fid:.2f} / " + (NONE if consistency is None else f"{consistency:.3f}"))
    return [f"*published, SD1.5: {printed.title}*", str(printed.nfe), *cells]


def number(values: dict[str, dict[str, Any]], key: str) -> str:
    """One measurement with its spread, as printed."""
    value = values.get(key)
    if value is None:
        return NONE
    digits, unit = DIGITS.get(key, 2), 1e3 if key.startswith("seconds") else 1.0
    spread = "" if value["spread"] is None else f" ± {value['spread'] * unit:.{digits}f}"
    return f"{value['mean'] * unit:.{digits}f}{spread}"


def pair(values: dict[str, dict[str, Any]], keys: Sequence[str]) -> str:
    return " / ".join(number(values, key) for key in keys)


def _paired(cell: dict[str, Any] | None, keys: Sequence[str]) -> str:
    return pair(cell["values"], keys) if cell and cell["values"] else _state(cell)


def _state(cell: dict[str, Any] | None) -> str:
    return NONE if cell is None else cell["state"]


def _title(row: dict[str, Any]) -> str:
    return f"{row['title']} ({row['part'].lower()})" if row["part"] else row["title"]


def _about(data: dict[str, Any]) -> str:
    threads = sorted({r["measured"].get("threads") for *_, r in _records(data)} - {None})
    commit = f", commit {data['commit']}" if data["commit"] else ""
    seeds = "one training seed; ± is the bootstrap over pictures" if data["seeds"] == 1 else \
        f"{data['seeds']} training seeds; ± is the deviation over seeds, of a model that is given the bootstrap over " \
        "pictures"
    timed = f"; timed with {', '.join(map(str, threads))} CPU threads" if threads else ""
    taken = sorted({r["taken_from"] for *_, r in _records(data) if "taken_from" in r})
    known = f" Cells that were measured on equal terms before are taken from {', '.join(taken)}." if taken else ""
    return (f"{data['date']}, jdm {data['version']}{commit}, torch {data['torch']}, {data['processor']}{timed}. Scale "
            f"{data['scale']}: teacher {data['teacher']}, the first {data['n']:,} pictures of {data['source']}, split "
            f"{data['split']}; {seeds}. In each cell: {' / '.join(NAMES[k] for k in data['measures'])}.{known}")


def _details(data: dict[str, Any]) -> str:
    """Every measurement, a table for each column."""
    parts = []
    for column in data["columns"]:
        keys = [k for k in (*DETAILS, *(k for k in data["measures"] if k not in DETAILS))
                if any(k in row["cells"].get(column, {"values": {}})["values"] for row in data["rows"])]
        anchored = "consistency" in keys
        head = ["method", *(NAMES[k] for k in keys),
                *(["chance / same prompt / blank / VAE round trip"] if anchored else []), "guidance", "seeds"]
        body = []
        for row in data["rows"]:
            cell = row["cells"].get(column)
            if cell and cell["records"]:
                anchors = [pair(cell["values"], ANCHORS)]
                body.append([_title(row), *(number(cell["values"], k) for k in keys), *(anchors if anchored else []),
                             _guidance(cell["records"][0]), f"{len(cell['records'])} of {cell['asked']}"])
        if body:
            parts.append(f"### {column}\n\n" + aligned([head, *body]))
    return "## Every measurement\n\n" + "\n\n".join(parts) if parts else ""


def _guidance(record: dict[str, Any]) -> str:
    if record["tuning"]:
        tried = ", ".join(f"{w}: {d:.2f}" for w, d in record["tuning"]["distances"].items())
        return f"{record['tuning']['chosen']:g} (distance on {record['tuning']['n']} validation pictures: {tried})"
    guidance = record["measured"].get("guidance")
    return NONE if guidance is None else f"{guidance:g}"


def _training(data: dict[str, Any]) -> str:
    """What it cost to train each cell's model: every stage but the teacher, shared ones again in each line."""
    body = []
    for row, column, record in _records(data):
        if record["seed"] == 0 and record["training"]:
            for stage in record["training"]:
                seconds = NONE if stage["seconds"] is None else f"{stage['seconds'] / 60:.1f}"
                body.append([_title(row), column, stage["name"], f"{stage['steps']} x {stage['batch']}",
                             f"{stage['samples']:,}", seconds])
    head = ["method", "column", "stage", "steps x batch", "samples", "minutes"]
    note = ("Minutes are the median seconds per step times steps; a model that ships has no log. A stage that several "
            "cells share was run once.")
    return f"## Training\n\n{note}\n\n{aligned([head, *body])}" if body else ""


def _course(data: dict[str, Any]) -> str:
    """What runs that climb a reward measured as they trained: where the judge turns and the reward does not."""
    keys = ("reward", "judge", "prompt_agreement", "fd")
    body = [[_title(row), int(at["step"]), *(NONE if k not in at else f"{at[k]:.{DIGITS.get(k, 2)}f}" for k in keys)]
            for row, _, record in _records(data) if record["seed"] == 0
            for at in record.get("course", []) if "reward" in at]
    head = ["method", "step", "reward", *(NAMES[k] for k in keys[1:])]
    note = ("On validation pictures, as it trained; the reward is of training batches, the distance to the run's own "
            "teacher. A run hacks its reward from where the judge falls and the reward does not.")
    return f"## The course of a reward\n\n{note}\n\n{aligned([head, *body])}" if body else ""


def _missing(data: dict[str, Any]) -> str:
    lines = []
    for row in data["rows"]:
        groups: dict[str, list[str]] = {}
        for cell in row["cells"].values():
            lines += [f"- {cell['cell']} failed: {reason}; again: `{_command(data, [cell['cell']])}`"
                      for reason in cell["reasons"]]
            if not cell["reasons"] and len(cell["records"]) < cell["asked"]:
                part = f"measured for {len(cell['records'])} of {cell['asked']} seeds"
                groups.setdefault(part if cell["records"] else cell["state"], []).append(cell["cell"])
        lines += [f"- {', '.join(names)} {part}: `{_command(data, names)}`" for part, names in groups.items()]
    return "## Not here\n\n" + "\n".join(lines) if lines else ""


def _command(data: dict[str, Any], names: Sequence[str]) -> str:
    return f"{data['command']} --cells {','.join(names)}"


def _terms(data: dict[str, Any]) -> str:
    measured = [r["measured"] for *_, r in _records(data)]
    if not measured:
        return ""
    said = []
    if "fd" in measured[0]:
        fid = ", which makes it FID" if measured[0]["fd_extractor"].startswith("inception") else ""
        said.append(f"Distance: Frechet distance to uncontrolled samples of the teacher on the features of "
                    f"{measured[0]['fd_extractor']}{fid}; floor: the distance of as many further samples of the "
                    "teacher.")
    if "fd_efflite0" in measured[0]:
        said.append(f"FD-EffLite0: the same on {measured[0]['fd_extractor_efflite0']}; it is not FID.")
    if any("consistency" in m for m in measured):
        said.append("Consistency: mean |h(x) - c|, lower obeys better; chance: the same pictures against other "
                    "pictures' controls; same prompt: against those of other pictures of that prompt, what reading the "
                    "prompt and ignoring the control scores.")
    if "diversity" in measured[0]:
        said.append("Diversity: mean pairwise feature distance over z at fixed prompt and control.")
    if "judge" in data["measures"]:
        said.append("Judge: mean log-probability that a classifier which nothing was trained on gives the prompted "
                    "class.")
    if "clip" in measured[0]:
        said.append(f"CLIP: 100 times the cosine of picture and prompt by {measured[0]['clip_network']}.")
    published = TABLES[data["table"]].published
    if published:
        said.append("Published numbers are FID and mean |h(x) - c| of SD1.5 on other pictures and with the paper's own "
                    "controls: they share an order of methods with ours at best, and no scale.")
    return " ".join(said)


def _records(data: dict[str, Any]) -> list[tuple[dict[str, Any], str, dict[str, Any]]]:
    return [(row, column, record) for row in data["rows"] for column, cell in row["cells"].items()
            for record in cell["records"]]


def _label(name: str) -> str:
    kind, number_ = name.rstrip("0123456789"), name.lstrip("abcdefghijklmnopqrstuvwxyz")
    return f"{'Table' if kind == 'table' else 'Figure'} {number_}"


def aligned(rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table whose columns are as wide as their longest text: to read on a terminal too."""
    text = [[str(value).replace("|", "\\|") for value in row] for row in rows]  # p(c|x) is one cell
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    lines = ["| " + " | ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)) + " |" for row in text]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])
