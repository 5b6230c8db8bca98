"""LoRA files: what is written, stock pipelines compute; what others have written, an adapter computes."""

import copy
import json

import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn

import tiny
from jdm.errors import UsageError
from jdm.formats import lora_file
from jdm.formats.lora_file import DIFFUSERS_FILE, LoRA
from jdm.models.adapters import Adapter
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
    return adapter, lora_file.adapter_lora(net, adapter)


def pipeline():
    model = tiny.model()
    return diffusers.StableDiffusionPipeline(
        unet=unet(), vae=model.vae, text_encoder=model.text_encoder, tokenizer=model.tokenizer,
        scheduler=diffusers.DDIMScheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def test_an_adapters_tensors_are_the_function_it_computes():
    net = unet()
    plain = output(net)
    adapter, lora = random_lora(net)
    with adapter.active():
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
    with adapter.active():
        ours = output(net)
    file = write(lora, tmp_path / DIFFUSERS_FILE)
    pipe = pipeline()
    pipe.load_lora_weights(str(tmp_path if as_folder else file))
    assert (output(pipe.unet) - ours).abs().max() < 1e-5
    pipe.unload_lora_weights()
    assert torch.equal(output(pipe.unet), output(unet()))


@pytest.mark.parametrize("write", [lora_file.write_diffusers, lora_file.write_kohya])
def test_a_file_read_back_is_the_same_adapter(write, tmp_path):
    net = unet()
    adapter, lora = random_lora(net)
    with adapter.active():
        ours = output(net)
    other = unet()
    read = lora_file.read_lora(write(lora, tmp_path / "a.safetensors"), other)
    assert read.layers.keys() == lora.layers.keys()
    assert all(torch.equal(x, y) for k in lora.layers for x, y in zip(read.layers[k], lora.layers[k], strict=True))
    plain = output(other)
    again = lora_file.inject(read, other, "published")
    assert torch.equal(output(other), plain), "off until it is active"
    with again.active():
        assert (output(other) - ours).abs().max() < 1e-5


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
        read = lora_file.read_lora(file, sdxl_unet())
        assert read.layers.keys() == lora.layers.keys()


def test_the_layouts_that_are_about_are_read_alike(tmp_path):
    """peft's, diffusers' first one, kohya's with SDXL's single-file names; an alpha that is not the rank scales B."""
    net = sdxl_unet()
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
    layer = net.get_submodule(path)
    a, b = torch.randn(4, layer.in_features), torch.randn(layer.out_features, 4)
    kohya = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0"
    files = [
        {f"unet.{path}.lora_A.weight": a, f"unet.{path}.lora_B.weight": b},
        {f"base_model.model.{path}.lora_A.default.weight": a, f"base_model.model.{path}.lora_B.default.weight": b},
        {f"unet.{path.removesuffix('.to_out.0')}.processor.to_out_lora.down.weight": a,
         f"unet.{path.removesuffix('.to_out.0')}.processor.to_out_lora.up.weight": b},
        {f"{kohya}.lora_down.weight": a, f"{kohya}.lora_up.weight": 2 * b, f"{kohya}.alpha": torch.tensor(2.0)},
        {f"unet.{path}.lora_A.weight": a, f"unet.{path}.lora_B.weight": 2 * b, f"unet.{path}.alpha": torch.tensor(2.0)},
    ]
    for i, tensors in enumerate(files):
        save_file(tensors, tmp_path / f"{i}.safetensors")
        read = lora_file.read_lora(tmp_path / f"{i}.safetensors", net)
        assert list(read.layers) == [path], i
        assert torch.equal(read.layers[path][0], a)
        assert torch.allclose(read.layers[path][1], b), i
    config = {"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {path: 2}}
    save_file(files[0], tmp_path / "header.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    assert torch.allclose(lora_file.read_lora(tmp_path / "header.safetensors", net).layers[path][1], b / 2)


def test_layers_of_different_ranks_become_one_rank(tmp_path):
    net = unet()
    paths = ["conv_in", "mid_block.attentions.0.proj_in"]
    ranks = dict(zip(paths, (2, 5), strict=True))
    lora = LoRA({p: (torch.randn(r, *net.get_submodule(p).weight.shape[1:]),
                     torch.randn(len(net.get_submodule(p).weight), r, 1, 1)) for p, r in ranks.items()})
    even = lora.at_one_rank()
    assert {len(a) for a, _ in even.layers.values()} == {5}
    assert (output(merged(net, lora)) - output(merged(net, even))).abs().max() < 1e-6
    read = lora_file.read_lora(lora_file.write_kohya(lora, tmp_path / "a.safetensors"), net)
    assert (output(merged(net, lora)) - output(merged(net, read))).abs().max() < 1e-6


def test_the_difference_at_full_rank_is_exact():
    base = unet()
    tuned = shaken(base)
    found = lora_file.difference_lora(base, tuned, 10**6)
    assert found.error == 0
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
        assert found.error == pytest.approx((missed / whole) ** 0.5, rel=1e-5)
        assert found.errors[rank] == found.error
    assert list(found.errors.values()) == sorted(found.errors.values(), reverse=True)


def test_a_lora_student_is_recovered_from_its_difference():
    base, net = unet(), unet()
    _, lora = random_lora(net, rank=3)
    found = lora_file.difference_lora(base, merged(base, lora), 3)
    assert found.error < 1e-5
    assert found.errors[2] > 0.1


def test_what_no_lora_holds_is_reported():
    base = unet()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.conv_in.weight.add_(3.0 / tuned.conv_in.weight.numel() ** 0.5)
        tuned.conv_in.bias.add_(4.0 / tuned.conv_in.bias.numel() ** 0.5)
    found = lora_file.difference_lora(base, tuned, 1)
    assert list(found.lora.layers) == ["conv_in"]
    assert found.error == pytest.approx(0, abs=1e-5)  # a constant has rank one
    assert found.left_out == pytest.approx(4 / 5, rel=1e-5)


def test_bad_files_are_refused_in_one_line(tmp_path):
    net = unet()
    path = "mid_block.attentions.0.proj_in"

    def refused(tensors, message):
        save_file(tensors, tmp_path / "bad.safetensors")
        with pytest.raises(UsageError, match=message):
            lora_file.read_lora(tmp_path / "bad.safetensors", net)

    a, b = torch.zeros(2, 16, 1, 1), torch.zeros(16, 2, 1, 1)
    refused({f"unet.{path}.lora_A.weight": a}, "half of a LoRA: .* lacks its up weight")
    refused({f"unet.{path}.lora_A.weight": torch.zeros(2, 9, 1, 1), f"unet.{path}.lora_B.weight": b}, "another UNet")
    refused({"unet.nowhere.lora_A.weight": a, "unet.nowhere.lora_B.weight": b}, "no layer for unet.nowhere")
    refused({f"lora_unet_{path.replace('.', '_')}.hada_w1_a": a}, "not a plain LoRA")
    refused({"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": a}, "also changes the text encoder")
    refused({f"unet.{path}.alpha": torch.tensor(1.0)}, "holds no LoRA")
    (tmp_path / "a.safetensors").write_bytes(b"not one")
    with pytest.raises(UsageError, match="could not be read as a LoRA"):
        lora_file.read_lora(tmp_path / "a.safetensors", net)
    torch.save({}, tmp_path / "a.ckpt")
    with pytest.raises(UsageError, match="is a pickle"):
        lora_file.read_lora(tmp_path / "a.ckpt", net)
    with pytest.raises(UsageError, match="could not be read"):
        lora_file.read_lora(tmp_path, net)


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
    save_file({k: v.half() for k, v in load_file(file).items()}, file)
    for path, (a, b) in lora_file.read_lora(file, base).layers.items():
        ours = [t.flatten(1) for t in lora.layers[path]]
        assert (b.flatten(1) @ a.flatten(1) - ours[1] @ ours[0]).norm() < 2e-3 * (ours[1] @ ours[0]).norm()
