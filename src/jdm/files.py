"""Files: written whole or not at all, read as JSON, locked while one process works in a folder."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from jdm.errors import RunError

ASSETS = Path(__file__).parent / "assets"  # the models and pictures that ship


@contextmanager
def alone(folder: Path, busy: Callable[[], None]) -> Iterator[None]:
    """Hold the folder's lock, which goes with the process that holds it.

    Args:
        busy: called where another process holds it; it may raise. What returns waits for the other to end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write(path: Path, text: str) -> Path:
    """Write a file whole or not at all.

    Raises:
        RunError: the disk is full or the place cannot be written.
    """
    draft = path.with_name(f".{path.name}.draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise RunError(f"{path} could not be written ({error}); free some space or choose another --out") from None
    return path


def read_json(file: Path) -> dict:
    """A file's JSON object; {} where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
