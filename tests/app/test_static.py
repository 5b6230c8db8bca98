"""The page without a server, in a real browser on a plain static host."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pages
import tiny
from jdm.app import static
from jdm.app.limits import Limits
from jdm.app.static import RUNTIME, write_page
from jdm.app.students import sharing_students
from jdm.cli import parser as cli
from jdm.controls import Silhouette
from jdm.data import npm
from jdm.errors import UsageError
from jdm.evaluation.sampling import generator
from jdm.files import ASSETS
from jdm.library import load_model
from jdm.models.folder import save_pipeline
from pages import differ, opened, settled, slide, stroke

CHROMIUM = pages.chromium()
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason=pages.BROWSER)]
if CHROMIUM:
    from playwright.sync_api import expect, sync_playwright

    pytest.importorskip("onnx", reason="pip install 'jdm[onnx]'")


# A folder takes half a minute to make, so most of these tests are slow ones.
@pytest.fixture(scope="module")
def runtime():
    """The tarball of onnxruntime-web."""
    try:
        return npm.fetched(RUNTIME, static.cache())
    except UsageError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def models(student, tmp_path_factory):
    """A folder of two tiny students of one UNet in four steps: canny and silhouette."""
    place = tmp_path_factory.mktemp("models")
    model = tiny.halved(load_model(str(student.with_name("student-4"))))
    save_pipeline(model, place / "canny", model.scheduler, model.card)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        other = tiny.halved(tiny.with_controlnet(model))
    card = {**model.card, "control": "silhouette", "preprocessor": Silhouette().preprocessor}
    save_pipeline(other, place / "silhouette", model.scheduler, card)
    return place


def written(names, out):
    """The folder of a page of models."""
    said = []
    size = write_page(out, sharing_students(names, [], None, "cpu"), Limits(pictures=6), said.append)
    assert size == sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    assert "Copyright (c) Microsoft Corporation" in (out / "NOTICE.txt").read_text()
    assert sum("unet" in part for part in said) == 1, "students of one UNet share it"
    return out


@pytest.fixture(scope="module")
def folder(runtime, models, tmp_path_factory):
    """The page of the tiny students."""
    with contextlib.chdir(models):
        return written(["canny", "silhouette"], tmp_path_factory.mktemp("static") / "page")


@pytest.fixture(scope="module")
def address(folder):
    with pages.hosted(folder) as found:
        yield found


@pytest.fixture(scope="module")
def launch():
    """launch(flags): a browser whose JavaScript has these flags."""
    with sync_playwright() as playwright:
        yield lambda flags="": playwright.chromium.launch(executable_path=CHROMIUM,
                                                          args=["--no-sandbox", f"--js-flags={flags}"])


@pytest.fixture(scope="module")
def browser(launch):
    found = launch()
    yield found
    found.close()


@pytest.fixture(scope="module")
def page(browser, address):
    """One page for all tests that a hand could do one after another: loading takes seconds."""
    with opened(browser, address) as found:
        yield found


@pytest.mark.slow
def test_shipped_students_will_fit_in_25_mb(folder):
    """All but the graphs, and the weights of two students of one UNet."""
    own = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and "models" not in file.parts)
    weights = [*ASSETS.glob("nano-canny/**/*.safetensors"), *ASSETS.glob("nano-silhouette/controlnet/*.safetensors")]
    assert own + sum(file.stat().st_size for file in weights) < 25e6


def same(page, name, place, tmp_path, shaped="plain"):
    """Asserts that the page and Python draw the same with a model; 8-bit pictures, which may round either way."""
    page.select_option("#model", name)
    page.fill("#prompt", "it's a DRESS")
    page.fill("#seed", "7")
    settings, made, given = {"n": 1, "seed": 7}, {}, {}
    if shaped == "all":
        page.fill("#n", "3")
        slide(page, "#blend", .35)
        slide(page, "[name=canny]", .8)
        slide(page, "[name=silhouette]", .5)
        settings |= {"n": 3, "to_seed": 1, "blend": .35}
        made = {"also": [f"{place}silhouette"], "strengths": [.8, .5]}
    if shaped == "map":
        page.click("#as-map")
    if page.locator("#no-canvas").is_hidden():
        page.click("#clear")
        stroke(page)
        settled(page)
        with page.expect_download() as download:
            page.evaluate("document.querySelector('#save-drawing').click()")
        download.value.save_as(tmp_path / "drawing.png")
        drawing = torch.from_numpy(np.array(Image.open(tmp_path / "drawing.png").convert("RGB"))).permute(2, 0, 1)
        given = {"control_map" if shaped == "map" else "image": drawing}
    found = settled(page)
    expected = generator(f"{place}{name}", **made)("it's a DRESS", **given, **settings).permute(0, 2, 3, 1).numpy()
    assert np.abs(np.stack(found).astype(int) - expected).max() <= 1
    assert expected.std() > 5


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shaped"), [("canny", "plain"), ("canny", "map"), ("silhouette", "plain"),
                                              ("canny", "all")])
def test_pictures_are_those_of_python(page, name, shaped, models, tmp_path):
    same(page, name, f"{models}/", tmp_path, shaped)


@pytest.mark.slow
def test_nothing_is_fetched_after_loading(page):
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.context.set_offline(True)
    page.click("#clear")
    before = settled(page)
    stroke(page)
    after = settled(page)
    assert differ(before, after)
    page.select_option("#model", "silhouette")
    page.fill("#prompt", "bag")
    assert differ(after, settled(page))
    page.context.set_offline(False)
    assert asked == []


@pytest.mark.slow
def test_notes_and_limits_are_told(page, models):
    page.click("#clear")
    page.fill("#prompt", "bag")
    expect(page.locator("#notice")).to_contain_text("The drawing is empty")
    stroke(page)
    settled(page)
    expect(page.locator("#notice")).to_be_empty()
    prompt = "a very long boot " * 12
    page.fill("#prompt", prompt)
    (unread,) = load_model(str(models / "canny")).text().overlong([prompt.strip()]).values()
    expect(page.locator("#notice")).to_have_text(
        f"The prompt is long: the model does not read '{unread[:100]}', its end.")
    page.fill("#prompt", "x" * 10_000)
    expect(page.locator("#notice")).to_have_text("The words may have 1,000 characters, there are 10,000; shorten them.")
    expect(page.locator("#compare")).to_be_hidden()
    assert page.get_attribute("#n", "max") == "6"
    page.fill("#prompt", "bag")


@pytest.mark.slow
def test_a_host_may_unpack_and_allow_threads(browser, folder):
    with pages.hosted(folder, unpacks=True, isolates=True) as address, opened(browser, address) as page:
        assert page.evaluate("crossOriginIsolated")
        assert len(page.workers) >= min(4, os.cpu_count() or 1)
        before = settled(page)
        stroke(page)
        assert differ(before, settled(page))


@pytest.mark.slow
def test_the_page_reaches_no_other_host(browser, address):
    page = browser.new_page()
    page.route("**/browser.js", lambda route: route.fulfill(status=404))  # without its engine it loads no graph
    page.goto(address)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    assert page.evaluate("fetch('https://example.org').then(() => 'reached', (error) => error.message)") \
        .startswith("Failed to fetch")
    assert not [url for url in asked if not url.startswith(address)]
    page.close()


def said_at_start(page, address) -> str:
    """The sentence of a page that does not start."""
    page.goto(address)
    expect(page.locator("#notice.error")).to_be_visible(timeout=60_000)
    return page.inner_text("#notice")


@pytest.mark.slow
def test_a_browser_without_simd_is_told(launch, address):
    old = launch("--no-enable-sse4-1 --no-enable-ssse3")  # without these instructions V8 has no vectors
    said = said_at_start(old.new_page(), address)
    old.close()
    assert said == ("This browser has no WebAssembly SIMD, with which the model is computed; open this page in Chrome "
                    "91, Firefox 114, Safari 16.4 or a newer one.")


@pytest.mark.slow
def test_a_missing_file_is_named(browser, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "models" / "canny" / "unet.onnx").unlink()
    with pages.hosted(copy) as address:
        said = said_at_start(browser.new_page(), address)
    assert said == "/models/canny/unet.onnx is missing here (404); put the whole folder on the host."


# What is refused


def test_a_folder_with_files_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="already exists and is not empty; name a new folder"):
        write_page(tmp_path, [], Limits(), print)


def test_a_control_that_no_browser_measures_is_refused(runtime, student, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from jdm.controls import Canny\n\n\nclass Mine(Canny):\n    preprocessor = {'function': 'mine'}\n")
    folder = shutil.copytree(student, tmp_path / "student")
    card = json.loads((folder / "jdm.json").read_text()) | {"control": f"{file}:Mine"}
    (folder / "jdm.json").write_text(json.dumps(card))
    assert cli.main(["app", "--static", str(tmp_path / "out"), "--trust-code", str(folder)]) == 2
    assert not (tmp_path / "out").exists()


def test_a_slow_model_beside_it_is_refused(tmp_path, capsys):
    assert cli.main(["app", "--static", str(tmp_path / "out"), "--compare", "nano-controlnet"]) == 2
    assert "a static page has no slow model to compare with; leave out --compare" in capsys.readouterr().err


# Shipped students


@pytest.mark.slow
def test_shipped_students_draw_the_same(runtime, browser, tmp_path):
    """In one step, to a drawing or without; the page's pace is measured too."""
    for names in (["nano-canny", "nano-silhouette"], ["nano-diff-instruct"]):
        folder = written(names, tmp_path / names[0])
        assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 25e6
        with pages.hosted(folder) as address, opened(browser, address) as page:
            for name in names:
                same(page, name, "", tmp_path)
    script = Path(__file__).parents[2] / "benchmarks" / "app_pace.py"
    done = subprocess.run([sys.executable, script, "--static", tmp_path / "nano-canny", "--seconds", "10", "--json",
                           tmp_path / "pace"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "pace").read_text())["pictures_per_second"] > 0
