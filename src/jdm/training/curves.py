"""Names, units and order of the numbers in metrics.jsonl."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jdm.evaluation.chart import chart

Rows = Sequence[Mapping[str, float]]
MEASUREMENTS, TERMS, PHASES, HEALTH, TIME = "Measurements", "Terms", "Phases", "The student's samples", "Time"
SIZE = "rms over components, model space"


@dataclass(frozen=True)
class Curve:
    """A number's name for a reader, the name of its axis with the unit, and the group it is shown in."""

    name: str
    unit: str
    group: str


# key of metrics.jsonl, as a pattern -> its curve; {0} is what the pattern's bracket holds. The first that fits counts.
KNOWN: dict[str, Curve] = {
    "probe/fd": Curve("Fréchet distance to the teacher", "squared distance of features", MEASUREMENTS),
    "probe/consistency": Curve("Consistency: error of the control", "mean |h(x) - c| or its own", MEASUREMENTS),
    "probe/prompt_agreement": Curve("Prompt agreement", "share of pictures, 0 to 1", MEASUREMENTS),
    "probe/judge": Curve("Judge's log-probability of the prompt", "nats", MEASUREMENTS),
    "probe/judge_accuracy": Curve("Prompt agreement by the judge", "share of pictures, 0 to 1", MEASUREMENTS),
    "probe/accuracy": Curve("Accuracy on validation pictures", "share of pictures, 0 to 1", MEASUREMENTS),
    "probe/loss": Curve("Validation loss", "mean squared error of eps", MEASUREMENTS),
    "probe/squared_error": Curve("Validation error of the round trip", "mean squared error, pixels", MEASUREMENTS),
    "probe/(.+)": Curve("Validation: {0}", "{0}", MEASUREMENTS),
    "reward": Curve("Reward of the student's samples", "mean reward, its own units", MEASUREMENTS),
    "cos_(.+)": Curve("Cosine: {0}", "cosine, -1 to 1", TERMS),
    "dm_over_ca": Curve("Matching over augmentation", "ratio of lengths", TERMS),
    "(.+)_raw": Curve("Term {0} before its bound", SIZE, TERMS),
    "fake/loss": Curve("Loss of the fake score", "mean squared error", PHASES),
    "(.+)/loss": Curve("Loss of phase {0}", "loss", PHASES),
    "(.+)/gradient": Curve("Gradient of phase {0} before its bound", "norm over all parameters", PHASES),
    "(consistency|boundary)_loss": Curve("Loss: {0}", "pseudo-Huber distance, model space", PHASES),
    "multiplier": Curve("Multiplier of the boundary loss", "factor", PHASES),
    "discriminator_margin": Curve("Discriminator: real minus fake", "logits", PHASES),
    "squared_error": Curve("Squared error of the round trip", "mean squared error, pixels", PHASES),
    "kl": Curve("KL of the latents to N(0, I)", "nats per pixel value", PHASES),
    "std_x": Curve("Standard deviation of the samples", "model space", HEALTH),
    "spread_x": Curve("Standard deviation between samples", "model space", HEALTH),
    "saturation": Curve("Components beyond 4", "share, 0 to 1", HEALTH),
    "seconds": Curve("Time of a step and its measurements", "seconds", TIME),
    "(.+)": Curve("Term {0}", SIZE, TERMS),
}
GROUPS = (MEASUREMENTS, TERMS, PHASES, HEALTH, TIME)


def curve_of(key: str) -> Curve:
    """The curve of a key of metrics.jsonl."""
    pattern = _pattern(key)
    known, found = KNOWN[pattern], re.fullmatch(pattern, key, re.DOTALL)
    words = [part.replace("_", " ").replace("/", " ") for part in found.groups()] if found else []
    return Curve(known.name.format(*words), known.unit.format(*words), known.group)


def charts(runs: Mapping[str, Rows]) -> dict[str, list[str]]:
    """Charts by the title of their group, in order; each has a line for every run that logged its number.

    Args:
        runs: the rows of each run's metrics.jsonl, by the run's name.
    """
    found: dict[str, list[str]] = {group: [] for group in GROUPS}
    for key in keys(row for rows in runs.values() for row in rows):
        known = curve_of(key)
        series = {name: [(row["step"], row[key]) for row in rows if key in row] for name, rows in runs.items()}
        if drawn := chart(known.name, series, known.unit):
            found[known.group].append(drawn)
    return {group: drawn for group, drawn in found.items() if drawn}


def keys(rows: Iterable[Mapping[str, float]]) -> list[str]:
    """The numbers in the rows, by group: first those of KNOWN in its order, then the others as they first appear."""
    seen = dict.fromkeys(key for row in rows for key in row if key != "step")
    return sorted(seen, key=lambda key: (GROUPS.index(curve_of(key).group), list(KNOWN).index(_pattern(key))))


def _pattern(key: str) -> str:
    """The first pattern of KNOWN that fits; the last fits every key."""
    return next(pattern for pattern in KNOWN if re.fullmatch(pattern, key, re.DOTALL))
