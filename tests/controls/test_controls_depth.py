"""Depth: the library's preprocessing and prediction, with a gradient down to the picture."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from jdm.controls import Depth, checked, load_control
from jdm.controls.depth import Preprocessing, normalised
from jdm.controls.processors import resized
from jdm.errors import UsageError

DPT = {"image_processor_type": "DPTImageProcessor", "do_resize": True, "do_rescale": True, "do_normalize": True,
       "rescale_factor": 1 / 255, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.25], "resample": 3}
PROCESSORS = {
    "midas": {**DPT, "size": {"height": 32, "width": 32}},
    "anything": {**DPT, "size": {"height": 42, "width": 42}, "keep_aspect_ratio": True, "ensure_multiple_of": 14},
    "bilinear": {**DPT, "size": {"height": 24, "width": 40}, "resample": 2, "do_normalize": False},
    "dinov2": {**DPT, "do_resize": False, "do_pad": True, "size_divisor": 14, "do_rescale": False,
               "image_mean": [123.7, 116.3, 103.5], "image_std": [58.4, 57.1, 57.4]},
    "old": {"feature_extractor_type": "DPTFeatureExtractor", "size": 32, "do_resize": True, "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 3,
            "keep_aspect_ratio": True, "ensure_multiple_of": 8},
}


def images(n: int = 2, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


MODELS = ("midas", "hybrid", "anything")


def saved(model, processor: dict, folder: Path) -> str:
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


def enlivened(model, head: nn.Sequential | nn.Conv2d):
    """Random weights large enough that the map is not flat, and a last ReLU that is open."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            fan = parameter[0].numel()
            parameter.data = torch.randn(parameter.shape, generator=generator) / fan**0.5
    head.weight.data.abs_()
    head.bias.data.fill_(1.0)
    return model.eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Folders of a tiny DPT, a tiny hybrid one (the default is of its kind) and a tiny Depth Anything."""
    from transformers import (
        BitConfig,
        DepthAnythingConfig,
        DepthAnythingForDepthEstimation,
        Dinov2Config,
        DPTConfig,
        DPTForDepthEstimation,
    )

    folder = tmp_path_factory.mktemp("depth")
    small = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    dpt = DPTForDepthEstimation(DPTConfig(
        **small, intermediate_size=32, image_size=32, patch_size=8, backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8))
    stem = BitConfig(
        global_padding="same", layer_type="bottleneck", depths=[1, 1, 1], hidden_sizes=[16, 32, 64, 64],
        embedding_size=16, num_groups=8, out_features=["stage1", "stage2", "stage3"], embedding_dynamic_padding=True)
    hybrid = DPTForDepthEstimation(DPTConfig(
        **small, intermediate_size=32, image_size=32, patch_size=16, backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16, 32, 8, 8], fusion_hidden_size=8, is_hybrid=True, backbone_config=stem,
        backbone_featmap_shape=[1, 64, 2, 2], reassemble_factors=[1, 1, 1, 0.5]))
    backbone = Dinov2Config(**small, mlp_ratio=2, image_size=42, patch_size=14, out_indices=[1, 2, 3, 4],
                            reshape_hidden_states=False, apply_layernorm=True)
    anything = DepthAnythingForDepthEstimation(DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=16, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
        head_hidden_size=8))
    return {
        "midas": saved(enlivened(dpt, dpt.head.head[4]), PROCESSORS["midas"], folder / "midas"),
        "hybrid": saved(enlivened(hybrid, hybrid.head.head[4]), PROCESSORS["midas"], folder / "hybrid"),
        "anything": saved(enlivened(anything, anything.head.conv3), PROCESSORS["anything"], folder / "anything"),
    }


def processor_of(config: dict, folder: Path):
    from transformers import AutoImageProcessor

    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return AutoImageProcessor.from_pretrained(folder)


def smooth(height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3] of slow waves in 60..200, where bicubic does not leave 0..255."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 5 + k) * np.cos(y / (4 + k)) for k in range(3)]
    return (130 + 70 * np.stack(waves, -1)).astype(np.uint8)


@pytest.mark.parametrize("shape", [(64, 64), (20, 20), (45, 67), (60, 31)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_preprocessing_is_the_librarys_on_8_bit_pictures(name, shape, tmp_path):
    processor = processor_of(PROCESSORS[name], tmp_path)
    picture = smooth(*shape)
    expected = processor(images=Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    preprocessing = Preprocessing.of(processor, name)
    got = preprocessing(torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255)
    assert got.shape == expected.shape
    # PIL rounds to 8 bits after each of its two passes: half a level, up to 1.3 of it through the second, and half.
    level = preprocessing.standard.scale / 255 / min(preprocessing.standard.std)
    assert (got - expected).abs().max() < (1.3 * level if preprocessing.size else 1e-4)


@pytest.mark.parametrize(("kernel", "number"), [("bilinear", 2), ("bicubic", 3)])
@pytest.mark.parametrize("size", [(13, 40), (64, 20), (24, 30)])
def test_resizing_is_pils_without_its_rounding(kernel, number, size):
    image = images(1, 24, 30)
    got = resized(image, size, kernel)
    for channel, expected in zip(image[0].numpy(), got[0].numpy(), strict=True):
        there = np.array(Image.fromarray(channel).resize(size[::-1], number))
        assert np.allclose(there, expected, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_depth_is_the_librarys_normalised_prediction(name, models):
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    picture = smooth(48, 64)
    processor = AutoImageProcessor.from_pretrained(models[name])
    model = AutoModelForDepthEstimation.from_pretrained(models[name]).eval()
    with torch.no_grad():
        outputs = model(**processor(images=Image.fromarray(picture), return_tensors="pt"))
    depth = outputs.predicted_depth[None]
    expected = normalised(functional.interpolate(depth, (48, 64), mode="bicubic", align_corners=False, antialias=True))
    c = Depth(models[name]).h(torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255)
    assert c.shape == (1, 1, 48, 64)
    assert (float(c.min()), float(c.max())) == (0, 1)
    # The two preprocessings differ by PIL's rounding to 8 bits, which the network and the stretching enlarge.
    assert (c - expected).abs().mean() < 0.01


@pytest.mark.parametrize("name", MODELS)
def test_depth_is_frozen_and_differentiable_at_every_pixel(name, models):
    control = Depth(models[name])
    assert checked(control, 32) is control
    network, _ = control.loaded
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    c = control.h(images(3, 48, 40))
    assert c.shape == (3, 1, 48, 40)
    assert not c.requires_grad
    pictures = images(3, 48, 40, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(control.log_prob(pictures, c).sum(), pictures)
    assert (gradient != 0).float().mean() > 0.99
    assert control.h(images().bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("name", MODELS)
def test_depths_log_prob_passes_gradcheck(name, models):
    control = Depth(models[name])
    pictures = images(1, 12, 10, seed=1).double().requires_grad_()
    c = control.h(images(1, 12, 10).double())
    assert torch.autograd.gradcheck(lambda x: control.log_prob(x, c), pictures, fast_mode=True)
    assert control.h(images()).dtype == torch.float32


def test_padding_is_taken_off_again(tmp_path):
    preprocessing = Preprocessing.of(processor_of(PROCESSORS["dinov2"], tmp_path), "dinov2")
    pictures = images(1, 30, 41)
    padded = preprocessing(pictures)
    assert padded.shape[-2:] == (42, 42)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (preprocessing.standard.mean, preprocessing.standard.std))
    assert torch.allclose(preprocessing.undone(padded * std + mean, pictures), 255 * pictures, atol=1e-4)


def test_each_depth_map_is_normalised_on_its_own():
    """A flat map becomes 0, without a gradient."""
    depth = torch.stack([torch.linspace(3, 5, 16).view(1, 4, 4), torch.full((1, 4, 4), 2000.0),
                         torch.linspace(-1e-3, 1e-3, 16).view(1, 4, 4), torch.zeros(1, 4, 4)])
    depth[1, 0, 0, 0] += 5e-4  # what float32 leaves of a constant
    depth.requires_grad_()
    c = normalised(depth)
    assert torch.allclose(c[[0, 2]], torch.linspace(0, 1, 16).view(1, 1, 4, 4), atol=1e-5)
    assert not c[[1, 3]].any()
    (gradient,) = torch.autograd.grad(c.square().sum(), depth)
    assert not gradient[[1, 3]].any()
    for k in (0, 2):  # dc_i / d min = (c_i - 1) / range, dc_i / d max = -c_i / range
        own, span = c[k].detach().flatten(), float(depth[k].detach().max() - depth[k].detach().min())
        exact = 2 * own / span
        exact[0] += (2 * own * (own - 1)).sum() / span
        exact[-1] -= (2 * own * own).sum() / span
        torch.testing.assert_close(gradient[k].flatten(), exact, atol=1e-4 / span, rtol=1e-4)


def test_depth_loads_nothing_before_the_first_measurement(monkeypatch):
    import transformers

    def offline(*what, **how):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(transformers.AutoModelForDepthEstimation, "from_pretrained", offline)
    control = load_control("depth")
    message = (r"depth's model Intel/dpt-hybrid-midas could not be loaded .OSError: no route to host.; "
               r"name a folder or hub id .*class MyDepth.Depth.: model = ")
    with pytest.raises(UsageError, match=message) as caught:
        checked(control, 32)
    assert "\n" not in str(caught.value)


def test_unsupported_depth_models_are_refused(models, tmp_path):
    from transformers import DPTConfig, DPTModel, GLPNConfig, GLPNForDepthEstimation

    folder = saved(DPTModel(DPTConfig.from_pretrained(models["midas"])), PROCESSORS["midas"], tmp_path / "features")
    with pytest.raises(UsageError, match="features was trained without a depth head; name a depth estimator, such as"):
        Depth(folder).h(images())
    glpn = GLPNForDepthEstimation(GLPNConfig(
        hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 1, 1], decoder_hidden_size=8))
    folder = saved(glpn, {"image_processor_type": "GLPNImageProcessor"}, tmp_path / "glpn")
    with pytest.raises(UsageError, match=r"differentiate the preprocessing of .*glpn .GLPNImageProcessor") as caught:
        Depth(folder).h(images())
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"could not be loaded .*name a folder or hub id"):
        Depth(str(tmp_path / "nothing")).h(images())
