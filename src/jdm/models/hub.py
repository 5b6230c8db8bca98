"""The Hugging Face hub, asked once whether it answers; without it, only what was fetched before is read."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

from jdm.errors import UsageError, in_short

TIMEOUT = 5.0  # seconds for the hub's first answer; its client would retry for half a minute


@cache
def unreachable() -> str:
    """Why the hub cannot be asked and what to do about it; empty if it can.

    The first call asks it. If it does not answer, the hub's clients in this process no longer try.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set: unset it to fetch from the hub"
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception as error:  # of the network, its names, its certificates
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
        return f"{constants.ENDPOINT} could not be reached ({in_short(error)}): check the network"
    return ""


def unfetched(name: str) -> str:
    """Why a name that stands for no local file or folder cannot be fetched; empty if that is not what is wrong."""
    why = "" if Path(name).exists() else unreachable()
    return why and f"{name} is not a folder here, and {why}"


def fetched(name: str, file: str) -> Path | None:
    """A file of a hub id, fetched now or before; None if the hub has no such file.

    Raises:
        UsageError: the hub cannot be asked, or has no such id that may be read.
    """
    from huggingface_hub import errors, hf_hub_download

    why = unreachable()
    try:
        return Path(hf_hub_download(name, file))
    except errors.LocalEntryNotFoundError as error:
        reason = unfetched(name) or f"{name} is not a folder here, and {file} could not be fetched ({in_short(error)})"
        raise UsageError(f"{reason}, or give a model's folder") from None
    except errors.RemoteEntryNotFoundError:
        return None
    except Exception as error:  # the hub and the network raise many kinds of exception
        raise UsageError(f"{name} is not a folder here, and could not be fetched from the hub ({in_short(error)}); "
                         f"{why or 'check its name, or log in with: hf auth login'}") from None
