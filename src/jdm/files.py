"""Files and folders: replaced whole or not at all, JSON that may be missing, and a lock for a folder's one process."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jdm.errors import RunError, UsageError, os_errno, remedy

ASSETS = Path(__file__).parent / "assets"  # the models and pictures that are part of the package
LOCK = ".jdm.lock"  # names its holder; it stays, so that it also says which folders are this program's


@contextmanager
def alone(folder: Path, busy: Callable[[str], None]) -> Iterator[None]:
    """Returns a context manager; entering it blocks until no other process holds the folder's lock.

    The folder is created if it is missing. The operating system releases the lock when its process ends, however it
    ends. A thread may enter it again while it holds the lock.

    Args:
        busy: called with the holder's description before blocking, if another process holds the lock; raise in it to
            give up instead of waiting.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.resolve() / LOCK, is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        busy((folder / LOCK).read_text(encoding="utf-8", errors="replace").strip() or "another process")
        lock.acquire()
    with lock:
        lock.release()  # of the two above, so that the end of this block frees it
        (folder / LOCK).write_text(f"process {os.getpid()} on {socket.gethostname()} since "
                                   f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n", encoding="utf-8")
        yield


def write(path: Path, content: str | bytes) -> Path:
    """Replace or create a file in one step, so that no reader ever sees half of it; returns its path.

    Missing folders are created.

    Raises:
        RunError: the disk is full, or the folder cannot be written to.
    """
    draft = path.with_name(f".{path.name}.draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
        draft.replace(path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise RunError(f"{path} could not be written ({error.strerror or error}); {remedy(error)}, or choose another "
                       "--out") from None
    return path


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """Yields the path of a draft that does not exist yet; what is written there becomes `folder`, whole or not at all.

    The old folder is removed once the new one is in place. Files get the permissions that the umask says: libraries
    that write through temporary files leave them to their owner alone.

    Raises:
        RunError: the disk is full, or the place cannot be written to.
    """
    draft, old = (folder.with_name(f".{folder.name}.{end}") for end in ("draft", "old"))
    try:
        recover(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        umasked(draft)
        if folder.exists():
            folder.rename(old)
        draft.rename(folder)
    except Exception as error:
        if isinstance(error, RunError | UsageError) or os_errno(error) is None:
            raise
        raise RunError(f"{folder} could not be written ({error}); {remedy(error)} and run again") from None
    finally:
        recover(folder)


def recover(folder: Path) -> None:
    """Removes what a killed `replaced` left beside a folder, and puts the folder back if it was moved away."""
    draft, old = (folder.with_name(f".{folder.name}.{end}") for end in ("draft", "old"))
    if old.is_dir() and not folder.exists():
        old.rename(folder)
    for left in (draft, old):
        shutil.rmtree(left, ignore_errors=True)


def umasked(folder: Path) -> None:
    """Gives every file in a folder the permissions of a file that is newly created."""
    mask = os.umask(0o077)
    os.umask(mask)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~mask)


def read_json(file: Path) -> dict:
    """The JSON object in a file; {} if the file is missing, cannot be read, or holds anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
