"""Writes a results page from the JSON files of `jdm evaluate`, so that no number is typed by hand.

    python benchmarks/results_page.py OUT.md --title TITLE --row "ControlNet, 50 steps" a.json --row "JDM" b.json \\
        [--baseline 0] [--teacher t.json ...] [--step-time step.json] [--curve NAME metrics.jsonl] [--note "..."]

Ratios are to the row that --baseline gives, by default the first.
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import date
from pathlib import Path

import torch

from jdm.reproduce.sitting import commit

COLUMNS = (
    ("distance (own classifier)", lambda r: f"{r['fd']:.2f} ± {r['fd_spread']:.2f}"),
    ("floor", lambda r: f"{r['fd_floor']:.2f}"),
    ("FD-EffLite0", lambda r: f"{r['fd_efflite0']:.1f}" if "fd_efflite0" in r else "not measured"),
    ("floor", lambda r: f"{r['fd_floor_efflite0']:.1f}" if "fd_efflite0" in r else "not measured"),
    ("consistency", lambda r: f"{r['consistency']:.4f} ± {r['consistency_spread']:.4f}"),
    ("chance / blank / VAE round trip",
     lambda r: f"{r['consistency_chance']:.3f} / {r['consistency_blank']:.3f} / {r['consistency_round_trip']:.3f}"),
    ("diversity", lambda r: f"{r['diversity']:.2f}"),
    ("prompt agreement", lambda r: f"{r['prompt_agreement']:.3f}"),
    ("NFE", lambda r: str(r["nfe"])),
    ("ms / picture, batch 64", lambda r: f"{r['seconds_per_image'] * 1e3:.2f}"),
    ("batch 1", lambda r: f"{r['seconds_per_image_batch1'] * 1e3:.1f}"),
    ("peak MiB", lambda r: f"{r['peak_memory_mb']:.0f}"),
)


def command(row: dict) -> str:
    """The `jdm evaluate` command that produced a row."""
    parts = [f"jdm evaluate {row['model']}", f"--control {row['control']}" if row["control"] else "",
             f"--n {row['n']} --seed {row['seed']}"]
    if row["steps"] > 1:
        parts.append(f"--steps {row['steps']} --guidance {row['guidance']:g}")
    return " ".join(p for p in [*parts, "--json out.json"] if p)


def table(names: list[str], rows: list[dict]) -> str:
    lines = ["| | " + " | ".join(name for name, _ in COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in zip(names, rows, strict=True):
        lines.append(f"| {name} | " + " | ".join(text(row) for _, text in COLUMNS) + " |")
    return "\n".join(lines)


def ratios(name: str, row: dict, base_name: str, base: dict) -> str:
    """Distance, consistency, diversity and speed against the baseline."""
    faster = {k: base[k] / row[k] for k in ("seconds_per_image", "seconds_per_image_batch1")}
    return (f"- {name} against {base_name}: distance {row['fd'] - base['fd']:+.2f}, consistency "
            f"{(1 - row['consistency'] / base['consistency']) * 100:+.1f}% better, diversity x "
            f"{row['diversity'] / base['diversity']:.2f}, {faster['seconds_per_image']:.0f} times faster at batch 64 "
            f"and {faster['seconds_per_image_batch1']:.0f} times at batch 1.")


def curve(file: Path) -> str:
    """Table of a run's measurements on validation pictures during training."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [{k.removeprefix("probe/"): v for k, v in r.items() if k == "step" or k.startswith("probe/")} for r in rows]
    rows = [r for r in rows if len(r) > 1]
    keys = list(rows[0])
    lines = ["| " + " | ".join(keys) + " |", "|---" * len(keys) + "|"]
    return "\n".join(lines + ["| " + " | ".join(f"{row[k]:.4g}" for k in keys) + " |" for row in rows])


def teacher(records: list[dict]) -> str:
    """Table of the teacher's quality by guidance."""
    record = records[0]
    rows = sorted((row for r in records for row in r["rows"]), key=lambda row: row["guidance"])
    lines = [f"Classifier on real test pictures: {record['ceiling']:.4f}. Floors between disjoint halves of the real "
             "test pictures: " + ", ".join(f"{k} {v:.3f}" for k, v in record["floors"].items()) + ".", ""]
    keys = list(rows[0])
    lines += ["| " + " | ".join(keys) + " |", "|---" * len(keys) + "|"]
    lines += ["| " + " | ".join(f"{row[k]:.4g}" for k in keys) + " |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--title", required=True)
    parser.add_argument("--row", nargs=2, action="append", required=True, metavar=("NAME", "JSON"))
    parser.add_argument("--baseline", type=int, default=0)
    parser.add_argument("--note", action="append", default=[])
    parser.add_argument("--teacher", type=Path, nargs="+", default=[])
    parser.add_argument("--curve", nargs=2, action="append", default=[], metavar=("NAME", "JSONL"))
    parser.add_argument("--step-time", type=Path)
    args = parser.parse_args()
    names = [name for name, _ in args.row]
    rows = [json.loads(Path(file).read_text()) for _, file in args.row]
    if commit().endswith("-dirty"):
        raise SystemExit("src/jdm has changes that are in no commit: nobody could repeat the page; commit first")
    threads = sorted({row["threads"] for row in rows})
    parts = [f"# {args.title}", f"{date.today()}, commit {commit()}, timed with {threads} CPU threads, "
             f"{platform.machine()}, torch {torch.__version__}.", table(names, rows)]
    base = args.baseline
    parts.append("\n".join(ratios(names[i], row, names[base], rows[base]) for i, row in enumerate(rows) if i != base))
    parts.append("Commands:\n\n```sh\n" + "\n".join(command(row) for row in rows) + "\n```")
    extractor = rows[0]["fd_extractor"]
    parts.append(f"Distance: Frechet distance to uncontrolled teacher samples on the features of {extractor}; ± is the "
                 "bootstrap over pictures, one training seed. Consistency: mean |h(x) - c| with OpenCV's Canny. "
                 "Diversity: mean pairwise feature distance over z at fixed prompt and control.")
    if args.teacher:
        parts.append("## The teacher, by guidance\n\n" + teacher([json.loads(f.read_text()) for f in args.teacher]))
    for name, file in args.curve:
        parts.append(f"## {name}, during training\n\n{curve(Path(file))}")
    if args.step_time:
        times = json.loads(args.step_time.read_text())
        rows_ms = "\n".join(f"| {k} | {v * 1e3:.1f} |" for k, v in times.items() if k != "ratio")
        parts.append(f"## One iteration\n\n| pass | ms |\n|---|---|\n{rows_ms}\n\nFull iteration over the bare passes: "
                     f"{times['ratio']:.3f}.")
    parts += args.note
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
