"""What the page computes without Python: its tokenizer, noise and measurements equal Python's."""

import base64
import json
import random
import unicodedata

import cv2
import numpy as np
import pytest
import torch

import pages
from jdm.app.server import PAGE
from jdm.app.static import blur_weights
from jdm.controls import Canny, Strokes
from jdm.controls.canny import GreyCanny
from jdm.files import ASSETS
from jdm.generator import blended_noise, fresh_noise
from jdm.models import nano
from jdm.models.text import TextEncoder, whole_tokenizer
from jdm.space import from_bytes, unit

CHROMIUM = pages.chromium()
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason=pages.BROWSER)]
if CHROMIUM:
    from playwright.sync_api import sync_playwright

LETTERS = ["abcdefghij '’.,!?-_0123456789", "àéîõüßçñÅØÀ\u0300\u0301\u0327", "абвгдежзΣσςαβγΐİıŉǰẞﬃ",
           "你好世界日本語한국어", "مرحباשלוםनमस्ते\u0e31ไทย", "😀👢🦊👩‍🚀🏳️‍🌈\u200d\ufe0f",
           " \t\n\u00a0\u2003\u0085\ufeff\u3000", "<|startofEND>TEXT"]
WRITTEN = ["ankle boot", "", "  Ankle\u00a0Boot's, it'll <|endoftext|> x <|STARTOFTEXT|><|startoftext|>", "x" * 300,
           "don't 123 4.5% --", "ΣΑΣ ΟΔΟΣ", "e\u0301 \u00e9", "a photo of a t-shirt " * 20, "👩‍👩‍👧‍👦 🇩🇪 𝔘𝔫𝔦"]


@pytest.fixture(scope="module")
def call():
    """call(file, code, argument): the value of a JavaScript function of (the file's exports, argument)."""
    with pages.hosted(PAGE) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"{address}icon.svg")
        yield lambda file, code, argument: page.evaluate(
            f"async (given) => ({code})(await import('{address}{file}'), given)", argument)
        browser.close()


def texts() -> list[str]:
    """Texts of many scripts, and of any characters that this Python knows."""
    rng = random.Random(0)
    mixed = ["".join(rng.choice(rng.choice(LETTERS)) for _ in range(rng.randint(0, 30))) for _ in range(2000)]
    known = [chr(c) for c in range(1, 0x30000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]
    return [*WRITTEN, *mixed, *("".join(rng.choices(known, k=rng.randint(1, 12))) for _ in range(2000))]


@pytest.mark.parametrize("which", ["shipped", "long"])
def test_tokens_equal_pythons(call, which, tmp_path):
    tokenizer = whole_tokenizer(str(ASSETS / "nano-canny"), "tokenizer") if which == "shipped" else \
        nano.tokenizer(WRITTEN * 2, 32)
    tokenizer([""], padding="max_length", truncation=True, max_length=tokenizer.model_max_length)
    tokenizer.save_pretrained(tmp_path)
    given = texts()
    found = call("tokenizer.js", """({ Tokenizer }, [file, texts]) => {
        const tokenizer = new Tokenizer(file);
        return texts.map((text) => [tokenizer.ids(text), tokenizer.unread(text)]);
    }""", [json.loads((tmp_path / "tokenizer.json").read_text()), given])
    ids = tokenizer(given, padding="max_length", truncation=True, max_length=tokenizer.model_max_length).input_ids
    cut = TextEncoder(torch.nn.Identity(), tokenizer).overlong(given)
    assert not [(text, a, b) for text, (a, _), b in zip(given, found, ids, strict=True) if a != b]
    assert not [(text, a, cut.get(text)) for text, (_, a) in zip(given, found, strict=True) if a != cut.get(text, "")]
    assert len(cut) > 100


@pytest.mark.parametrize("seed", [0, 5, 123_456_789, 2**40 - 1])
def test_noise_equals_pytorchs(call, seed):
    """To the last bits of logarithm and cosine."""
    for shape, to_seed, blend in (((2, 4, 16, 16), 1, 0), ((3, 8, 8, 8), 7, .35), ((1, 17), 3, 1)):
        asked = {"seed": seed, "toSeed": to_seed, "blend": blend}
        found = call("noise.js", "({ blended }, [n, count, asked]) => [...blended(n, count, asked)]",
                     [shape[0], int(np.prod(shape[1:])), asked])
        assert np.abs(np.array(found) - blended_noise(shape, seed, to_seed, blend).ravel().numpy()).max() < 1e-5
    found = call("noise.js", "({ fresh }, seed) => [...fresh(2, 20, seed, 3)]", seed)
    assert np.abs(np.array(found) - fresh_noise((2, 20), seed, 3).ravel().numpy()).max() < 1e-5


def drawings() -> list[np.ndarray]:
    """Pictures uint8 [H, W, 3] of lines, some blurred, some of noise, some empty."""
    rng, found = np.random.default_rng(0), []
    for k in range(60):
        height, width = [(64, 64), (32, 32), (64, 96), (128, 128), (40, 64)][k % 5]
        picture = np.full((height, width, 3), 255 * (k % 2), np.uint8)
        for _ in range(rng.integers(0, 6)):
            ends, colour = rng.integers(0, width, (2, 2)).tolist(), rng.integers(0, 256, 3).tolist()
            cv2.line(picture, *ends, colour, int(rng.integers(1, 7)), cv2.LINE_AA)
        if k % 7 == 0:
            picture = rng.integers(0, 256, picture.shape, dtype=np.uint8)
        if k % 11 == 0:
            picture = cv2.GaussianBlur(picture, (9, 9), 3)
        found.append(picture // 8 if k % 13 == 0 else picture)
    return found


@pytest.mark.parametrize("control", [Canny(), Canny(low=50.7, high=120.2), GreyCanny(), Strokes(),
                                     Strokes(smoothing=.6)])
def test_maps_equal_pythons(call, control):
    settings = control.preprocessor
    file, code = "strokes.js", "({ strokes }, given) => [...strokes(picture(given), given.settings)]"
    if isinstance(control, Canny):
        settings = {"low": control.low, "high": control.high, "grey": control.grey}
        file = "canny.js"
        code = "({ canny }, given) => Array.from(canny(picture(given), given.settings), (edge) => edge / 255)"
    drawn = 0
    for one in drawings():  # in base64 and JSON: Playwright takes a second for a list of a picture's length
        height, width, _ = one.shape
        if isinstance(control, Strokes):
            settings = {**settings, "blur": blur_weights(control, (height, width))}
        rgba = np.dstack([one, np.full((height, width, 1), 255, np.uint8)])
        found = json.loads(call(file, f"""(exports, given) => {{
            const bytes = (text) => Uint8ClampedArray.from(atob(text), (letter) => letter.charCodeAt(0));
            const picture = ({{ width, height, data }}) => ({{ width, height, data: bytes(data) }});
            return JSON.stringify(({code})(exports, given));
        }}""", {"width": width, "height": height, "data": base64.b64encode(rgba).decode(), "settings": settings}))
        expected = control.h(unit(from_bytes(torch.from_numpy(one).permute(2, 0, 1)))[None])
        assert np.abs(np.array(found) - expected.ravel().numpy()).max() < 1e-4
        drawn += bool(expected.max())
    assert drawn > 40
