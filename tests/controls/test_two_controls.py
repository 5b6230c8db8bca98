"""Two controls at once: residuals add, each with its strength."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from jdm.cli.parser import main
from jdm.controls import Canny, LowRes
from jdm.errors import UsageError
from jdm.evaluation.sampling import Sampler
from jdm.generator import starting_noise
from jdm.library import load_controlnet, load_model
from jdm.models.stable_diffusion import UNetDenoiser


@pytest.fixture
def one_step(student):
    return load_model(str(student))


def asked(model, n: int = 2):
    random = torch.Generator().manual_seed(0)
    z = torch.randn(model.latent_shape(n, 32), generator=random)
    return z, ["a coat"] * n, torch.rand(n, 3, 32, 32, generator=random)


def test_a_second_controlnet_of_strength_zero_changes_nothing(one_step, student):
    net, control = load_controlnet(str(student), one_step)
    assert control == "canny"
    z, y, shown = asked(one_step)
    alone = Sampler(one_step).x(z, y, shown)
    beside = torch.cat([shown, 1 - shown], dim=1)
    silent = Sampler(one_step, also=[net], strengths=[1.0, 0.0]).x(z, y, beside)
    torch.testing.assert_close(silent, alone, atol=1e-6, rtol=0)
    assert not torch.allclose(Sampler(one_step, also=[net]).x(z, y, beside), alone, atol=1e-3)


def test_two_half_strength_copies_equal_one_control(one_step, student):
    net, _ = load_controlnet(str(student / "controlnet"), one_step)
    z, y, shown = asked(one_step)
    halves = Sampler(one_step, also=[net], strengths=[0.5, 0.5]).x(z, y, torch.cat([shown, shown], dim=1))
    torch.testing.assert_close(halves, Sampler(one_step).x(z, y, shown), atol=1e-5, rtol=0)


def test_two_controls_match_stock_multi_controlnet(one_step, student):
    from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel

    net, _ = load_controlnet(str(student), one_step)
    z, _, shown = asked(one_step)
    index, text = torch.full((2,), 625), torch.randn(2, 16, one_step.unet.config["cross_attention_dim"])
    multi = MultiControlNetModel([one_step.controlnet, net])
    down, mid = multi(z, index, text, [shown, 1 - shown], [0.7, 0.3], return_dict=False)
    stock = one_step.unet(z, index, text, down_block_additional_residuals=down, mid_block_additional_residual=mid,
                          return_dict=False)[0]
    ours = UNetDenoiser(one_step.unet, one_step.controlnet, [net])
    ours.strengths = [0.7, 0.3]
    torch.testing.assert_close(ours(z, index, text, torch.cat([shown, 1 - shown], dim=1)), stock, atol=1e-5, rtol=0)


def test_an_unfitting_or_missing_controlnet_is_refused(one_step, teacher, student):
    with pytest.raises(UsageError, match="has no ControlNet"):
        load_controlnet(str(teacher), one_step)
    with pytest.raises(UsageError, match=r"does not fit this model: its ControlNet has block_out_channels"):
        load_controlnet("nano-canny", one_step)
    for key, other in (("in_channels", 4), ("block_out_channels", (16, 32)), ("cross_attention_dim", 8)):
        unet = SimpleNamespace(config={**one_step.unet.config, key: other})
        beside = one_step.with_networks(backbone=unet)
        message = rf"{student} does not fit this model: its ControlNet has {key} .*, the model's UNet "
        with pytest.raises(UsageError, match=message + re.escape(str(other))):
            load_controlnet(str(student), beside)
    with pytest.raises(UsageError, match=r"is not a ControlNet \(its config.json names UNet2DConditionModel"):
        load_controlnet(str(student / "unet"), one_step)
    with pytest.raises(UsageError, match="3 strengths for 1 control;"):
        Sampler(one_step, strengths=[1, 1, 1])


def pixels(file) -> torch.Tensor:
    """[3, H, W] of a picture file, in [0, 1]."""
    return torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1) / 255


def test_sample_draws_to_two_controls(student, tmp_path, capsys):
    noise = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(noise, 32, mode="bicubic").clamp(0, 1)[0]
    Image.fromarray((255 * smooth).byte().permute(1, 2, 0).numpy()).save(tmp_path / "photo.png")
    shutil.copytree(student / "controlnet", tmp_path / "second")
    (tmp_path / "second" / "jdm.json").write_text(json.dumps({"control": "lowres"}))
    out = tmp_path / "out"
    line = ["sample", str(student), "--prompt", "a coat", "--image", str(tmp_path / "photo.png"), "--n", "2", "--out",
            str(out)]
    drawn = {}
    for strengths in (("1",), ("1", "0"), ("1", "40"), ("40", "1")):  # random weights: a control of 1 is faint
        also = ["--also", str(tmp_path / "second")] if len(strengths) > 1 else []
        assert main([*line, *also, *(v for s in strengths for v in ("--strength", s))]) == 0
        drawn[strengths] = torch.stack([pixels(out / f"00{i}.png") for i in range(2)])
    assert len({v.numpy().tobytes() for v in drawn.values()}) == 3
    assert (drawn["1",] - drawn["1", "0"]).abs().max() < 1.01 / 255
    photo, control = pixels(tmp_path / "photo.png")[None], pixels(out / "control.png").split(32, dim=2)
    shown = [measure.image(measure.h(photo)) for measure in (Canny(), LowRes())]
    for half, expected in zip(control, shown, strict=True):
        assert (half - expected[0]).abs().max() <= 0.5 / 255 + 1e-6
        assert half.std() > 0.1
    model = load_model(str(student))
    again = Sampler(model, also=[load_controlnet(str(tmp_path / "second"), model)[0]], strengths=[40, 1])
    z, beside = starting_noise(model.latent_shape(2, 32), seed=0), torch.cat(shown, 1).repeat(2, 1, 1, 1)
    assert (drawn["40", "1"] - again(z, ["a coat"] * 2, beside) / 255).abs().max() < 1.01 / 255
    assert main([*line[:6], "--also", "nano-canny", "--out", str(out)]) == 2
    assert "does not fit" in capsys.readouterr().err
