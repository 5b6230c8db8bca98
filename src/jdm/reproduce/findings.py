"""Findings of papers on few-step students, one sentence each, and whether a page's numbers confirm them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from jdm.reproduce.results import Answer, Page, Value
from jdm.reproduce.verdicts import ERRORS, Difference, Pair, Question, Verdict

LITTLE = 0.05  # a share of the distance that counts as next to nothing
GAIN, KEPT, EXTRA = 0.2, 0.8, 0.1  # asked of 4 steps: distance, the ControlNet's diversity, time beyond 4 times one's


@dataclass(frozen=True)
class Told:
    """A part of a finding: whether it holds (None: within the errors), the numbers in words, and the numbers."""

    holds: bool | None
    text: str
    numbers: dict[str, Any]


@dataclass(frozen=True)
class Beside:
    """Row `a` has clearly more or less of a measurement than `b`, or as much: within errors or a small share."""

    a: str
    b: str
    key: str
    how: Literal["more", "less", "alike"]

    @property
    def rows(self) -> tuple[str, ...]:
        """The rows it needs."""
        return self.a, self.b

    def told(self, page: Page, column: str) -> Told | None:
        """The comparison on a page; None where a row lacks the measurement."""
        one, other = (page.result(row, column).values.get(self.key) for row in self.rows)
        if one is None or other is None:
            return None
        found = Difference.of(one, other)
        text = f"{self.a} beside {self.b}: {found.said(self.key)}"
        return Told(self._holds(found, other), text, asdict(found))

    def _holds(self, found: Difference, other: Value) -> bool | None:
        if self.how == "alike":
            near = abs(found.more) <= LITTLE * abs(other.mean)
            return True if near else None if found.errors is None or abs(found.errors) <= ERRORS else False
        if found.errors is None or abs(found.errors) <= ERRORS:
            return None
        return (found.errors > 0) == (self.how == "more")


@dataclass(frozen=True)
class Turn:
    """A row's distance in the course of training is best before the end. No run shorter than `patience` refutes it."""

    row: str
    patience: int = 0

    @property
    def rows(self) -> tuple[str, ...]:
        return (self.row,)

    def told(self, page: Page, column: str) -> Told | None:
        course = next((r.course for r in page.result(self.row, column).records if r.course and r.seed == 0), ())
        course = [at for at in course if "fd" in at]
        if len(course) < 2:
            return None
        best, last = min(course, key=lambda at: at["fd"]), course[-1]
        turned = best["step"] < last["step"]
        text = (f"{self.row}: the distance on validation pictures is {best['fd']:.2f} at step {best['step']:.0f} and "
                f"{last['fd']:.2f} at the end, step {last['step']:.0f} (no error known)")
        return Told(True if turned else False if last["step"] >= self.patience else None, text,
                    {"best": best["fd"], "step": best["step"], "last": last["fd"], "of": last["step"]})


@dataclass(frozen=True)
class Finding:
    """A sentence of a paper; it is confirmed where every part holds and refuted where one clearly does not."""

    claim: str
    parts: tuple[Beside | Turn, ...]

    def answer(self, page: Page) -> Answer:
        column = next(iter(page.columns))
        missing = list(dict.fromkeys(row for part in self.parts for row in part.rows
                                     if not page.result(row, column).records))
        told = [part.told(page, column) for part in self.parts]
        known = [one for one in told if one is not None]
        if missing or len(known) < len(told):
            verdict, text = "not measured", f"it needs {', '.join(missing) or 'the course of the runs'}"
        else:
            holds = [one.holds for one in known]
            verdict = "refuted" if False in holds else "confirmed" if all(holds) else "not told"
            text = "; ".join(one.text for one in known)
        numbers = {} if missing else {str(k): one.numbers for k, one in enumerate(known)}
        return Answer(f"The paper: {self.claim}", verdict, (column,), text, numbers)


OTHERS = ("coupled-shared-4", "decoupled-full-4", "decoupled-constrained-4")
FINDINGS = (
    Finding("CA alone converts to few steps, then its variance grows without bound.",
            (Turn("ca-4"), Beside("ca-4", "decoupled-hybrid-4", "std_growth", "more"))),
    Finding("DM alone is weak.", (Beside("dm-4", "decoupled-hybrid-4", "fd", "more"),
                                  Beside("dm-4", "decoupled-hybrid-4", "prompt_agreement", "less"))),
    Finding("Mean-variance in place of DM steadies CA, with a lower ceiling.",
            (Beside("ca-mean-variance-4", "ca-4", "std_growth", "less"),
             Beside("ca-mean-variance-4", "decoupled-hybrid-4", "fd", "more"))),
    Finding("A GAN in place of DM has a high ceiling, then collapses (after about 4,000 iterations).",
            (Turn("ca-gan-4", patience=4000),)),
    Finding("Of the four schedules at 4 steps the hybrid is the best.",
            tuple(Beside("decoupled-hybrid-4", other, "fd", "less") for other in OTHERS)),
    Finding("From (1) coupled-shared to (2) decoupled-full there is next to nothing; the range helps.",
            (Beside("decoupled-full-4", "coupled-shared-4", "fd", "alike"),
             Beside("decoupled-constrained-4", "decoupled-full-4", "fd", "less"))),
    Finding("Every student follows prompts less well than its teacher in 50 steps (DPG).",
            tuple(Beside(row, "teacher", "prompt_agreement", "less") for row in (*OTHERS, "decoupled-hybrid-4"))),
    Finding("CA alone in one step: the noisiest levels give colour blocks, a wider range adds detail, the clean end "
            "alone collapses (here by distance; see the pictures).",
            (Beside("ca-band-0.95-1-1", "ca-1", "fd", "more"),
             Beside("ca-band-0.5-1-1", "ca-band-0.95-1-1", "fd", "less"),
             Beside("ca-band-0.02-0.25-1", "ca-1", "fd", "more"))),
)


def _better(pairs: Sequence[Pair]) -> Verdict:
    """Whether each control's distance is a fifth less, at no clearly worse consistency."""
    found = []
    for pair in pairs:
        worse, farther = pair.errors("consistency"), pair.errors("fd")
        if worse is None or farther is None:
            return None
        found.append(pair.ratio("fd", 1) <= 1 - GAIN and worse <= ERRORS)
    return all(found)


CONTROLLED = (
    Question("Is the hybrid JDM student of 4 steps at least 20% nearer than that of one, at no worse consistency?",
             _better, (("hybrid-4", "hybrid-1"),)),
    Question("Does it keep at least 80% of the 50-step ControlNet's diversity over z?",
             lambda pairs: all(p.ratio("diversity", 0) >= KEPT for p in pairs),
             (("hybrid-1", "controlnet"), ("hybrid-2", "controlnet"), ("hybrid-4", "controlnet")),
             ("diversity", "consistency", "fd"), ("diversity",)),
    Question("Does a picture in four steps cost at most 10% more than four times one step's time?",
             lambda pairs: all(p.ratio("seconds_per_image", 9) <= 4 * (1 + EXTRA) for p in pairs),
             (("hybrid-4", "hybrid-1"),), ("seconds_per_image",), ("seconds_per_image",)),
)


def findings(page: Page) -> tuple[Answer, ...]:
    """The sentences of the papers that a page's table is about, each with its verdict."""
    if page.table == "ddmd":
        return tuple(finding.answer(page) for finding in FINDINGS)
    asked = CONTROLLED if page.table == "control" else ()
    return tuple(answer for question in asked if (answer := question.answer(page)))

