"""Verdicts computed from a table's numbers: who wins, and answers to the questions it was made for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from jdm.reproduce.form import TEXT, YARDSTICK
from jdm.reproduce.page import DIGITS, NAMES
from jdm.reproduce.results import Answer, Line, Page, Value

CLAIM = 0.24  # the paper's: consistency better than the 50-step ControlNet's
CLOSE = 0.10  # a phase-2 control's consistency may be worse than a jointly trained one's by this share
FEW = 8  # steps of a student at most
ERRORS = 2.0  # errors within which two numbers are not told apart
# (name, key, which is best), of tables with controls and of text-to-image.
OBEYING = (("consistency", "consistency", min), ("distance", "fd", min))
TEXTUAL = (("prompt agreement", "prompt_agreement", max), ("judge", "judge", max), ("HPSv2.1", "hpsv2", max),
           ("CLIP", "clip", max), ("distance", "fd", min))


def best_rows(page: Page) -> str:
    """Says which row is best at what, among the rows measured on every column, or else on the column that most have.

    Over several controls the geometric mean decides, so that each counts alike, as a ratio to the yardstick's.
    """
    text, columns = list(page.columns) == [TEXT], tuple(page.columns)
    whole = _measured(page, columns)
    if len(whole) < 2:
        columns = (max(columns, key=lambda column: len(_measured(page, (column,)))),)
        whole = _measured(page, columns)
    lines = [line for line in page.rows if line.row in whole and (not text or _student(line))]
    few = text and any(line.steps > 1 for line in lines)
    rows = {line.row: f"{line.title} in {line.part}" if few and line.part else line.title for line in lines}
    best = []
    for name, key, choose in TEXTUAL if text else OBEYING:
        several = len(columns) > 1
        if means := {row: value.mean for row in rows if (value := page.mean_over(row, columns, key, logs=several))}:
            row = choose(means, key=means.__getitem__)
            digits = 4 if key == "consistency" else 3
            shown = _beside(row, means, rows, digits) if several else f"{means[row]:.{digits}f}"
            best.append(f"best {name} {rows[row]} ({shown})")
    if not best:
        return "nothing measured yet"
    if few:
        return f"of {len(rows)} students: {', '.join(best)}"
    among = "one-step students" if text else f"{len(rows)} row{'s' * (len(rows) > 1)} with {', '.join(columns)}"
    return f"of {among}: {', '.join(best)}"


def _beside(best: str, logs: Mapping[str, float], titles: Mapping[str, str], digits: int) -> str:
    """The best row's ratio to the yardstick, or the next one's where that is best; its geometric mean without one."""
    if YARDSTICK not in logs or len(logs) < 2:
        return f"geometric mean {math.exp(logs[best]):.{digits}f}"
    if best != YARDSTICK:
        return f"x {math.exp(logs[best] - logs[YARDSTICK]):.3f} {titles[YARDSTICK]}"
    second = min((row for row in logs if row != best), key=logs.__getitem__)
    return f"next {titles[second]}, x {math.exp(logs[second] - logs[best]):.3f}"


def _student(line: Line) -> bool:
    """Whether the row draws in a few steps, without guidance."""
    records = [record for result in line.cells.values() for record in result.records]
    return line.steps <= FEW and all(record.measured.get("guidance") is None for record in records)


def _measured(page: Page, columns: tuple[str, ...]) -> list[str]:
    """The rows that have all these columns."""
    return [line.row for line in page.rows if set(columns) <= set(page.shared(line.row))]


@dataclass(frozen=True)
class Difference:
    """The distance of one measurement from another.

    Attributes:
        more: the first less the second, means over the columns.
        ratio: the first over the second, over several columns the geometric mean of their ratios; None where one of the
            numbers is not positive.
        errors: `more` in errors of the difference, over several columns the ratio's logarithm in errors of it; None
            where those are not known.
        ratios: each column's own, where there are several.
    """

    more: float
    ratio: float | None
    errors: float | None
    ratios: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, a: Value, b: Value) -> Difference:
        error = None if a.spread is None or b.spread is None else (a.spread**2 + b.spread**2) ** 0.5
        more = a.mean - b.mean
        return cls(more, a.mean / b.mean if b.mean > 0 else None, more / error if error else None)

    @classmethod
    def between(cls, page: Page, a: str, b: str, columns: Sequence[str], key: str) -> Difference | None:
        """Row `a` beside row `b` over columns; None where one of them lacks the measurement."""
        one, other = (page.mean_over(row, columns, key) for row in (a, b))
        if not one or not other:
            return None
        logs = [page.mean_over(row, columns, key, logs=True) for row in (a, b)] if len(columns) > 1 else []
        if None in logs or not logs:
            return cls.of(one, other)
        apart = cls.of(*logs)  # type: ignore[arg-type]
        ratios = {c: page.result(a, c).values[key].mean / page.result(b, c).values[key].mean for c in columns}
        return cls(one.mean - other.mean, math.exp(apart.more), apart.errors, ratios)

    def said(self, key: str) -> str:
        ratio = "" if self.ratio is None else f"x {self.ratio:.2f}, "
        errors = "no error known" if self.errors is None else f"{self.errors:+.1f} errors"
        if self.ratios:
            each = ", ".join(f"{column} {r:.2f}" for column, r in self.ratios.items())
            return f"{NAMES[key].partition(',')[0]} {ratio}the geometric mean of {each} ({errors})"
        more = self.more * (1e3 if key.startswith("seconds") else 1)
        return f"{NAMES[key].partition(',')[0]} {more:+.{DIGITS.get(key, 2)}f} ({ratio}{errors})"


@dataclass(frozen=True)
class Pair:
    """Row `a` beside row `b`: their differences over the columns that both have, by measurement."""

    a: str
    b: str
    columns: tuple[str, ...]
    found: dict[str, Difference]

    def ratio(self, key: str, default: float) -> float:
        """A row's value of a measurement, or the default where it has none."""
        own = self.found.get(key)
        return default if own is None or own.ratio is None else own.ratio

    def errors(self, key: str) -> float | None:
        return self.found[key].errors if key in self.found else None


