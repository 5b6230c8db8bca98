"""A finished folder, uploaded to a model hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jdm.errors import RunError, UsageError


def checked_name(name: str) -> str:
    """The name of a model on a hub, as it is.

    Raises:
        UsageError: it is not OWNER/NAME.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise UsageError(f"a model on the hub is named owner/name, got {name!r}")
    return name


def push(folder: Path, name: str, api: Any = None) -> str:
    """Upload a folder as the model OWNER/NAME, which is made where there is none; returns its address.

    Args:
        api: stands in for huggingface_hub.HfApi.

    Raises:
        RunError: the hub or the way to it fails. The folder stays; the message says how to go on.
    """
    from huggingface_hub import HfApi

    name, api = checked_name(name), api or HfApi()
    try:
        address = api.create_repo(name, repo_type="model", exist_ok=True)
        api.upload_folder(repo_id=name, repo_type="model", folder_path=folder, commit_message=f"Upload {folder.name}")
    except Exception as error:  # a hub's errors are of many families, a network's of more
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise RunError(f"{folder} is written, but was not uploaded to {name} ({first}); {_remedy(error)}, then: "
                       f"hf upload {name} {folder}") from error
    return str(address)


def _remedy(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) or "Token" in type(error).__name__:
        return "log in with a token that may write there: hf auth login"
    if "Offline" in type(error).__name__:
        return "unset HF_HUB_OFFLINE"
    return "check the network and the name"
