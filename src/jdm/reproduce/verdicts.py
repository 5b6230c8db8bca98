"""What a table says, computed from its numbers: who wins, and the questions it was made to answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

CLAIM = 0.24  # the paper's: consistency better than the 50-step ControlNet's
CLOSE = 0.10  # a phase-2 control's consistency may be worse than a jointly trained one's by this share
ERRORS = 2.0  # bootstrap errors within which two numbers are not told apart
Values = dict[str, dict[str, Any]]


def headline(data: dict[str, Any]) -> str:
    """Who wins, on average over the columns that most methods have; of text-to-image, who agrees best."""
    if list(data["columns"]) == ["text"]:
        students = {**data, "rows": [row for row in data["rows"] if row["steps"] == 1]}
        said = [f"best {name} {who}" for name, key, largest in (
            ("prompt agreement", "prompt_agreement", True), ("judge", "judge", True), ("HPSv2.1", "hpsv2", True),
            ("CLIP", "clip", True), ("distance", "fd", False))
            if (who := _winner(students, ["text"], key, largest))]
        return "of one-step students " + ", ".join(said) if said else "nothing measured yet"
    shared = _shared_columns(data)
    if not shared:
        return "nothing measured yet"
    over = "" if shared == list(data["columns"]) else f" over {', '.join(shared)} alone"
    average = "average " if len(shared) > 1 else ""
    return (f"best {average}consistency{over} {_winner(data, shared, 'consistency', False)}, best {average}distance "
            f"{_winner(data, shared, 'fd', False)}")


def answers(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The questions of this table that its cells can answer: question, verdict, and the numbers it rests on."""
    asked = {"table1": (_claim, _phase_2, _frozen, _rival), "table2": (_ignored, _changed),
             "table3": (_guided, _hacked, _turned), "fig6": (_hacked, _turned)}
    return [answer for question in asked.get(data["table"], ()) if (answer := question(data))]


def over(data: dict[str, Any], row: str, columns: Iterable[str], key: str) -> dict[str, Any] | None:
    """A row's mean over columns with its spread, columns counted as independent; None where one is missing."""
    values = [_values(data, row, column).get(key) for column in columns]
    if not values or any(v is None for v in values):
        return None
    spreads = [v["spread"] for v in values]  # type: ignore[index]
    spread = None if None in spreads else sum(s**2 for s in spreads) ** 0.5 / len(spreads)
    return {"mean": sum(v["mean"] for v in values) / len(values), "spread": spread}  # type: ignore[index]


def _values(data: dict[str, Any], row: str, column: str) -> Values:
    return _cell(data, row, column)["values"]


def _cell(data: dict[str, Any], row: str, column: str) -> dict[str, Any]:
    found = next((r for r in data["rows"] if r["row"] == row), {"cells": {}})
    return found["cells"].get(column, {"values": {}, "records": []})


def _rows(data: dict[str, Any], columns: Iterable[str]) -> list[str]:
    columns = list(columns)
    return [r["row"] for r in data["rows"] if all(_values(data, r["row"], c) for c in columns)]


def _shared_columns(data: dict[str, Any]) -> list[str]:
    """All columns, if two methods or more have them all; else the one that most methods have."""
    every = list(data["columns"])
    if len(_rows(data, every)) > 1:
        return every
    counts = {column: len(_rows(data, [column])) for column in every}
    most = max(counts, key=counts.__getitem__)
    return [most] if counts[most] else []


def _winner(data: dict[str, Any], columns: list[str], key: str, largest: bool) -> str:
    titles = {r["row"]: r["title"] for r in data["rows"]}
    means = {row: value["mean"] for row in _rows(data, columns) if (value := over(data, row, columns, key))}
    if not means:
        return ""
    best = (max if largest else min)(means, key=means.__getitem__)
    return f"{titles[best]} ({means[best]:.4f})" if key == "consistency" else f"{titles[best]} ({means[best]:.3f})"