Verdict = bool | str | None  # None: not told


@dataclass(frozen=True)
class Question:
    """A question that pairs of rows answer.

    Attributes:
        pairs: (a, b); every row that stands beside another where there are none.
        keys: measurements to compare. by: those of them that the verdict rests on; one must be there.
        controls: each of phase 2's controls, which canny is not, is compared for itself.
    """

    asked: str
    verdict: Callable[[Sequence[Pair]], Verdict]
    pairs: tuple[tuple[str, str], ...] = ()
    keys: tuple[str, ...] = ("consistency", "fd")
    by: tuple[str, ...] = ("consistency",)
    controls: bool = False

    def answer(self, page: Page) -> Answer | None:
        """The answer by the pairs that the page has; None where it has none."""
        pairs = [pair for pair in self._pairs(page) if pair.found.keys() & {*self.by}]
        if not pairs:
            return None
        parts = [f"{pair.a} beside {pair.b}{f' on {pair.columns[0]}' if self.controls else ''}: "
                 + ", ".join(d.said(key) for key, d in pair.found.items()) + _unequal(page, pair) for pair in pairs]
        numbers = {(pair.columns[0] if self.controls else pair.a): {k: asdict(d) for k, d in pair.found.items()}
                   for pair in pairs}
        columns = tuple(c for c in page.columns if any(c in pair.columns for pair in pairs))
        return Answer(self.asked, _said(self.verdict(pairs)), columns, "; ".join(parts), numbers)

    def _pairs(self, page: Page) -> Iterator[Pair]:
        for a, b in self.pairs or [(line.row, line.beside) for line in page.rows if line.beside]:
            shared = page.shared(a, b)
            for columns in [(c,) for c in shared if page.columns[c] != "canny"] if self.controls else [shared]:
                found = {key: Difference.between(page, a, b, columns, key) for key in self.keys} if columns else {}
                yield Pair(a, b, columns, {key: own for key, own in found.items() if own})


def _unequal(page: Page, pair: Pair) -> str:
    """The columns on which the two models' own trainings, their last, took different numbers of samples."""
    taken = {c: [[stage.samples for record in page.result(row, c).records for stage in record.training[-1:]]
                 for row in (pair.a, pair.b)] for c in pair.columns}
    found = [f"{c} {one[-1]:,} and {other[-1]:,}" for c, (one, other) in taken.items()
             if one and other and one[-1] != other[-1]]
    return f", on unequal training, samples of {pair.a} and {pair.b}: {', '.join(found)}" if found else ""


def _said(verdict: Verdict) -> str:
    return verdict if isinstance(verdict, str) else {None: "not told", True: "yes", False: "no"}[verdict]


def _claim(pairs: Sequence[Pair]) -> Verdict:
    found, away = pairs[0].found, pairs[0].errors("fd")
    no_worse = pairs[0].ratio("fd", 1) <= 1 if away is None else away <= ERRORS
    second = "fd_efflite0" not in found or pairs[0].ratio("fd_efflite0", 1) <= 1
    return 1 - pairs[0].ratio("consistency", 1) >= CLAIM and no_worse and second


