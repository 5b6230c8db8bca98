"""Files and folders: replaced whole or not at all, the one door for JSON, and a lock for a folder's one process."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, get_args, get_origin

from jdm.errors import RunError, UsageError, in_short, os_errno, remedy

ASSETS = Path(__file__).parent / "assets"  # the models and pictures that are part of the package
LOCK = ".jdm.lock"  # names its holder; it stays, so that it also says which folders are this program's


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def expanded(name: str | Path) -> Path:
    """The path with a leading ~ replaced by the home folder, where there is one."""
    return Path(os.path.expanduser(name))


@contextmanager
def alone(folder: Path, busy: Callable[[str], None] | None = None) -> Iterator[None]:
    """Returns a context manager; entering it blocks until no other process holds the folder's lock.

    The folder is created if it is missing. The operating system releases the lock when its process ends, however it
    ends. A thread may enter it again while it holds the lock.

    Args:
        busy: called with the holder's description before blocking, if another process holds the lock.

    Raises:
        UsageError: another process holds the lock, and there is no `busy`.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.resolve() / LOCK, is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = (folder / LOCK).read_text(encoding="utf-8", errors="replace").strip() or "another process"
        if busy is None:
            raise UsageError(f"{folder} is in use by {holder}; wait for it to end, or choose another --out") from None
        busy(holder)
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


def write_json(path: Path, value: Any) -> Path:
    """Writes a value as JSON, as `write` does."""
    return write(path, json.dumps(value, indent=1) + "\n")


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


def read_json(file: Path, schema: Any = dict, remedy: str = "put back the original", needed: bool = False) -> Any:
    """The value in a JSON file, as `parsed` returns it; {} if there is no such file and it is not `needed`.

    Raises:
        UsageError: the file cannot be read, is not JSON, or does not fit the schema.
    """
    if not needed and not file.exists():
        return {}
    return parsed(_text(file, remedy), str(file), schema, remedy)


def read_lines(file: Path, schema: Any) -> list[Any]:
    """The values of a file with one JSON value a line, NaN allowed; none if there is no such file.

    A last line without its newline is left out: its writer was stopped in the middle of it.
    """
    remedy = "delete that line"
    lines = _text(file, remedy).split("\n")[:-1] if file.exists() else []
    return [parsed(line, f"{file}, line {n}", schema, remedy, nan=True) for n, line in enumerate(lines, 1)]


def parsed(text: str, where: str, schema: Any = dict, remedy: str = "put back the original", nan: bool = False) -> Any:
    """The value that a JSON text spells; fields that the schema lacks are kept, unless it is a dataclass.

    Args:
        where: the file, for messages.
        schema: a TypedDict, a dataclass or any other type that msgspec converts to.
        nan: NaN and Infinity are allowed.

    Raises:
        UsageError: the text is not JSON or does not fit the schema.
    """
    try:
        found = json.loads(text, parse_constant=None if nan else _no_constant)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair could be neither printed nor opened
    except ValueError as error:
        raise UsageError(f"{where} is not JSON ({in_short(error)}); {remedy}") from None
    except RecursionError:
        raise UsageError(f"{where} is nested too deeply; {remedy}") from None
    value = fitted(found, schema, where, remedy)
    return value if dataclasses.is_dataclass(schema) else found


def fitted(value: Any, schema: Any, where: str, remedy: str, key: str = "") -> Any:
    """A JSON value converted to the schema's type.

    Args:
        key: the value's place in the file, for messages.

    Raises:
        UsageError: it does not fit; the message has the file, the key, and what was expected.
    """
    import msgspec

    if get_origin(schema) is dict and isinstance(value, dict):  # msgspec does not say which key
        inner = get_args(schema)[1]
        return {k: fitted(v, inner, where, remedy, f"{key}.{k}".strip(".")) for k, v in value.items()}
    try:
        return msgspec.convert(value, schema)
    except (msgspec.ValidationError, RecursionError) as error:
        what, _, path = str(error).replace("Object missing required field", "there is no").partition(" - at `$")
        place = f"{key}{path.rstrip('`')}".strip(".")
        raise UsageError(f"{where}: {place + ': ' if place else ''}{what[:1].lower()}{what[1:]}; {remedy}") from None


def _text(file: Path, remedy: str) -> str:
    if not file.is_file():  # a folder, or a pipe, which would be waited for
        raise UsageError(f"{file}: {'it is not a file' if file.exists() else 'there is no such file'}; {remedy}")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read as text ({in_short(error)}); {remedy}") from None


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number in JSON")
