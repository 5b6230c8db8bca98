"""Hostile and broken input: its kinds, the words and bytes that fuzzers draw from, and what counts as holding.

A test marked `hostile(KIND)` tries one input, or several that it counts with `hold`; benchmarks/robustness.py makes its
page of them.
"""

import random
import sys
from collections.abc import Callable, Iterable, Iterator

from jdm.cli.parser import main

KINDS = {
    "code": "code that a model's card, a run's record or a recipe's text names",
    "pickle": "pickles, programs and links among weights, checkpoints and pictures",
    "json": "JSON files with other types, missing keys, deep nesting, absurd numbers",
    "parts": "models with a part that is missing, of another kind or of another model",
    "weights": "weights that are damaged, not finite or no real numbers",
    "flags": "flags outside their range, of another type, misspelled, or words in any script",
    "checkpoints": "checkpoints and caches that are damaged, cut or of another run",
    "folders": "folders and files of others where output goes, and two processes in one folder",
    "trouble": "trouble in mid-run: kills, SIGTERM, full disks, missing permission, no memory",
    "terminal": "terminals, locales, streams and environments",
    "endless": "what would never end: FIFOs, ranges of shards, absurd sizes",
    "web": "requests that a browser or a program sends to the page of jdm app",
    "data": "tables, captions, shards and pictures that are damaged or do not fit",
}
WORDS = ("", " ", "-1", "0", "-0.0", "nan", "inf", "-inf", "1e400", "9" * 30, "0x10", "1_0", "½", "１", "None", "null",
         "True", "[]", "{}", "1,2", "1 2", "/dev/null", "x.py:X", "os:system", ":", "a:b:c", "x" * 300, "\udcff",
         "\u202eabc", "grün-靴", "*", "{0..9}", "--", "-", "~nobody/x", "$(id)", "%s%n", "a\nb", "canny", "test[:0]",
         "{prompt}", "../x", ".", "no.json", "no.tar", "no.safetensors")


def hold(outcomes: Iterable[tuple[str, str]], record_property: Callable[[str, object], None]) -> None:
    """Counts inputs and fails if one does not hold.

    Args:
        outcomes: of each input, what it was and what was wrong with how it ended; nothing where it holds.
    """
    tried = list(outcomes)
    faults = [f"{what}: {fault}" for what, fault in tried if fault]
    record_property("inputs", (len(tried), len(tried) - len(faults)))
    assert tried
    assert not faults, "\n".join(faults)


def fault_of(arguments: Iterable[object], capture, codes: tuple[int, ...] = (0, 2), words: str = "") -> str:
    """What is wrong with how a command ended: it needs no traceback, a known exit code, and a last line that says why.

    Lines before that are remarks, such as that captions are cut. 1 is doctor's code, whose findings are its output.

    Args:
        words: what a refusal must say; empty where the command may also end well.
    """
    capture.readouterr()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # as the command line's own are
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as end:  # of help
        code = end.code
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    out, said = capture.readouterr()
    if "Traceback" in said or "failed unexpectedly" in said or code not in codes:
        return f"exit code {code}, {said[-300:]}"
    if words and (not code or words not in out + said):
        return f"exit code {code}, not refused with {words!r}: {said[-300:]}"
    last = (said.splitlines() or [""])[-1]
    if code not in (0, 1) and (not last.startswith("jdm: ") or len(last) > 2000):
        return f"exit code {code}, its last line: {last[:300]}"
    return ""


def spoiled(content: bytes, seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """(what was done, the bytes after it) of a file: flipped bits, zeros, cuts, parts twice or away."""
    rng = random.Random(seed)
    for _ in range(count):
        at, length = rng.randrange(len(content)), rng.choice((1, 16, 512, 4096))
        if rng.random() < 0.5:
            at = rng.randrange(min(len(content), 400))  # headers
        what = rng.choice(("bit", "zeros", "cut", "away", "twice", "noise", "empty"))
        if what == "bit":
            yield f"bit of {at}", content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1:]
        elif what in ("zeros", "noise"):
            new = bytes(length) if what == "zeros" else rng.randbytes(length)
            yield f"{length} {what} at {at}", content[:at] + new + content[at + length:]
        elif what == "cut":
            yield f"cut at {at}", content[:at]
        elif what == "away":
            yield f"{length} away at {at}", content[:at] + content[at + length:]
        elif what == "twice":
            yield f"{length} twice at {at}", content[:at + length] + content[at:]
        else:
            yield "empty", b""