def _worse(pairs: Sequence[Pair]) -> Verdict:
    errors = pairs[0].errors("consistency")
    return None if errors is None else errors > ERRORS


def _winner(pairs: Sequence[Pair]) -> Verdict:
    errors = pairs[0].errors("consistency")
    return None if errors is None else "JDM" if errors > ERRORS else "NCT" if errors < -ERRORS else "neither clearly"


def _diverse(pairs: Sequence[Pair]) -> Verdict:
    errors = [p.errors("diversity") for p in pairs if p.ratio("diversity", 0) > 1 and p.ratio("consistency", 2) <= 1.02]
    clearly = any(e > ERRORS for e in errors if e is not None)
    return None if None in errors and not clearly else clearly


REWARDED = Question("Does the reward on the noisy posterior satisfy the judge better than on the clean sample?",
                    lambda pairs: all(p.found["judge"].more > 0 for p in pairs),
                    (("reward", "reward-clean"), ("strong", "clean-strong")), ("judge", "fd"), ("judge",))


def _ignored(page: Page) -> Answer | None:
    """Implicit VSD against pictures of the same prompt, or where no prompt comes twice against any: chance."""
    away, parts = {}, []
    for column in page.shared("implicit"):
        values = page.result("implicit", column).values
        blind = values.get("consistency_same_prompt", values["consistency_chance"])
        found = Difference.of(values["consistency"], replace(blind, spread=blind.spread or 0.0))
        away[column] = found.errors
        parts.append(f"{column}: {found.said('consistency')} against {blind.mean:.4f}")
    if not away:
        return None
    known = [abs(a) <= ERRORS for a in away.values() if a is not None]
    return Answer("Is implicit VSD's consistency within two errors of what ignoring the control scores?",
                  _said(all(known) if len(known) == len(away) else None), tuple(away), "; ".join(parts), away)


def _turned(page: Page) -> Answer | None:
    """Tells where reward hacking begins: how judge and reward moved from the judge's best probe to the run's end."""
    found = {}
    for line, _, record in page.records():
        course = [at for at in record.course if record.seed == 0 and at.keys() >= {"judge", "reward", "fd"}]
        if course:
            best, last = max(course, key=lambda at: at["judge"]), course[-1]
            found[line.row] = {"step": best["step"], "of": last["step"],
                               **{k: last[k] - best[k] for k in ("judge", "reward", "fd")}}
    if not found:
        return None
    text = "; ".join(f"{row}: the judge is best at step {v['step']:.0f} of {v['of']:.0f}, from there to the end judge "
                     f"{v['judge']:+.3f}, reward {v['reward']:+.3f}, distance {v['fd']:+.2f}"
                     for row, v in found.items())
    return Answer("Does the reward still rise where the judge falls?",
                  _said(any(v["judge"] < 0 < v["reward"] for v in found.values())), (TEXT,), text, found)


QUESTIONS: dict[str, tuple[Callable[[Page], Answer | None], ...]] = {
    "table1": (
        Question("Is JDM's consistency 24% better than the 50-step ControlNet's, with distance no worse?", _claim,
                 (("jdm", "controlnet"),), ("consistency", "fd", "fd_efflite0")).answer,
        Question("Are phase-2 controls within 10% of jointly trained ones?",
                 lambda pairs: all(p.ratio("consistency", 1) - 1 <= CLOSE for p in pairs), (("jdm", "jdm-joint"),),
                 controls=True).answer,
        Question("Is JDM on a frozen Diff-Instruct UNet clearly worse than on phase 1's?", _worse,
                 (("frozen-di", "jdm"),)).answer,
        Question("Which obeys better on one frozen Diff-Instruct generator, JDM or NCT?", _winner,
                 (("nct", "frozen-di"),)).answer),
    "table2": (
        _ignored,
        Question("Does any change keep clearly more diversity at equal consistency (within 2%)?", _diverse,
                 keys=("consistency", "diversity", "fd")).answer),
    "table3": (
        Question("Does a better teacher's guidance agree better with prompts than the weak teacher's own?",
                 lambda pairs: any(next(iter(p.found.values())).more > 0 for p in pairs),
                 (("guided", "own"), ("guided-blind", "own")), ("prompt_agreement", "clip", "hpsv2", "fd"),
                 ("prompt_agreement", "clip")).answer,
        REWARDED.answer, _turned),
    "fig6": (REWARDED.answer, _turned)}


def answered(page: Page) -> tuple[Answer, ...]:
    """The questions of this table that its cells can answer."""
    return tuple(answer for question in QUESTIONS.get(page.table, ()) if (answer := question(page)))
