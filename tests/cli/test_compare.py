"""`jdm compare`, and what a real browser makes of its page and of a run's."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from jdm.cli.parser import main
from jdm.data.pictures import save_picture
from jdm.recipes import find
from jdm.run import described
from jdm.training import previews
from jdm.training.report import report

CHROMIUM = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)

# Run in the page: what it measures becomes the title.
MEASURE = """addEventListener('load', () => { document.title = JSON.stringify({
  wide: document.documentElement.scrollWidth,
  images: [...document.images].map(image => image.naturalWidth),
  lines: [...document.querySelectorAll('polyline')].map(line => line.getTotalLength()),
  texts: [...document.querySelectorAll('svg text')].map(text => text.textContent)}) })"""


@pytest.fixture
def runs(tmp_path):
    """Two runs as `jdm train` leaves them, each with a hundred logged steps and three previews."""
    import torch

    for k, name in enumerate(("first", "second")):
        out = tmp_path / name
        out.mkdir()
        run = replace(find("nano-canny")(), steps=100, batch=64 + k)
        (out / "run.json").write_text(json.dumps({"run": described(run), "data": {"n": 64}, "versions": {}}))
        rows = [{"step": s, "fidelity": 1 / (s + k), "probe/fd": 50.0 / s, "seconds": 0.1} for s in range(1, 101)]
        (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for step in (0, 50, 100):
            rows = {"control": torch.zeros(2, 3, 96, 96).byte(),
                    "student": torch.full((2, 3, 96, 96), 2 * step, dtype=torch.uint8)}
            notes = {"rows": list(rows), "prompts": ["boot", "coat"], "trained": "student"}
            save_picture(previews.sheet(rows), out / "previews" / f"step-{step:07}.png", {"jdm": json.dumps(notes)})
        report(out, ended=True)
    return tmp_path


def test_a_page_is_written_and_named(runs, capsys):
    page = runs / "pages" / "both.html"
    assert main(["compare", str(runs / "first"), str(runs / "second"), "--out", str(page)]) == 0
    assert capsys.readouterr().out.strip() == str(page)
    assert "Runs compared" in page.read_text()
    assert main(["compare", str(runs / "first"), "--out", str(page)]) == 0, "its own page is replaced"
    assert "1 runs" not in page.read_text()


def test_a_page_of_others_is_kept(runs, capsys):
    page = runs / "mine.html"
    page.write_text("<html>mine</html>")
    assert main(["compare", str(runs / "first"), "--out", str(page)]) == 2
    assert "mine.html is there and this command did not write it; choose another --out" in capsys.readouterr().err
    assert page.read_text() == "<html>mine</html>"


def test_a_folder_without_a_run_is_named(runs, capsys):
    assert main(["compare", str(runs / "first"), str(runs), "--out", str(runs / "page.html")]) == 2
    assert "holds no run (there is no run.json in it)" in capsys.readouterr().err
    assert not (runs / "page.html").exists()


def in_browser(page: Path, *flags: str) -> str:
    """What headless Chromium prints for a file, with no network and nothing kept."""
    done = subprocess.run([str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                           "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={page.parent / 'profile'}",
                           *flags, page.resolve().as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("kind", ["report", "compare"])
def test_a_browser_shows_the_page(kind, runs, tmp_path):
    page = runs / "first" / "report.html"
    if kind == "compare":
        page = runs / "both.html"
        assert main(["compare", str(runs / "first"), str(runs / "second"), "--out", str(page)]) == 0
    alone = tmp_path / "elsewhere" / page.name
    alone.parent.mkdir()
    shutil.copy(page, alone)  # without its folder
    alone.write_text(alone.read_text() + f"<script>{MEASURE}</script>")
    title = re.search(r"<title>(.*?)</title>", in_browser(alone, "--window-size=1000,1200", "--dump-dom"))
    assert title
    found = json.loads(title[1])
    several = 2 if kind == "compare" else 1
    assert found["wide"] <= 1000, "nothing runs out of the window"
    assert len(found["images"]) == several
    assert min(found["images"]) == previews.MARGIN + 2 + 2 * 98
    assert len(found["lines"]) == 3 * several
    assert min(found["lines"]) > 100
    assert found["texts"].count("training step") == 3
    picture = tmp_path / "page.png"
    in_browser(page, "--window-size=1000,3000", f"--screenshot={picture}")
    with Image.open(picture) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(2**24)}
    assert (0, 114, 178) in colours, "the first line's colour"
    assert len(colours) > 50