def _both(data: dict[str, Any], a: str, b: str) -> list[str]:
    """The columns that both rows have."""
    return [c for c in data["columns"] if _values(data, a, c) and _values(data, b, c)]


def _apart(a: dict[str, Any], b: dict[str, Any]) -> float | None:
    """(a - b) in errors of the difference."""
    if a["spread"] is None or b["spread"] is None or not (error := (a["spread"] ** 2 + b["spread"] ** 2) ** 0.5):
        return None
    return (a["mean"] - b["mean"]) / error


def _answer(question: str, verdict: bool | str | None, columns: list[str], text: str, **numbers: Any) -> dict[str, Any]:
    said = verdict if isinstance(verdict, str) else "not told" if verdict is None else "yes" if verdict else "no"
    return {"question": question, "verdict": said, "columns": columns, "text": text, "numbers": numbers}


def _errors(value: float | None) -> str:
    return "no error known" if value is None else f"{value:+.1f} errors"


def _claim(data: dict[str, Any]) -> dict[str, Any] | None:
    """JDM against the 50-step ControlNet."""
    columns = _both(data, "jdm", "controlnet")
    if not columns:
        return None
    ours, theirs = ({k: over(data, row, columns, k) for k in ("consistency", "fd", "fd_efflite0")}
                    for row in ("jdm", "controlnet"))
    better = 1 - ours["consistency"]["mean"] / theirs["consistency"]["mean"]  # type: ignore[index]
    away = _apart(ours["fd"], theirs["fd"])  # type: ignore[arg-type]
    more = {k: ours[k]["mean"] - theirs[k]["mean"] for k in ("fd", "fd_efflite0") if ours[k] and theirs[k]}  # type: ignore[index]
    no_worse = (more["fd"] <= 0 if away is None else away <= ERRORS) and more.get("fd_efflite0", 0.0) <= 0
    second = f", FD-EffLite0 {more['fd_efflite0']:+.2f}" if "fd_efflite0" in more else ""
    return _answer("Is JDM's consistency 24% better than the 50-step ControlNet's, with distance no worse?",
                   better >= CLAIM and no_worse, columns,
                   f"consistency {100 * better:.1f}% better; distance {more['fd']:+.2f} ({_errors(away)}){second}",
                   better=better, errors=away, **more)


def _phase_2(data: dict[str, Any]) -> dict[str, Any] | None:
    """Controls of phase 2 against jointly trained ones; the primary control is no phase-2 control."""
    columns = [c for c in _both(data, "jdm", "jdm-joint") if data["columns"][c] != "canny"]
    if not columns:
        return None
    ours, joint = ({c: _values(data, row, c) for c in columns} for row in ("jdm", "jdm-joint"))
    worse = {c: ours[c]["consistency"]["mean"] / joint[c]["consistency"]["mean"] - 1 for c in columns}
    far = {c: ours[c]["fd"]["mean"] - joint[c]["fd"]["mean"] for c in columns}
    text = "; ".join(f"{c}: consistency {100 * worse[c]:+.1f}%, distance {far[c]:+.2f}" for c in columns)
    text += _unequal(data, "jdm", "jdm-joint", columns)
    return _answer("Are phase-2 controls within 10% of jointly trained ones?", all(w <= CLOSE for w in worse.values()),
                   columns, text, consistency=worse, fd=far)


def _frozen(data: dict[str, Any]) -> dict[str, Any] | None:
    """A frozen Diff-Instruct UNet in place of phase 1."""
    if not (columns := _both(data, "frozen-di", "jdm")):
        return None
    found, text = _difference(data, "frozen-di", "jdm", columns)
    errors = found["consistency"]["errors"]
    return _answer("Is JDM on a frozen Diff-Instruct UNet clearly worse than on phase 1's?",
                   None if errors is None else errors > ERRORS, columns,
                   text + _unequal(data, "frozen-di", "jdm", columns), **found)


