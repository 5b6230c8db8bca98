"""`jdm sample`: what its flags become."""

import pytest

from jdm.cli.parser import main
from jdm.errors import UsageError


@pytest.mark.parametrize(("flags", "expected"), [([], 2.0), (["--guidance", "0"], 0.0), (["--guidance", "1"], 1.0)])
def test_a_guidance_of_zero_is_taken(flags, expected, teacher, tmp_path, monkeypatch):
    seen = []

    def sampler(model, steps, guidance, *more, **further):
        seen.append(guidance)
        raise UsageError("seen enough")

    monkeypatch.setattr("jdm.cli.sample.Sampler", sampler)
    assert main(["sample", str(teacher), "--prompt", "a coat", "--out", str(tmp_path / "out"), *flags]) == 2
    assert seen == [expected]
