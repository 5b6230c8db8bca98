"""`jdm sample`: what its flags become."""

import numpy as np
import pytest
import torch
from PIL import Image

from jdm.cli.parser import main
from jdm.data.pictures import load_picture
from jdm.errors import UsageError
from jdm.evaluation.sampling import generator
from jdm.space import from_bytes, unit


@pytest.mark.parametrize(("flags", "expected"), [([], 2.0), (["--guidance", "0"], 0.0), (["--guidance", "1"], 1.0)])
def test_a_guidance_of_zero_is_taken(flags, expected, teacher, tmp_path, monkeypatch):
    seen = []

    def sampler(model, steps, guidance, *more, **further):
        seen.append(guidance)
        raise UsageError("seen enough")

    monkeypatch.setattr("jdm.cli.sample.Sampler", sampler)
    assert main(["sample", str(teacher), "--prompt", "a coat", "--out", str(tmp_path / "out"), *flags]) == 2
    assert seen == [expected]


@pytest.mark.parametrize("as_map", [False, True])
def test_python_draws_what_the_command_draws(as_map, student, tmp_path):
    size = (32, 32) if as_map else (40, 50)
    grey = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    file, out = tmp_path / "picture.png", tmp_path / "out"
    Image.fromarray(grey).save(file)
    flags = ["--control-map", str(file)]
    if not as_map:
        flags = ["--image", str(file), "--also", str(student), "--strength", ".7", "--strength", ".4"]
    assert main(["sample", str(student), "--prompt", "a coat", "--n", "2", "--seed", "3", "--to-seed", "9", "--blend",
                 ".3", "--out", str(out), *flags]) == 0
    more = {} if as_map else {"also": [str(student)], "strengths": [0.7, 0.4]}
    shown = {"control_map" if as_map else "image": load_picture(file, 32)}
    drawn = generator(str(student), **more)("a coat", n=2, seed=3, to_seed=9, blend=0.3, **shown)
    assert torch.equal(drawn, torch.stack([load_picture(out / name, 32) for name in ("000.png", "001.png")]))
    other = generator(str(student), **more)("a coat", n=2, seed=3, **shown)
    assert not torch.equal(drawn, other)


def test_steering_compares_with_the_picture_itself(teacher, tmp_path, monkeypatch):
    seen, file = [], tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(file)

    def likelihood(control, space, c, image):
        seen.append((control, c, image))
        raise UsageError("seen enough")

    monkeypatch.setattr("jdm.cli.sample.likelihood", likelihood)
    assert main(["sample", str(teacher), "--prompt", "a coat", "--image", str(file), "--steer", "soft-edge",
                 "--out", str(tmp_path / "out")]) == 2
    ((control, c, image),) = seen
    exact = unit(from_bytes(load_picture(file, 32)))[None]
    assert torch.equal(image, exact)
    assert torch.equal(c, control.h(exact))


def test_a_blend_beyond_one_is_refused(student, capsys):
    assert main(["sample", str(student), "--prompt", "a coat", "--blend", "1.5"]) == 2
    assert "--blend: must be a number in [0, 1], got '1.5'" in capsys.readouterr().err
