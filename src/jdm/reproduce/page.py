"""A table's page: markdown made from its data and from nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jdm.reproduce.form import YARDSTICK
from jdm.reproduce.results import Line, Page, Record, Result, Value
from jdm.reproduce.tables import TABLES

NAMES = {"fd": "distance", "fd_floor": "floor", "fd_efflite0": "FD-EffLite0", "fd_floor_efflite0": "its floor",
         "consistency": "consistency", "diversity": "diversity", "diversity_ratio": "x ControlNet's",
         "prompt_agreement": "prompt agreement", "judge": "judge, nats", "judge_accuracy": "judge's accuracy",
         "hpsv2": "HPSv2.1 average", "hpsv2_anime": "animation", "hpsv2_concept_art": "concept art",
         "hpsv2_paintings": "painting", "hpsv2_photo": "photo", "aesthetic": "aesthetic", "clip": "CLIP",
         "std": "std of pixels", "std_growth": "std(x) end / start", "std_x": "std(x)", "nfe": "NFE",
         "seconds_per_image": "ms / picture"}
DIGITS = {"fd_efflite0": 1, "fd_floor_efflite0": 1, "consistency": 4, "consistency_chance": 3,
          "consistency_same_prompt": 4, "consistency_blank": 3, "consistency_round_trip": 3, "prompt_agreement": 3,
          "judge": 3, "judge_accuracy": 3, "std": 3, "std_x": 3, "std_growth": 3, "nfe": 0}
DETAILS = ("fd", "fd_floor", "fd_efflite0", "fd_floor_efflite0", "consistency", "diversity", "diversity_ratio",
           "prompt_agreement", "std", "std_growth", "nfe", "seconds_per_image")
ANCHORS = ("consistency_chance", "consistency_same_prompt", "consistency_blank", "consistency_round_trip")
COURSE = ("reward", "judge", "std_x", "consistency", "prompt_agreement", "fd")
ERRORS_OF_RATIOS = "An error of a ratio is that of both numbers in it; a geometric mean counts every control alike."
NONE = "–"


def markdown(page: Page) -> str:
    """The whole page; its first line says who wins."""
    kind, table = page.table.rstrip("0123456789"), TABLES[page.table]
    name = {"table": "Table", "fig": "Figure"}.get(kind)
    label = f"{name} {page.table.removeprefix(kind)}" if name else table.title
    drawn = ((page.title, page.picture), ("plots", page.plots))
    parts = [f"# {label}: {page.headline}", _about(page), *(f"![{title}]({file})" for title, file in drawn if file),
             main_table(page), against_yardstick(page)]
    if table.theirs:
        parts.append(f"{table.theirs_note}\n\n{aligned(table.theirs)}")
    if page.answers:
        parts.append("## What it was asked\n\n" + "\n".join(
            f"- {a.question} **{a.verdict}**, over {', '.join(a.columns)}: {a.text}." for a in page.answers))
    parts += [_details(page), _course(page), _training(page), _missing(page), _terms(page),
              f"Made by\n\n```sh\n{page.command}\n```"]
    return "\n\n".join(part for part in parts if part) + "\n"


def main_table(page: Page) -> str:
    """The page's first table, with controls as columns as in the paper; without them, measurements are the columns."""
    by_measurement = not TABLES[page.table].published and len(page.columns) == 1
    return aligned(_by_measurement(page) if by_measurement else _by_control(page))


def _by_measurement(page: Page) -> list[Sequence[Any]]:
    """A line for each row that was not left out, with the paper's finding of it in words."""
    said = {row.key: row.said for row in TABLES[page.table].rows if row.said}
    body: list[Sequence[Any]] = [["method", *(NAMES[key] for key in page.measures),
                                  *(["the paper's finding"] if said else [])]]
    for line in page.rows:
        result = next(iter(line.cells.values()), None)
        if result is None or result.state != "left out":
            body.append([_title(line), *(_values(result, [key]) for key in page.measures),
                         *([said.get(line.row, NONE)] if said else [])])
    return body


def _by_control(page: Page) -> list[Sequence[Any]]:
    """A line for each row, and below it one of published numbers, under the paper's own names."""
    published = TABLES[page.table].published
    several = len(page.columns) > 1
    body: list[Sequence[Any]] = [["method", "NFE", *(
        own if own == theirs else f"{own} [theirs: {theirs}]" for own, theirs in page.columns.items()),
        *(["average"] if several else [])]]
    for line in page.rows:
        values = next((result.values for result in line.cells.values() if result.values), {})
        body.append([_title(line), number(values, "nfe"),
                     *(_values(line.cells.get(column), page.measures) for column in page.columns),
                     *([pair(line.average, page.measures) if line.average else NONE] if several else [])])
        if printed := published.get(line.published):
            cells = [printed.cells.get(name) for name in (*page.columns.values(), *(["average"] if several else []))]
            body.append([f"*published, SD1.5: {printed.title}*", printed.nfe,
                         *(f"{c[0]:.2f} / " + (NONE if c[1] is None else f"{c[1]:.3f}") if c else NONE for c in cells)])
    return body


