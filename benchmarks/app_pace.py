"""How quickly the page follows the hand: pictures a second and latency, in a real browser against `jdm app`.

    python benchmarks/app_pace.py [MODEL] [--static FOLDER] [--seconds 10] [--screenshot FILE]
        [--drawing NAME] [--json FILE]

With --static the browser computes, from a folder that `jdm app --static FOLDER` wrote.

Chromium draws a line without end, a point at each frame of its screen. Latency runs from the first change that a
picture is the first to show until that picture is on the page.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

# Lines of a hand, in [0, 1] of the canvas: the outline of a boot, then its sole.
BOOT = [[(.42, .13), (.43, .3), (.42, .46), (.37, .55), (.26, .61), (.17, .67), (.14, .74), (.16, .79), (.3, .8),
         (.5, .79), (.62, .77), (.72, .79), (.8, .79), (.81, .7), (.78, .56), (.76, .4), (.76, .26), (.75, .13),
         (.6, .11), (.42, .13)], [(.15, .84), (.4, .85), (.6, .83), (.81, .84)]]


@contextlib.contextmanager
def served(*arguments: str) -> Iterator[str]:
    """The address of a `jdm app` that runs within."""
    process = subprocess.Popen([sys.executable, "-m", "jdm", "app", "--port", "0", *arguments], stdout=subprocess.PIPE,
                               text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[2]
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def hosted(folder: Path) -> Iterator[str]:
    """The address of a static host of a folder that runs within."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def measured(page: Page, seconds: float) -> list[float]:
    """The latency of every picture, in milliseconds, while a hand draws for so long."""
    expect(page.locator("#pace")).to_contain_text("ms", timeout=60_000)
    page.evaluate("""() => {
        window.seen = [];
        document.addEventListener("drawn", ({ detail }) => window.seen.push(detail.milliseconds));
    }""")
    box = page.locator("#canvas").bounding_box()
    assert box is not None
    start = time.perf_counter()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    while (now := time.perf_counter() - start) < seconds:
        x, y = 0.5 + 0.3 * math.sin(3.1 * now), 0.5 + 0.3 * math.sin(4.3 * now)
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        time.sleep(max(0.0, 1 / 60 - (time.perf_counter() - start - now)))
    found = page.evaluate("() => window.seen.slice()")
    page.mouse.up()
    return found


def sketch(name: str) -> list[list[tuple[float, float]]]:
    """Lines of a sketch of docs/drawings, in [0, 1] of the canvas."""
    read = json.loads((Path(__file__).parents[1] / "docs" / "drawings" / "drawings.json").read_text())
    (found,) = (one for one in read["drawings"] if one["name"] == name)
    return [[(x / read["canvas"], y / read["canvas"]) for x, y in line] for line in found["strokes"]]


def pictured(page: Page, file: Path, lines: list[list[tuple[float, float]]]) -> None:
    """Draws the lines by hand and writes what the page shows."""
    box = page.locator("#canvas").bounding_box()
    assert box is not None
    page.click("#clear")
    page.fill("#n", "4")
    for line in lines:
        points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in line]
        page.mouse.move(*points[0])
        page.mouse.down()
        for x, y in points[1:]:
            page.mouse.move(x, y, steps=4)
        page.mouse.up()
    page.mouse.move(0, 0)
    page.wait_for_timeout(3000)
    page.screenshot(path=file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="nano-canny")
    parser.add_argument("--static", type=Path, metavar="FOLDER")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--screenshot", type=Path)
    parser.add_argument("--drawing", help="sketch of docs/drawings to draw for it, by name; a boot without one")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    place = hosted(asked.static) if asked.static else served(asked.model)
    with place as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(address)
        latencies = measured(page, asked.seconds)
        if asked.screenshot:
            pictured(page, asked.screenshot, sketch(asked.drawing) if asked.drawing else BOOT)
        browser.close()
    cuts = statistics.quantiles(latencies, n=20)
    row = {"model": str(asked.static or asked.model), "seconds": asked.seconds,
           "pictures_per_second": len(latencies) / asked.seconds, "median_ms": statistics.median(latencies),
           "p95_ms": cuts[18], "cores": os.cpu_count(), "load": os.getloadavg()[0], "machine": platform.machine()}
    print(json.dumps(row, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
