"""What is written in the single-file layout, diffusers' own converters read back: every key, every bit."""

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.loaders import single_file_utils as stock
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import tiny
from jdm.errors import UsageError
from jdm.formats import single_file
from jdm.library import load_model
from jdm.models.folder import save_pipeline
from jdm.models.stable_diffusion_xl import StableDiffusionXL

FOUR = {"down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3}
THREE = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
         "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
         "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
         "addition_embed_type": "text_time"}
# As published: runwayml's v1-5, stabilityai's 2-1 and xl-base-1.0.
REAL = {
    "SD1.5": {**FOUR, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8,
              "sample_size": 64},
    "SD2": {**FOUR, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 1024, "sample_size": 96,
            "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    "SDXL": {**THREE, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "sample_size": 128,
             "attention_head_dim": (5, 10, 20), "addition_time_embed_dim": 256,
             "projection_class_embeddings_input_dim": 2816},
}
SMALL = {
    "SD1.5": {"block_out_channels": (8, 16, 16, 16), "cross_attention_dim": 12, "attention_head_dim": 2},
    "SD2": {"block_out_channels": (8, 16, 16, 16), "cross_attention_dim": 12, "attention_head_dim": (1, 2, 4, 4)},
    "SDXL": {"block_out_channels": (8, 16, 16), "cross_attention_dim": 12, "attention_head_dim": (1, 2, 4),
             "transformer_layers_per_block": (1, 2, 3), "addition_time_embed_dim": 4,
             "projection_class_embeddings_input_dim": 36},
}
VAE = {"in_channels": 3, "out_channels": 3, "down_block_types": ("DownEncoderBlock2D",) * 4, "latent_channels": 4,
       "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2}
# One key of each kind, as the original repositories have it; a mapping that is wrong both ways would not have these.
ORIGINAL = {
    "SD1.5": {"input_blocks.0.0.weight": (320, 4, 3, 3), "input_blocks.3.0.op.weight": (320, 320, 3, 3),
              "input_blocks.1.1.proj_in.weight": (320, 320, 1, 1), "input_blocks.11.0.out_layers.3.bias": (1280,),
              "middle_block.1.transformer_blocks.0.attn2.to_k.weight": (1280, 768), "out.2.weight": (4, 320, 3, 3),
              "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3), "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
              "output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1), "time_embed.2.weight": (1280, 1280)},
    "SD2": {"input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
            "input_blocks.1.1.proj_in.weight": (320, 320)},
    "SDXL": {"label_emb.0.0.weight": (1280, 2816), "label_emb.0.2.bias": (1280,),
             "input_blocks.8.1.transformer_blocks.9.attn1.to_q.weight": (1280, 1280),
             "output_blocks.5.2.conv.weight": (640, 640, 3, 3), "middle_block.1.proj_out.weight": (1280, 1280)},
}


def same(ours, theirs):
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())[:5]
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key


def same_shapes(ours, theirs):
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())[:5]
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def small_unet(kind):
    return UNet2DConditionModel(**{**REAL[kind], **SMALL[kind], "norm_num_groups": 4, "sample_size": 8})


def hint(kind):
    return ControlNetModel.from_unet(small_unet(kind), conditioning_embedding_out_channels=(4, 8, 8, 8))


@pytest.mark.parametrize("kind", REAL)
def test_a_unet_comes_back_bit_for_bit(kind):
    unet = small_unet(kind)
    same(unet.state_dict(), stock.convert_ldm_unet_checkpoint(single_file.unet_tensors(unet), dict(unet.config)))


@pytest.mark.parametrize("kind", REAL)
def test_real_unets_have_the_original_names(kind):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**REAL[kind])
    tensors = single_file.unet_tensors(unet)
    same_shapes(unet.state_dict(), stock.convert_ldm_unet_checkpoint(tensors, dict(unet.config)))
    assert {k: tuple(tensors[f"model.diffusion_model.{k}"].shape) for k in ORIGINAL[kind]} == ORIGINAL[kind]
    assert len(tensors) == {"SD1.5": 686, "SD2": 686, "SDXL": 1680}[kind]
    assert single_file.known_size(unet.config) == kind


