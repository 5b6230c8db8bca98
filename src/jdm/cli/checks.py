"""Checks of flags that need the machine: the device and the folders to write to."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from jdm.errors import UsageError


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
        raise UsageError(f"{folder} cannot be made ({error.strerror}); choose another place") from None
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{folder} cannot be written; choose another place")
    return folder


def names(text: str | None) -> list[str]:
    """The names in a list separated by commas; none for None or empty text."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]
