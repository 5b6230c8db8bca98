"""A server of `jdm app` and a hand in a browser: whatever the tests of the page share."""

import base64
import contextlib
import functools
import http.server
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
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

BROWSER = "a browser is needed: make browser"
BOOT = [(.45, .15), (.47, .55), (.2, .7), (.2, .82), (.78, .82), (.8, .6), (.72, .15), (.45, .15)]


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
def hosted(folder: Path, unpacks: bool = False, isolates: bool = False) -> Iterator[str]:
    """The address of a static host of a folder that runs within.

    Args:
        unpacks: it lets browsers unpack files named .gz.
        isolates: it sends the headers with which browsers allow threads.
    """

    class Handler(http.server.SimpleHTTPRequestHandler):
        def end_headers(self):
            if unpacks and self.path.endswith(".gz"):
                self.send_header("content-encoding", "gzip")
            if isolates:
                self.send_header("cross-origin-opener-policy", "same-origin")
                self.send_header("cross-origin-embedder-policy", "require-corp")
            super().end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as host:
        thread = threading.Thread(target=host.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{host.server_port}/"
        finally:
            host.shutdown()
            thread.join(timeout=30)


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


@contextlib.contextmanager
def shown(*models: str) -> Iterator[str]:
    """The address of `serving` over these models."""
    from jdm.app.limits import Limits
    from jdm.app.students import load_students
    from jdm.app.studio import Studio
    from jdm.app.worker import Worker

    worker = Worker(Limits())
    try:
        with serving(Studio(load_students(list(models), [], None, None, "cpu"), worker, Limits())) as address:
            yield address
    finally:
        worker.close()


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


# A hand in the browser


@contextlib.contextmanager
def opened(browser, address, size=(1280, 800), **settings):
    """The page, once it has drawn; nothing may be written to its console."""
    from playwright.sync_api import expect

    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **settings)
    page = context.new_page()
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(address)
    expect(page.locator("#pace")).to_contain_text("ms", timeout=180_000)
    yield page
    context.close()
    assert said == []


def stroke(page, path=BOOT, steps=6):
    """Draws a line with the mouse through points in [0, 1]."""
    box = page.locator("#canvas").bounding_box()
    at = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in path]
    page.mouse.move(*at[0])
    page.mouse.down()
    for x, y in at[1:]:
        page.mouse.move(x, y, steps=steps)
    page.mouse.up()


def pictures(page, box="#pictures") -> list[np.ndarray]:
    """RGB of every picture in a box."""
    found = page.evaluate("""(box) => [...document.querySelectorAll(`${box} canvas`)].map((canvas) => {
        const { width, height } = canvas;
        return [width, height, [...canvas.getContext('2d').getImageData(0, 0, width, height).data]];
    })""", box)
    return [np.array(data, np.uint8).reshape(height, width, 4)[..., :3] for width, height, data in found]


def settled(page, box="#pictures"):
    """The pictures once they follow what was done last."""
    page.evaluate("""async () => {
        for (let quiet = 0; quiet < 4; quiet++) {
            await new Promise((resolve) => setTimeout(resolve, 25));
            if (document.querySelector("#pictures").ariaBusy === "true") quiet = 0;
        }
    }""")
    return pictures(page, box)


def differ(a, b) -> bool:
    return len(a) != len(b) or any(not np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def slide(page, selector, value):
    page.locator(selector).evaluate("""(range, value) => {
        range.value = value;
        range.dispatchEvent(new Event("input"));
    }""", value)


def drop(page, content: bytes, name: str):
    page.evaluate("""([content, name]) => {
        const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], name));
        document.body.dispatchEvent(new DragEvent("drop", { bubbles: true, dataTransfer: transfer }));
    }""", [base64.b64encode(content).decode(), name])
