"""Checks of flags that need the machine: the device and the folders to write to."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import torch

from jdm.errors import UsageError, remedy
from jdm.files import expanded, read_json


def device(name: str) -> torch.device:
    """The device of that name, after a tensor was made on it.

    Raises:
        UsageError: this machine has no such device, or it cannot be used.
    """
    try:
        found = torch.device(name)
        torch.ones(1, device=found).item()  # "meta" makes tensors and holds no numbers
    except Exception as error:  # RuntimeError or AssertionError, depending on the backend
        first = (str(error).splitlines() or [""])[0][:120]
        raise UsageError(f"--device {name} cannot be used here ({first}); use --device cpu") from None
    return found


def writable(folder: Path) -> Path:
    """The folder itself, created if it is missing.

    Raises:
        UsageError: it cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be made ({error.strerror}); {remedy(error)}") from None
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{folder} cannot be written; choose another place")
    return folder


def json_output(name: str | None, inputs: Iterable[str | None], keys: Collection[str]) -> Path | None:
    """The file to write numbers to, or None; its folder is created.

    Args:
        inputs: paths that the command reads.
        keys: some of what the command writes, by which a file of an earlier call is known.

    Raises:
        UsageError: it cannot be written, or it is there and is not this command's.
    """
    if not name:
        return None
    file = Path(name)
    writable(file.parent)

    def is_ours(there: Path) -> bool:
        try:
            return there.stat().st_size == 0 or set(keys) <= set(read_json(there))
        except UsageError:
            return False

    free_of_others([file], inputs, is_ours, "--json")
    return file


def free_of_others(outputs: Iterable[Path], inputs: Iterable[str | None], is_ours: Callable[[Path], bool],
                   flag: str) -> None:
    """UsageError if a file to be written is one that is read, or is there and is not ours.

    Args:
        flag: flag that names another place.
    """
    read = [expanded(name) for name in inputs if name]
    for file in outputs:
        if not os.path.lexists(file):
            continue
        if any(place.exists() and file.exists() and place.samefile(file) for place in read):
            raise UsageError(f"{file} would be overwritten and is read by this command; choose another {flag}")
        if file.is_symlink() or not file.is_file() or not is_ours(file):
            raise UsageError(f"{file} is there and this command did not write it; choose another {flag}")


def names(text: str | None) -> list[str]:
    """The names in a list separated by commas; none for None or empty text."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]