def against_yardstick(page: Page) -> str:
    """Each row's ratios to the yardstick's measurements, by control, and their geometric mean where both have all."""
    base = next((line for line in page.rows if line.row == YARDSTICK), None)
    if base is None or len(page.columns) < 2:
        return ""
    parts = []
    for key in ("consistency", "fd"):
        body = []
        for line in page.rows:
            shared = page.shared(line.row, YARDSTICK)
            own = {c: page.mean_over(line.row, [c], key, logs=True) for c in shared}
            of = {c: page.mean_over(YARDSTICK, [c], key, logs=True) for c in shared}
            ratios = {c: (a, b) for c in shared if (a := own[c]) and (b := of[c])}
            if line is not base and ratios:
                body.append([_title(line), *(_ratio(*ratios[c]) if c in ratios else NONE for c in page.columns),
                             _ratio(*(page.mean_over(row, tuple(page.columns), key, logs=True)
                                      for row in (line.row, YARDSTICK))) if len(ratios) == len(page.columns) else NONE])
        if body:
            parts.append(aligned([[f"{NAMES[key]}, x {base.title}", *page.columns, "geometric mean"], *body]))
    return "## Beside the yardstick\n\nBelow 1 is better. " + ERRORS_OF_RATIOS + "\n\n" + "\n\n".join(parts) \
        if parts else ""


def _ratio(own: Value | None, base: Value | None) -> str:
    """The ratio of two numbers that are given by their logarithms, with its error."""
    if own is None or base is None:
        return NONE
    ratio = math.exp(own.mean - base.mean)
    known = own.spread is not None and base.spread is not None
    return f"{ratio:.3f} ± {ratio * math.hypot(own.spread or 0, base.spread or 0):.3f}" if known else f"{ratio:.3f}"


def number(values: Mapping[str, Value], key: str) -> str:
    """One measurement with its spread, as printed."""
    if (value := values.get(key)) is None:
        return NONE
    digits, unit = DIGITS.get(key, 2), 1e3 if key.startswith("seconds") else 1.0
    spread = "" if value.spread is None else f" ± {value.spread * unit:.{digits}f}"
    return f"{value.mean * unit:.{digits}f}{spread}"


def pair(values: Mapping[str, Value], keys: Sequence[str]) -> str:
    return " / ".join(number(values, key) for key in keys)


def _values(result: Result | None, keys: Sequence[str]) -> str:
    """A cell's measurements, or why there are none."""
    return NONE if result is None else pair(result.values, keys) if result.values else result.state


def _title(line: Line) -> str:
    return f"{line.title} ({line.part.lower()})" if line.part else line.title


def _about(page: Page) -> str:
    records = [record for *_, record in page.records()]
    threads = sorted({r.measured["threads"] for r in records if r.measured.get("threads")})
    seeds = "one training seed; ± is the bootstrap over pictures" if page.seeds == 1 else \
        f"{page.seeds} training seeds; ± is the deviation over seeds, of a model that is given the bootstrap over " \
        "pictures"
    commit = f", commit {page.commit}" if page.commit else ""
    if page.commit.endswith("-dirty"):
        commit += " **and changes that are in no commit: this page cannot be repeated**"
    timed = f"; timed with {', '.join(map(str, threads))} CPU threads" if threads else ""
    taken = sorted({r.taken_from for r in records if r.taken_from})
    known = f" Cells that were measured on equal terms before are taken from {', '.join(taken)}." if taken else ""
    return (f"{page.date}, jdm {page.version}{commit}, torch {page.torch}, {page.processor}{timed}. Scale "
            f"{page.scale}: teacher {page.teacher}, the first {page.n:,} pictures of {page.source}, split "
            f"{page.split}; {seeds}. In each cell: {' / '.join(NAMES[k] for k in page.measures)}.{known}")


def _details(page: Page) -> str:
    """Every measurement, a table for each column."""
    parts = []
    for column in page.columns:
        results = [(line, result) for line in page.rows if (result := page.result(line.row, column)).records]
        keys = [k for k in dict.fromkeys((*DETAILS, *page.measures)) if any(k in r.values for _, r in results)]
        anchored = "consistency" in keys
        head = ["method", *(NAMES[k] for k in keys),
                *(["chance / same prompt / blank / VAE round trip"] if anchored else []), "guidance", "seeds"]
        body = [[_title(line), *(number(r.values, k) for k in keys), *([pair(r.values, ANCHORS)] if anchored else []),
                 _guidance(r.records[0]), f"{len(r.records)} of {r.asked}"] for line, r in results]
        parts += [f"### {column}\n\n" + aligned([head, *body])] if body else []
    return "## Every measurement\n\n" + "\n\n".join(parts) if parts else ""


