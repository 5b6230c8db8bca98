"""Tables of students in few steps: Decoupled DMD's study (arXiv 2511.22677), and controls in one step, two and four."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jdm.levels import RENOISING, Levels
from jdm.recipes.scales import FOUR
from jdm.regularisers import Adversarial, Anchor, MeanVariance
from jdm.reproduce.form import CONTROLS, MANY, Plot, Row, Table
from jdm.reproduce.models import Given, Trained

LEVELS = {1: (625,), 2: (999, 499), 4: FOUR}  # of a student of so many steps
ALPHAS = (1, 2, 3, 4, 5, 6)  # guidance of the whole; alpha 1 is distribution matching alone
OWN_ALPHA = 2  # the recipe's
# Noise levels from the noisiest to the cleanest; in one step no input bounds them.
BANDS = ((0.95, 1.0), (0.75, 1.0), (0.5, 1.0), (0.02, 0.5), (0.02, 0.25))
SAID = {
    "coupled-shared-4": "HPSv2.1 30.61, DPG 83.90", "decoupled-full-4": "30.69, 83.77: next to nothing gained",
    "decoupled-constrained-4": "31.71, 85.64", "decoupled-hybrid-4": "32.29, 85.85: the best",
    "teacher": "in 50 steps 30.20, 87.20", "ca-4": "sharp at first, then its variance grows without bound",
    "dm-4": "weak", "ca-mean-variance-4": "steady, with a lower ceiling",
    "ca-gan-4": "a high ceiling; collapses after about 4,000 iterations", "ca-band-0.95-1-1": "colour blocks",
    "ca-band-0.5-1-1": "wider adds detail", "ca-band-0.02-0.25-1": "collapses"}
PRINTED = (("schedule, Lumina-2.0 in 4 steps", "HPSv2.1", "HPSv3", "DPG"), ("coupled-shared", 30.61, 10.34, 83.90),
           ("decoupled-full", 30.69, 10.32, 83.77), ("decoupled-constrained", 31.71, 11.08, 85.64),
           ("decoupled-hybrid", 32.29, 11.59, 85.85), ("teacher, 50 steps", 30.20, 9.62, 87.20))


def _student(steps: int, name: str, **settings: Any) -> Trained:
    """Decoupled DMD with settings changed; a double underscore stands for a dot."""
    changed = {"student__levels": LEVELS[steps], **settings}
    return Trained("ddmd-4", control="", name=name,
                   settings=tuple((k.replace("__", "."), v) for k, v in changed.items()))


def _part(steps: int) -> str:
    return f"{steps} step{'s' * (steps > 1)}"


def _variants(steps: int) -> Iterator[tuple[str, str, bool, dict[str, Any]]]:
    """(key, title, measured unless left out, settings) of every student of so many steps."""
    few = steps > 1
    for name, (dm, ca) in RENOISING.items():
        if few or name in ("coupled-shared", "decoupled-hybrid"):  # in one step nothing bounds the others
            title = name if few else name.replace("decoupled-hybrid", "decoupled")
            yield name, title, True, {"matching__levels": dm, "augmentation__levels": ca}
    alone = {"matching": None}
    yield "ca", "CA alone", True, alone
    yield "dm", "DM alone (alpha 1)", True, {"augmentation": None}
    yield "ca-mean-variance", "CA + mean-variance", True, alone | {"regulariser": MeanVariance()}
    yield "ca-gan", "CA + GAN", True, alone | {"regulariser": Adversarial()}
    yield "anchor", "hybrid with DP-DMD's anchor", few, {"anchor": Anchor()}
    for alpha in ALPHAS[2:]:
        yield f"alpha-{alpha}", f"hybrid, alpha {alpha}", few, {"augmentation__weight": alpha - 1.0}
    for low, high in BANDS:
        band = f"{low:g}-{high:g}"
        yield f"ca-band-{band}", f"CA alone, t in [{low:g}, {high:g}]", not few, alone | {
            "augmentation__levels": Levels(low, high, "augmentation")}
        yield f"dm-band-{band}", f"DM at t in [{low:g}, {high:g}], CA anywhere", not few, {
            "matching__levels": Levels(low, high), "augmentation__levels": Levels(stream="augmentation")}


def _rows(steps: int) -> Iterator[Row]:
    for key, title, default, settings in _variants(steps):
        key = f"{key}-{steps}"
        yield Row(key, title, _student(steps, key, **settings), steps=steps, default=None if default else (),
                  part=_part(steps), said=SAID.get(key, ""))


def _key(alpha: int) -> str:
    return {1: "dm-4", OWN_ALPHA: "decoupled-hybrid-4"}.get(alpha, f"alpha-{alpha}-4")


TEACHER = Row("teacher", "the teacher, 50 steps, guidance 2", Given(), steps=50, guidance=2.0, said=SAID["teacher"])
_TURNS = tuple(f"{key}-4" for key in ("decoupled-hybrid", "ca", "dm", "ca-mean-variance", "ca-gan"))
DDMD = Table(
    "ddmd", "Decoupled DMD's study",
    (TEACHER, Row("teacher-4", "the teacher, 4 steps, guidance 2", Given(), steps=4, guidance=2.0), *_rows(4),
     *_rows(1)),
    columns=(), measures=("fd", "prompt_agreement", "diversity", "std", "std_growth", "nfe", "seconds_per_image"),
    picture=True, n=2000, probes=10, theirs=PRINTED,
    theirs_note="Published: other models, pictures and measurements, for reference only.",
    plots=(Plot("std(x) of training batches, 4 steps", "std_x", _TURNS, "course"),
           Plot("distance as it trained, 4 steps", "fd", _TURNS, "course"),
           Plot("distance by the band of CA alone, 1 step", "fd",
                (*(f"ca-band-{low:g}-{high:g}-1" for low, high in BANDS), "ca-1"), "bars"),
           Plot("distance by the band of DM, 1 step", "fd",
                (*(f"dm-band-{low:g}-{high:g}-1" for low, high in BANDS), "decoupled-hybrid-1"), "bars"),
           Plot("distance over alpha, 4 steps", "fd", tuple(map(_key, ALPHAS)), "alpha", tuple(map(float, ALPHAS)))))


def _controlled() -> Iterator[Row]:
    for steps, levels in LEVELS.items():
        part, at = _part(steps), ("student.levels", levels)
        base = _student(steps, f"decoupled-hybrid-{steps}", matching__levels=RENOISING["decoupled-hybrid"][0],
                        augmentation__levels=RENOISING["decoupled-hybrid"][1])
        yield Row(f"coupled-{steps}", "JDM, coupled", Trained("canny", settings=(at,), name=f"coupled-{steps}"),
                  steps=steps, part=part)
        yield Row(f"hybrid-{steps}", "JDM, hybrid schedule",
                  Trained("canny-4", settings=(at,), name=f"hybrid-{steps}"), steps=steps, part=part)
        yield Row(f"nct-{steps}", "NCT on Decoupled DMD's student",
                  Trained("nct-4", needs=(("base", base),), settings=(("base_levels", levels),), name=f"on-{steps}"),
                  steps=steps, part=part)


CONTROL = Table("control", "controls in one step, two and four", (MANY, *_controlled()), columns=CONTROLS,
                measures=("fd", "consistency", "diversity_ratio"), n=2000, probes=5)
STUDIES = {table.name: table for table in (DDMD, CONTROL)}
