"""A server of `jdm app` and a browser before it: whatever the tests of the page share."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

BROWSER = "a browser is needed: make browser"


@contextlib.contextmanager
def served(*arguments: str) -> Iterator[str]:
    """The address of a `jdm app` process that runs within."""
    process = subprocess.Popen([sys.executable, "-m", "jdm", "app", "--port", "0", "--threads", "1", *arguments],
                               stdout=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        line = process.stdout.readline()
        assert line.startswith("jdm app: http://"), line
        yield line.split()[2]
    finally:
        process.terminate()
        process.wait(timeout=30)


@contextlib.contextmanager
def serving(studio: Any, host: str = "127.0.0.1", token: str | None = None) -> Iterator[str]:
    """The address of a server in a thread of this process, over models that are loaded already."""
    from jdm.app import server

    with server.listening(host, 0) as listener:
        running = server.server(server.application(studio, host, token), studio.limits)
        thread = threading.Thread(target=running.run, args=([listener],))
        thread.start()
        try:
            yield server.address(listener, None)
        finally:
            running.should_exit = True
            thread.join(timeout=30)


def asked(address: str, path: str, body: Any = None, headers: dict[str, str] | None = None,
          raw: bytes | None = None) -> tuple[int, Any, dict[str, str]]:
    """(status, JSON or text, headers) of a request; a POST where there is a body."""
    data = raw if raw is not None else None if body is None else json.dumps(body).encode()
    sent = urllib.request.Request(address + path, data, {"content-type": "application/json", **(headers or {})})
    try:
        answer = urllib.request.urlopen(sent, timeout=60)
    except urllib.error.HTTPError as error:
        answer = error
    text = answer.read()
    kind = answer.headers.get_content_type()
    return answer.status, json.loads(text) if kind == "application/json" else text.decode(), dict(answer.headers)


def picture(size: tuple[int, int] = (32, 32), seed: int = 0) -> str:
    """A PNG of a light box on black, in base64."""
    image = np.zeros((*size, 3), np.uint8)
    image[size[0] // 4 : size[0] * 3 // 4, size[1] // 4 : size[1] * 3 // 4] = 255 - 10 * (seed % 20)
    return encoded(Image.fromarray(image))


def encoded(image: Image.Image, kind: str = "PNG") -> str:
    """A picture file in base64."""
    content = BytesIO()
    image.save(content, kind)
    return base64.b64encode(content.getvalue()).decode()


def pixels(png: str) -> np.ndarray:
    """uint8 [H, W, 3] of a PNG in base64."""
    return np.asarray(Image.open(BytesIO(base64.b64decode(png))))


def chromium() -> str | None:
    """The path of Chromium: the system's, or the one that playwright installed."""
    if found := shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome"):
        return found
    with contextlib.suppress(Exception):
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            path = playwright.chromium.executable_path
            return path if os.path.exists(path) else None
    return None