@pytest.mark.parametrize("kind", ["SD1.5", "SD2"])
def test_a_controlnet_comes_back_bit_for_bit(kind):
    net = hint(kind)
    for parameter in net.parameters():  # its zero convolutions would hide one taken for another
        torch.nn.init.normal_(parameter)
    same(net.state_dict(), stock.convert_controlnet_checkpoint(single_file.controlnet_tensors(net), dict(net.config)))


def test_real_controlnets_have_the_original_names():
    with torch.device("meta"):
        net = ControlNetModel.from_unet(UNet2DConditionModel(**REAL["SD1.5"]), load_weights_from_unet=False)
    tensors = single_file.controlnet_tensors(net)
    same_shapes(net.state_dict(), stock.convert_controlnet_checkpoint(tensors, dict(net.config)))
    assert len(tensors) == 340
    for key, shape in {"input_hint_block.0.weight": (16, 3, 3, 3), "input_hint_block.14.weight": (320, 256, 3, 3),
                       "zero_convs.11.0.weight": (1280, 1280, 1, 1), "middle_block_out.0.bias": (1280,)}.items():
        assert tuple(tensors[f"control_model.{key}"].shape) == shape


def test_an_sdxl_controlnet_survives_the_round_trip():
    """Its converter passes over the embedding of size and crop; the name is the UNet's, which the readers share."""
    net = hint("SDXL")
    tensors = single_file.controlnet_tensors(net)
    back = stock.convert_controlnet_checkpoint(tensors, dict(net.config))
    state = net.state_dict()
    back |= {f"add_embedding.linear_{i + 1}.{leaf}": tensors[f"control_model.label_emb.0.{2 * i}.{leaf}"]
             for i in range(2) for leaf in ("weight", "bias")}
    same(state, back)


@pytest.mark.parametrize("attention", [True, False])
def test_an_autoencoder_comes_back_bit_for_bit(attention):
    vae = AutoencoderKL(**VAE, block_out_channels=(4, 8, 8, 8), norm_num_groups=4, mid_block_add_attention=attention)
    same(vae.state_dict(), stock.convert_ldm_vae_checkpoint(single_file.vae_tensors(vae), dict(vae.config)))


def test_real_autoencoders_have_the_original_names():
    with torch.device("meta"):
        vae = AutoencoderKL(**VAE, block_out_channels=(128, 256, 512, 512))
    tensors = single_file.vae_tensors(vae)
    same_shapes(vae.state_dict(), stock.convert_ldm_vae_checkpoint(tensors, dict(vae.config)))
    assert len(tensors) == 248
    for key, shape in {"encoder.mid.attn_1.q.weight": (512, 512, 1, 1), "decoder.up.3.block.0.conv1.bias": (512,),
                       "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1), "quant_conv.bias": (8,),
                       "decoder.up.1.upsample.conv.bias": (256,), "decoder.norm_out.weight": (128,)}.items():
        assert tuple(tensors[f"first_stage_model.{key}"].shape) == shape


def text_model(kind=CLIPTextModel, **changes):
    return kind(CLIPTextConfig(**{"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
                                  "num_attention_heads": 2, "max_position_embeddings": 7, **changes}))


def bare(state):
    """Whether transformers wraps a text model is a matter of its version."""
    return {k.removeprefix("text_model."): v for k, v in state.items()}


def test_openai_clip_comes_back_bit_for_bit():
    text = text_model()
    tensors = single_file.text_tensors(text)
    assert "cond_stage_model.transformer.text_model.encoder.layers.2.self_attn.q_proj.weight" in tensors
    same(bare(text.state_dict()), bare(stock.convert_ldm_clip_checkpoint(tensors)))


def test_open_clip_comes_back_bit_for_bit():
    text = text_model(hidden_act="gelu")
    tensors = single_file.text_tensors(text)
    assert tensors["cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"].shape == (48, 16)
    same(bare(text.state_dict()), bare(stock.convert_open_clip_checkpoint(text, tensors)))


def test_projected_open_clip_comes_back_bit_for_bit():
    text = text_model(CLIPTextModelWithProjection, hidden_act="gelu", projection_dim=16)
    tensors = single_file.text_tensors(text, single_file.TEXTS[1])
    assert "conditioner.embedders.1.model.positional_embedding" in tensors  # how SDXL is told
    back = stock.convert_open_clip_checkpoint(text, tensors, prefix="conditioner.embedders.1.model.")
    same(bare(text.state_dict()), bare(back))


