"""LoRA files: stock pipelines compute what an adapter does."""

import copy

import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

import tiny
from jdm.errors import UsageError
from jdm.formats import lora_file
from jdm.formats.lora_file import DIFFUSERS_FILE, LoRA
from jdm.models.adapters import Adapter, switched_on
from jdm.models.stable_diffusion import StableDiffusion

X = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(1))
TEXT = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(2))
T = torch.tensor([10, 625])


def unet():
    """Two levels, the lower one with attention; every kind of layer that an adapter wraps."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny.model().unet


def sdxl_unet():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 16, 16), layers_per_block=2, norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=12,
            attention_head_dim=(1, 2, 4), transformer_layers_per_block=(1, 1, 2), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=36)


def shaken(net, scale=0.02):
    """A copy with every weight moved, as after training."""
    moved = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in moved.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.weight.add_(scale * torch.randn(module.weight.shape, generator=generator))
    return moved


@torch.no_grad()
def output(net):
    return net(X, T, TEXT).sample


@torch.no_grad()
def merged(net, lora):
    """The LoRA's definition: W + B A in every layer."""
    net = copy.deepcopy(net)
    for path, (a, b) in lora.layers.items():
        weight = net.get_submodule(path).weight
        weight.add_((b.flatten(1) @ a.flatten(1)).view_as(weight))
    return net


def random_lora(net, rank=3):
    """An adapter whose every tensor speaks up, and its tensors."""
    adapter = Adapter(net, "student", rank, StableDiffusion.lora_targets)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    layers = {path: layer for path, layer in net.named_modules() if isinstance(layer, LoraLayer)}
    return adapter, LoRA({path: (layer.lora_A[adapter.name].weight.detach().clone(),
                                 layer.lora_B[adapter.name].weight.detach() * layer.scaling[adapter.name])
                          for path, layer in layers.items()})