def _guidance(record: Record) -> str:
    if tuning := record.tuning:
        tried = ", ".join(f"{w}: {d:.2f}" for w, d in tuning.distances.items())
        return f"{tuning.chosen:g} (distance on {tuning.n} validation pictures: {tried})"
    guidance = record.measured.get("guidance")
    return NONE if guidance is None else f"{guidance:g}"


def _training(page: Page) -> str:
    """The cost of training each cell's model: every stage but the teacher, shared ones again in each line."""
    body = [[_title(line), column, stage.name, f"{stage.steps} x {stage.batch}", f"{stage.samples:,}",
             NONE if stage.seconds is None else f"{stage.seconds / 60:.1f}"]
            for line, column, record in page.records() if record.seed == 0 for stage in record.training]
    return _section("Training", "Minutes are the median seconds per step times steps; a model that ships has no log. A "
                    "stage that several cells share was run once.",
                    ["method", "column", "stage", "steps x batch", "samples", "minutes"], body)


def _course(page: Page) -> str:
    """Measurements of runs as they trained: where the judge turns and the reward does not, where std(x) grows."""
    whole = TABLES[page.table].probes > 0
    taken = [(line, column, at) for line, column, record in page.records() if record.seed == 0 for at in record.course
             if whole or "reward" in at]
    keys = [key for key in COURSE if any(key in at for *_, at in taken)]
    several = len(page.columns) > 1
    body = [[_title(line), *([column] if several else []), int(at["step"]),
             *(f"{at[k]:.{DIGITS.get(k, 2)}f}" if k in at else NONE for k in keys)] for line, column, at in taken]
    note = "On validation pictures, as it trained; " + (
        "std(x) is of training batches, the mean since the line before." if whole else
        "the reward is of training batches, the distance to the run's own teacher. A run hacks its reward from where "
        "the judge falls and the reward does not.")
    return _section("The course of training" if whole else "The course of a reward", note,
                    ["method", *(["control"] if several else []), "step", *(NAMES.get(k, k) for k in keys)], body)


def _section(title: str, note: str, head: Sequence[str], body: Sequence[Sequence[Any]]) -> str:
    return f"## {title}\n\n{note}\n\n{aligned([head, *body])}" if body else ""


def _missing(page: Page) -> str:
    lines = []
    for line in page.rows:
        groups: dict[str, list[str]] = {}
        for result in line.cells.values():
            lines += [f"- {result.cell} failed: {reason}; again: `{page.command} --cells {result.cell}`"
                      for reason in result.reasons]
            if not result.reasons and len(result.records) < result.asked:
                part = f"measured for {len(result.records)} of {result.asked} seeds" if result.records else result.state
                groups.setdefault(part, []).append(result.cell)
        lines += [f"- {', '.join(names)} {part}: `{page.command} --cells {','.join(names)}`"
                  for part, names in groups.items()]
    return "## Not here\n\n" + "\n".join(lines) if lines else ""


def _terms(page: Page) -> str:
    """Explains the measurements that the page has."""
    measured = [record.measured for *_, record in page.records()]
    if not measured:
        return ""
    first = measured[0]
    extractor = str(first.get("fd_extractor"))
    said = {
        f"Distance: Frechet distance to uncontrolled samples of the teacher on the features of {extractor}"
        f"{', which makes it FID' if extractor.startswith('inception') else ''}; floor: the distance of as many "
        "further samples of the teacher.": "fd" in first,
        f"FD-EffLite0: the same on {first.get('fd_extractor_efflite0')}; it is not FID.": "fd_efflite0" in first,
        "Consistency: mean |h(x) - c|, lower obeys better; chance: the same pictures against other pictures' controls; "
        "same prompt: against those of other pictures of that prompt, what reading the prompt and ignoring the control "
        "scores.": any("consistency" in m for m in measured),
        "Diversity: mean pairwise feature distance over z at fixed prompt and control.": "diversity" in first,
        "std(x) end / start: of the student's training samples in model space, in the last part of the run over the "
        "first; its error is over logged steps.": any("std_growth" in m for m in measured),
        "Judge: mean log-probability that a classifier which nothing was trained on gives the prompted class.":
            "judge" in page.measures,
        f"CLIP: 100 times the cosine of picture and prompt by {first.get('clip_network')}.": "clip" in first,
        "Published numbers are FID and mean |h(x) - c| of SD1.5 on other pictures and with the paper's own controls: "
        "they share an order of methods with ours at best, and no scale.": bool(TABLES[page.table].published)}
    return " ".join(text for text, there in said.items() if there)


def aligned(rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table whose columns are as wide as their longest text: to read on a terminal too."""
    text = [[str(value).replace("|", "\\|") for value in row] for row in rows]  # p(c|x) is one cell
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    lines = ["| " + " | ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)) + " |" for row in text]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])