def _rival(data: dict[str, Any]) -> dict[str, Any] | None:
    """JDM and NCT on one frozen generator."""
    if not (columns := _both(data, "nct", "frozen-di")):
        return None
    found, text = _difference(data, "nct", "frozen-di", columns)
    errors = found["consistency"]["errors"]
    winner = None if errors is None else "JDM" if errors > ERRORS else "NCT" if errors < -ERRORS else "neither clearly"
    return _answer("Which obeys better on one frozen Diff-Instruct generator, JDM or NCT?", winner, columns,
                   f"NCT's less JDM's: {text}" + _unequal(data, "nct", "frozen-di", columns), **found)


def _unequal(data: dict[str, Any], a: str, b: str, columns: list[str]) -> str:
    """The columns on which two rows' own trainings took different numbers of samples, each with both."""
    taken = {c: (_samples(data, a, c), _samples(data, b, c)) for c in columns}
    found = [f"{c} {one:,} and {other:,}" for c, (one, other) in taken.items() if one and other and one != other]
    return f"; on unequal training, samples of {a} and {b}: {', '.join(found)}" if found else ""


def _samples(data: dict[str, Any], row: str, column: str) -> int | None:
    """Of a cell's last training, which is the model's own."""
    stages = [stage for record in _cell(data, row, column)["records"] for stage in record.get("training", [])]
    return stages[-1]["samples"] if stages else None


def _difference(data: dict[str, Any], a: str, b: str, columns: list[str]) -> tuple[dict[str, dict[str, Any]], str]:
    """a's numbers less b's, over columns, and in errors of the difference."""
    found = {}
    for key in ("consistency", "fd"):
        one, other = over(data, a, columns, key), over(data, b, columns, key)
        assert one is not None
        assert other is not None
        found[key] = {"more": one["mean"] - other["mean"], "errors": _apart(one, other)}
    text = "; ".join(f"{name} {found[key]['more']:+.{digits}f} ({_errors(found[key]['errors'])})"
                     for key, name, digits in (("consistency", "consistency", 4), ("fd", "distance", 2)))
    return found, text


def _ignored(data: dict[str, Any]) -> dict[str, Any] | None:
    """Implicit VSD against pictures of the same prompt, or where no prompt comes twice against any: chance."""
    columns = [c for c in data["columns"] if _values(data, "implicit", c)]
    if not columns:
        return None
    away, parts = {}, []
    for column in columns:
        values = _values(data, "implicit", column)
        blind = values.get("consistency_same_prompt", values["consistency_chance"])
        away[column] = _apart(values["consistency"], {**blind, "spread": blind["spread"] or 0.0})
        parts.append(f"{column}: {values['consistency']['mean']:.4f} against {blind['mean']:.4f} "
                     f"({_errors(away[column])})")
    told = None if None in away.values() else all(abs(a) <= ERRORS for a in away.values())  # type: ignore[arg-type]
    return _answer("Is implicit VSD's consistency within two errors of what ignoring the control scores?", told,
                   columns, "; ".join(parts), errors=away)


def _changed(data: dict[str, Any]) -> dict[str, Any] | None:
    """Each row that changes one thing of another, beside it: diversity, consistency and distance as ratios."""
    rows = [(r["row"], r["beside"]) for r in data["rows"] if r.get("beside") and _both(data, r["row"], r["beside"])]
    if not rows:
        return None
    found: dict[str, dict[str, float]] = {}
    away: dict[str, float | None] = {}
    for row, base in rows:
        columns = _both(data, row, base)
        pairs = {k: (own, other) for k in ("diversity", "consistency", "fd")
                 if (own := over(data, row, columns, k)) and (other := over(data, base, columns, k)) and other["mean"]}
        found[row] = {k: own["mean"] / other["mean"] for k, (own, other) in pairs.items()}
        away[row] = _apart(*pairs["diversity"]) if "diversity" in pairs else None
    text = "; ".join(f"{row} beside {base}: " + ", ".join(f"{k} x {v:.2f}" for k, v in found[row].items())
                     + (f" (diversity {_errors(away[row])})" if away[row] is not None else "") for row, base in rows)
    more = [row for row, v in found.items() if v.get("diversity", 0) > 1 and v.get("consistency", 2) <= 1.02]
    clearly = any((away[row] or 0) > ERRORS for row in more)
    return _answer("Does any change keep clearly more diversity at equal consistency (within 2%)?",
                   clearly if clearly or all(away[row] is not None for row in more) else None,
                   [c for c in data["columns"] if any(_both(data, row, base).count(c) for row, base in rows)], text,
                   ratios=found, errors=away)