def test_sd2s_text_model_has_the_original_names():
    with torch.device("meta"):
        text = text_model(hidden_act="gelu", hidden_size=1024, intermediate_size=4096, num_hidden_layers=23,
                          num_attention_heads=16, vocab_size=49408, max_position_embeddings=77)
    tensors = single_file.text_tensors(text)
    assert tensors["cond_stage_model.model.positional_embedding"].shape == (77, 1024)
    assert tensors["cond_stage_model.model.transformer.resblocks.22.mlp.c_fc.weight"].shape == (4096, 1024)
    assert len(tensors) == 23 * 12 + 4  # OpenCLIP's own file has a 24th layer, its projection and its temperature


def test_the_shipped_student_comes_back_bit_for_bit(tmp_path):
    model = load_model("nano-canny")
    checkpoint = load_file(single_file.save(single_file.checkpoint_tensors(model), tmp_path / "whole.safetensors"))
    hints = load_file(single_file.save(single_file.controlnet_tensors(model.controlnet), tmp_path / "hint.safetensors"))
    same(model.unet.state_dict(), stock.convert_ldm_unet_checkpoint(checkpoint, dict(model.unet.config)))
    same(model.vae.state_dict(), stock.convert_ldm_vae_checkpoint(checkpoint, dict(model.vae.config)))
    same(bare(model.text_encoder.state_dict()), bare(stock.convert_ldm_clip_checkpoint(checkpoint)))
    same(model.controlnet.state_dict(), stock.convert_controlnet_checkpoint(hints, dict(model.controlnet.config)))
    assert single_file.known_size(model.unet.config) is None


def test_stock_diffusers_draws_the_same_from_files(student, tmp_path):
    model = load_model(str(student))
    whole = single_file.save(single_file.checkpoint_tensors(model), tmp_path / "whole.safetensors")
    hints = single_file.save(single_file.controlnet_tensors(model.controlnet), tmp_path / "hint.safetensors")
    net = ControlNetModel.from_single_file(str(hints), config=str(student), subfolder="controlnet")
    kind = diffusers.StableDiffusionControlNetPipeline
    from_files = kind.from_single_file(str(whole), config=str(student), controlnet=net)
    from_folder = kind.from_pretrained(student)
    control = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    z = torch.randn(model.latent_shape(2, 32), generator=torch.Generator().manual_seed(1))
    pictures = [pipe(["a coat", ""], image=control, latents=z.clone(), num_inference_steps=1, guidance_scale=1.0,
                     output_type="pt").images for pipe in (from_files, from_folder)]
    assert torch.equal(*pictures)


def test_stock_diffusers_reads_a_whole_sdxl_checkpoint(tmp_path):
    """Two text encoders, told apart by their widths as the real ones are."""
    model = tiny.model()
    second = text_model(CLIPTextModelWithProjection, hidden_act="gelu", projection_dim=12, max_position_embeddings=16,
                        vocab_size=len(model.tokenizer))
    whole = StableDiffusionXL(small_unet("SDXL"), model.vae, model.text_encoder, model.tokenizer, model.scheduler,
                              None, None, second, model.tokenizer)
    folder = save_pipeline(whole, tmp_path / "folder")
    file = single_file.save(single_file.checkpoint_tensors(whole), tmp_path / "whole.safetensors")
    pipe = diffusers.StableDiffusionXLPipeline.from_single_file(str(file), config=str(folder))
    for name, module in whole.modules().items():
        same(module.state_dict(), getattr(pipe, name).state_dict())


def test_parts_without_a_place_are_refused_by_name():
    unet = small_unet("SD1.5")
    unet.add_module("extra", torch.nn.Linear(2, 2))
    with pytest.raises(UsageError, match=r"no place for extra\.weight"):
        single_file.unet_tensors(unet)
    with pytest.raises(UsageError, match="no place for a KDownBlock2D"):
        single_file.unet_names({**dict(small_unet("SD1.5").config), "down_block_types": ["KDownBlock2D"] * 4})
    with pytest.raises(UsageError, match="no place for an autoencoder's AttnDownEncoderBlock2D"):
        single_file.vae_names({**dict(tiny.model().vae.config), "down_block_types": ["AttnDownEncoderBlock2D"] * 3})
