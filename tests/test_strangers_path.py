"""From a folder of pictures to a picture by stock diffusers, by commands alone (examples/strangers_path.py)."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "examples" / "strangers_path.py"


@pytest.mark.parametrize("steps", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_a_strangers_folder_becomes_a_model(steps, tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, tmp_path / "out", "--steps", str(steps)], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert Image.open(tmp_path / "out" / "picture.png").size == (32, 32)
    assert "another picture takes its place" in done.stdout
