"""`jdm app`: a page on which a drawing becomes pictures while the hand moves; prints its address, or its folder."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import webbrowser
from typing import TYPE_CHECKING

import torch

from jdm.app.limits import Limits
from jdm.cli import checks
from jdm.cli.app_flags import LIMITS
from jdm.errors import UsageError
from jdm.files import expanded

if TYPE_CHECKING:
    from jdm.app.students import Student


def command(asked: argparse.Namespace) -> int:
    try:
        from jdm.app import guard, server
        from jdm.app.studio import Studio
        from jdm.app.worker import Worker
    except ModuleNotFoundError as error:
        if (error.name or "jdm").split(".")[0] == "jdm":
            raise
        raise UsageError(f"jdm app needs {error.name}; run: pip install 'jdm[app]'") from None
    limits = Limits(**{name: getattr(asked, f"max_{name}") for name in LIMITS})
    if asked.static:
        return _write(asked, limits)
    token = asked.token or (None if guard.is_local(asked.host) else secrets.token_urlsafe(16))
    worker = Worker(limits)
    with server.listening(asked.host, asked.port) as listener:
        studio = Studio(worker.call(lambda: _students(asked)), worker, limits)
        address = server.address(listener, token)
        print(f"jdm app: {address}  (its API: /docs; stop it with Ctrl-C)", flush=True)
        if asked.open and _has_screen():
            webbrowser.open(address)
        try:
            server.server(server.application(studio, asked.host, token), limits).run([listener])
        finally:
            worker.close()
    return 0


def _write(asked: argparse.Namespace, limits: Limits) -> int:
    """Writes the page that needs no server."""
    from jdm.app.static import write_page
    from jdm.app.students import sharing_students

    if asked.compare:
        raise UsageError("a static page has no slow model to compare with; leave out --compare")
    out = expanded(asked.static)
    students = sharing_students(asked.models, asked.also, asked.control, "cpu")
    size = write_page(out, students, limits, lambda part: print(f"jdm app: {part}", file=sys.stderr, flush=True))
    print(f"{out}: {size / 1e6:.1f} MB, ready for any static host; to try it: {sys.executable} -m http.server -d {out}")
    return 0


def _students(asked: argparse.Namespace) -> list[Student]:
    """The models, loaded in the thread that will draw with them."""
    # Threads of a parallel loop wait for the last of them. One that shares its core with the browser holds up all:
    # with two threads on two busy cores a drawing took twenty times as long as with one.
    torch.set_num_threads(asked.threads or max(1, (os.cpu_count() or 1) - 1))
    from jdm.app.students import load_students

    return load_students(asked.models, asked.also, asked.control, asked.compare, str(checks.device(asked.device)))


def _has_screen() -> bool:
    """Whether a browser could show a page here; a text browser would take the terminal."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
