"""The API under load: requests at a steady rate, none of which waits for another, against `jdm app`.

    python benchmarks/app_load.py [MODEL] [--rate 50] [--seconds 60] [--json FILE]

Counts pictures, "busy" answers that say when to try again, and anything else; and the growth of the server's resident
memory from a tenth of the time on, when its caches are warm, to the end.
"""

from __future__ import annotations

import argparse
import base64
import collections
import io
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from PIL import Image, ImageDraw


def drawing(i: int) -> str:
    """A PNG of a box that is another for each i, in base64."""
    image, content = Image.new("RGB", (256, 256)), io.BytesIO()
    ImageDraw.Draw(image).rectangle((20 + i % 50, 30, 180, 120 + i % 100), outline="white", width=8)
    image.save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


def kind(address: str, i: int) -> str:
    """What a request was answered with: "picture", "busy" or the status."""
    body = json.dumps({"prompt": "ankle boot", "seed": i, "image": drawing(i)}).encode()
    request = urllib.request.Request(address + "api/draw", body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return "picture" if json.load(answer)["images"] else "nothing"
    except urllib.error.HTTPError as error:
        error.read()
        return "busy" if error.code == 503 and int(error.headers["retry-after"]) >= 1 else str(error.code)
    except OSError as error:
        return type(error).__name__


def resident(pid: int) -> int:
    """Resident memory of a process in KiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1])


def loaded(address: str, pid: int, rate: float, seconds: float) -> dict:
    """Sends the requests, each in a thread of its own at its own time."""
    counts: collections.Counter[str] = collections.Counter()
    threads, start, warm = [], time.perf_counter(), 0
    for i in range(round(rate * seconds)):
        time.sleep(max(0.0, start + i / rate - time.perf_counter()))
        if not warm and i >= rate * seconds / 10:
            warm = resident(pid)
        threads.append(threading.Thread(target=lambda i=i: counts.update([kind(address, i)])))
        threads[-1].start()
    took = time.perf_counter() - start
    for thread in threads:
        thread.join()
    return {"requests": len(threads), "per_second": len(threads) / took, **counts, "warm_kib": warm,
            "end_kib": resident(pid), "growth": resident(pid) / warm - 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="nano-canny")
    parser.add_argument("--rate", type=float, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    process = subprocess.Popen([sys.executable, "-m", "jdm", "app", "--port", "0", asked.model], stdout=subprocess.PIPE,
                               text=True)
    try:
        assert process.stdout is not None
        row = loaded(process.stdout.readline().split()[2], process.pid, asked.rate, asked.seconds)
    finally:
        process.terminate()
        process.wait()
    row |= {"cores": os.cpu_count(), "load": os.getloadavg()[0]}
    print(json.dumps(row, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
