"""Uploads an exported folder to a model hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jdm.errors import RunError, UsageError


def checked_name(name: str) -> str:
    """Returns a model's name on a hub unchanged.

    Raises:
        UsageError: the name is not OWNER/NAME.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise UsageError(f"a model on the hub must be named owner/name, got {name!r}")
    return name


def push(folder: Path, name: str, api: Any = None) -> str:
    """Uploads a folder as the model OWNER/NAME, creating it if needed; returns its address.

    Args:
        api: replaces huggingface_hub.HfApi.

    Raises:
        RunError: the hub or the network failed. The folder is kept, and the message says how to continue.
    """
    from huggingface_hub import HfApi

    name, api = checked_name(name), api or HfApi()
    try:
        address = api.create_repo(name, repo_type="model", exist_ok=True)
        api.upload_folder(repo_id=name, repo_type="model", folder_path=folder, commit_message=f"Upload {folder.name}")
    except Exception as error:  # the hub and the network raise many kinds of exception
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise RunError(f"{folder} is written, but was not uploaded to {name} ({first}); {_remedy(error)}, then: "
                       f"hf upload {name} {folder}") from error
    return str(address)


def _remedy(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) or "Token" in type(error).__name__:
        return "log in with a token that has write access: hf auth login"
    if "Offline" in type(error).__name__:
        return "unset HF_HUB_OFFLINE"
    return "check the network and the name"
