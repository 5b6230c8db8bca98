"""Registries of npm packages that are made up, and their tarballs."""

import base64
import hashlib
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path


def tarball(files):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def pinned(package, data):
    return replace(package, sha512=base64.b64encode(hashlib.sha512(data).digest()).decode())


def registry(**tarballs):
    """URL -> contents of a registry that serves these, by package name."""
    def get(url):
        asked.append(url)
        if url.startswith("https://mirror.example/npm/") and not url.endswith(".tgz"):
            return json.dumps({"dist": {"tarball": f"https://files.example/{url.split('/')[-2]}.tgz"}}).encode()
        return tarballs[Path(url).stem]

    asked = get.asked = []
    return get