def _guided(data: dict[str, Any]) -> dict[str, Any] | None:
    """Another teacher's guidance against the student's own."""
    rows = [row for row in ("guided", "guided-blind") if _both(data, row, "own")]
    if not rows:
        return None
    own = _values(data, "own", "text")
    agrees = "prompt_agreement" if "prompt_agreement" in own else "clip"  # what knows the prompts
    keys = [(k, name) for k, name in ((agrees, "agreement"), ("hpsv2", "HPSv2.1"), ("fd", "distance")) if k in own]
    more = {row: {k: _values(data, row, "text")[k]["mean"] - own[k]["mean"] for k, _ in keys} for row in rows}
    text = "; ".join(f"{row}: " + ", ".join(f"{name} {m[k]:+.{2 if k == 'fd' else 3}f}" for k, name in keys)
                     for row, m in more.items())
    return _answer("Does a better teacher's guidance agree better with prompts than the weak teacher's own?",
                   any(m.get(agrees, 0.0) > 0 for m in more.values()), ["text"], text, **more)


def _hacked(data: dict[str, Any]) -> dict[str, Any] | None:
    """Clean against noisy reward, by the judge, at each strength."""
    found: dict[str, dict[str, float]] = {}
    for row, beside in (("reward", "reward-clean"), ("strong", "clean-strong")):
        noisy, clean = (_values(data, each, "text") for each in (row, beside))
        if "judge" in noisy and "judge" in clean:
            found[row] = {k: noisy[k]["mean"] - clean[k]["mean"] for k in ("judge", "fd")}
    if not found:
        return None
    text = "; ".join(f"{row}: judge {v['judge']:+.3f} nats, distance {v['fd']:+.2f}" for row, v in found.items())
    return _answer("Does the reward on the noisy posterior satisfy the judge better than on the clean sample?",
                   all(v["judge"] > 0 for v in found.values()), ["text"], text, **found)


def _turned(data: dict[str, Any]) -> dict[str, Any] | None:
    """Where hacking begins: what became of judge and reward from the judge's best probe to the run's end."""
    found = {}
    for row in data["rows"]:
        records = [r for cell in row["cells"].values() for r in cell["records"] if r["seed"] == 0]
        course = [at for r in records for at in r.get("course", []) if at.keys() >= {"judge", "reward", "fd"}]
        if course:
            best, last = max(course, key=lambda at: at["judge"]), course[-1]
            found[row["row"]] = {"step": best["step"], "of": last["step"], "judge": last["judge"] - best["judge"],
                                 "reward": last["reward"] - best["reward"], "fd": last["fd"] - best["fd"]}
    if not found:
        return None
    text = "; ".join(f"{row}: the judge is best at step {v['step']:.0f} of {v['of']:.0f}, from there to the end judge "
                     f"{v['judge']:+.3f}, reward {v['reward']:+.3f}, distance {v['fd']:+.2f}"
                     for row, v in found.items())
    hacked = [row for row, v in found.items() if v["judge"] < 0 < v["reward"]]
    return _answer("Does the reward still rise where the judge falls?", bool(hacked), ["text"], text, **found)