def pipeline():
    model = tiny.model()
    return diffusers.StableDiffusionPipeline(
        unet=unet(), vae=model.vae, text_encoder=model.text_encoder, tokenizer=model.tokenizer,
        scheduler=diffusers.DDIMScheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def test_an_adapters_tensors_are_the_function_it_computes():
    net = unet()
    plain = output(net)
    adapter, lora = random_lora(net)
    with switched_on([adapter]):
        ours = output(net)
    assert (ours - plain).abs().max() > 0.1, "a LoRA that changes nothing would prove nothing"
    assert (output(merged(unet(), lora)) - ours).abs().max() < 1e-5
    for kind in ("to_q", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "conv2", "conv_shortcut", "time_emb_proj",
                 "downsamplers.0.conv", "upsamplers.0.conv"):
        assert any(path.endswith(kind) for path in lora.layers), kind


@pytest.mark.parametrize("write", [lora_file.write_diffusers, lora_file.write_kohya])
@pytest.mark.parametrize("as_folder", [True, False])
def test_stock_diffusers_computes_what_our_adapter_does(write, as_folder, tmp_path):
    net = unet()
    adapter, lora = random_lora(net)
    with switched_on([adapter]):
        ours = output(net)
    file = write(lora, tmp_path / DIFFUSERS_FILE)
    pipe = pipeline()
    pipe.load_lora_weights(str(tmp_path if as_folder else file))
    assert (output(pipe.unet) - ours).abs().max() < 1e-5
    pipe.unload_lora_weights()
    assert torch.equal(output(pipe.unet), output(unet()))


def test_an_sdxl_lora_reaches_every_stock_layer(tmp_path):
    """SDXL's added embedding is where names without dots are ambiguous."""
    net = sdxl_unet()
    lora = lora_file.difference_lora(net, shaken(net), 4).lora
    assert "add_embedding.linear_1" in lora.layers
    wanted = merged(net, lora)
    for write in (lora_file.write_diffusers, lora_file.write_kohya):
        file = write(lora, tmp_path / f"{write.__name__}.safetensors")
        loaded = copy.deepcopy(net)
        state, alphas, header = diffusers.StableDiffusionXLPipeline.lora_state_dict(
            str(file), unet_config=loaded.config, return_lora_metadata=True)
        loaded.load_lora_adapter(state, prefix="unet", network_alphas=alphas, metadata=header)
        loaded.fuse_lora()
        for path in lora.layers:
            theirs = loaded.get_submodule(path).base_layer.weight
            assert (theirs - wanted.get_submodule(path).weight).abs().max() < 1e-6, path


def test_layers_of_different_ranks_become_one_rank():
    net = unet()
    paths = ["conv_in", "mid_block.attentions.0.proj_in"]
    ranks = dict(zip(paths, (2, 5), strict=True))
    lora = LoRA({p: (torch.randn(r, *net.get_submodule(p).weight.shape[1:]),
                     torch.randn(len(net.get_submodule(p).weight), r, 1, 1)) for p, r in ranks.items()})
    even = lora.at_one_rank()
    assert {len(a) for a, _ in even.layers.values()} == {5}
    assert (output(merged(net, lora)) - output(merged(net, even))).abs().max() < 1e-6


def test_the_difference_at_full_rank_is_exact():
    base = unet()
    tuned = shaken(base)
    found = lora_file.difference_lora(base, tuned, 10**6)
    assert found.errors[found.lora.rank] == 0
    assert found.left_out == 0
    back = merged(base, found.lora)
    for (name, ours), theirs in zip(back.named_parameters(), tuned.parameters(), strict=True):
        assert (ours - theirs).abs().max() < 1e-6, name
    assert (output(back) - output(tuned)).abs().max() < 1e-5


def test_the_difference_is_the_truncated_svd():
    base = unet()
    tuned = shaken(base)
    for rank in (1, 4):
        found = lora_file.difference_lora(base, tuned, rank)
        missed = whole = 0.0
        for path, (a, b) in found.lora.layers.items():
            change = (tuned.get_submodule(path).weight - base.get_submodule(path).weight).detach().double().flatten(1)
            u, s, v = torch.linalg.svd(change, full_matrices=False)
            best = (u[:, :rank] * s[:rank]) @ v[:rank]
            product = b.double().flatten(1) @ a.double().flatten(1)
            assert (product - best).norm() < 1e-5 * best.norm(), path
            missed, whole = missed + float((change - product).square().sum()), whole + float(change.square().sum())
        assert found.errors[found.lora.rank] == pytest.approx((missed / whole) ** 0.5, rel=1e-5)
    assert list(found.errors.values()) == sorted(found.errors.values(), reverse=True)


def test_a_lora_student_is_recovered_from_its_difference():
    base, net = unet(), unet()
    _, lora = random_lora(net, rank=3)
    found = lora_file.difference_lora(base, merged(base, lora), 3)
    assert found.errors[found.lora.rank] < 1e-5
    assert found.errors[2] > 0.1


def test_what_no_lora_holds_is_reported():
    base = unet()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.conv_in.weight.add_(3.0 / tuned.conv_in.weight.numel() ** 0.5)
        tuned.conv_in.bias.add_(4.0 / tuned.conv_in.bias.numel() ** 0.5)
    found = lora_file.difference_lora(base, tuned, 1)
    assert list(found.lora.layers) == ["conv_in"]
    assert found.errors[found.lora.rank] == pytest.approx(0, abs=1e-5)  # a constant has rank one
    assert found.left_out == pytest.approx(4 / 5, rel=1e-5)


def test_empty_or_unlike_differences_are_refused():
    with pytest.raises(UsageError, match="nothing to write"):
        lora_file.difference_lora(unet(), unet(), 4)
    with pytest.raises(UsageError, match="different shapes"):
        lora_file.difference_lora(unet(), sdxl_unet(), 4)
    with pytest.raises(UsageError, match="at least 1, got 0"):
        lora_file.difference_lora(unet(), shaken(unet()), 0)


def test_half_precision_holds_both_halves(tmp_path):
    """float16 keeps 11 bits: each half is rounded by 5e-4 of itself, the product by twice that."""
    base = unet()
    lora = lora_file.difference_lora(base, shaken(base, 1e-3), 8).lora
    file = lora_file.write_diffusers(lora, tmp_path / "a.safetensors")
    halved = {key: tensor.half().float() for key, tensor in load_file(file).items()}
    for path, pair in lora.layers.items():
        a, b = (halved[f"unet.{path}.lora_{half}.weight"] for half in "AB")
        ours = [t.flatten(1) for t in pair]
        assert (b.flatten(1) @ a.flatten(1) - ours[1] @ ours[0]).norm() < 2e-3 * (ours[1] @ ours[0]).norm()
