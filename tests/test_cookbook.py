"""The cookbooks of large models: their commands and code, run in their order on tiny models of the same classes."""

import re

import pytest
from PIL import Image
from safetensors.torch import load_file

import documented

KINDS = {
    "docs/z-image.md": ["estimate", "prepare", "train", "sample", "train", "train", "train", "train", *["export"] * 4],
    "docs/sd15.md": ["estimate", "doctor", "prepare", "train", "sample", "train", "train", "train", "train", "sample",
                     "train", *["export"] * 4],
}


@pytest.mark.parametrize("page", KINDS)
def test_the_page_has_every_step(page):
    assert [re.search(r"jdm (\w+)", command)[1] for command in documented.commands(page)] == KINDS[page]


@pytest.mark.parametrize("page", ["docs/z-image.md", "docs/sd15.md"])
def test_every_command_of_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(documented.working_folder(tmp_path))
    for language, text in documented.steps(page):
        if language == "sh":
            documented.run(text)
        else:
            exec(text, {})
    assert Image.open("fox.png").size == (32, 32)
    for name in re.findall(r"`(z_canny\w*\.safetensors)`", documented.PAGES[page].read_text()):
        folder = max((p for p in tmp_path.glob("z_canny*") if name.startswith(p.name)), key=lambda p: len(p.name))
        assert all(tensor.isfinite().all() for tensor in load_file(folder / name).values()), name
