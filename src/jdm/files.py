"""Files: atomic writes, JSON that may be missing, and a lock for the process that works in a folder."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from jdm.errors import RunError

ASSETS = Path(__file__).parent / "assets"  # the models and pictures that are part of the package


@contextmanager
def alone(folder: Path, busy: Callable[[], None]) -> Iterator[None]:
    """Returns a context manager; entering it blocks until no other process holds the folder's lock.

    The folder is created if it is missing. The operating system releases the lock when its process ends, however it
    ends.

    Args:
        busy: called before blocking, if another process holds the lock; raise in it to give up instead of waiting.
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
    """Replace or create a text file in one step, so that no reader ever sees half of it; returns its path.

    Missing folders are created.

    Raises:
        RunError: the disk is full, or the folder cannot be written to.
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
    """The JSON object in a file; {} if the file is missing, cannot be read, or holds anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
