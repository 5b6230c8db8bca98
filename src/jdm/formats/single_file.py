"""Writes Stable Diffusion's original single-file layout, which ComfyUI and A1111 read.

Tensor names are derived from the model's config, so that every arrangement of blocks the layout can hold is covered.
diffusers' own converters read the files back bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from jdm.errors import UsageError

if TYPE_CHECKING:
    from jdm.models.stable_diffusion import StableDiffusion

Item = TypeVar("Item")
UNET, CONTROLNET, VAE = "model.diffusion_model.", "control_model.", "first_stage_model."
TEXT, TEXTS = "cond_stage_model.", ("conditioner.embedders.0.", "conditioner.embedders.1.")  # one encoder; SDXL's two
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP_LAYER = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
                   "self_attn.out_proj": "attn.out_proj"}
HINT_OUT = 14  # readers expect the hint encoder's last convolution here, for any number of halvings
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
# Sizes that ComfyUI and A1111 recognise: widths of the UNet's levels, and width of the text states it attends to.
SIZES = {((320, 640, 1280, 1280), 768): "SD1.5", ((320, 640, 1280, 1280), 1024): "SD2",
         ((320, 640, 1280), 2048): "SDXL"}


def checkpoint_tensors(model: StableDiffusion) -> dict[str, Tensor]:
    """UNet, autoencoder and text encoders under their single-file names; a ControlNet goes into its own file."""
    tensors = {**unet_tensors(model.unet), **vae_tensors(model.vae)}
    second = model.modules().get("text_encoder_2")
    if second is None:
        return tensors | text_tensors(model.text_encoder)
    return tensors | text_tensors(model.text_encoder, TEXTS[0]) | text_tensors(second, TEXTS[1])


def unet_tensors(unet: nn.Module) -> dict[str, Tensor]:
    """A UNet2DConditionModel's tensors under their single-file names.

    Raises:
        UsageError: the layout has no name for one of its modules.
    """
    return renamed(unet.state_dict(), unet_names(_config(unet)), UNET)


def controlnet_tensors(controlnet: nn.Module) -> dict[str, Tensor]:
    """A ControlNetModel's tensors under their single-file names."""
    return renamed(controlnet.state_dict(), controlnet_names(_config(controlnet)), CONTROLNET)


def vae_tensors(vae: nn.Module) -> dict[str, Tensor]:
    """An AutoencoderKL's tensors under their single-file names; its attention becomes 1x1 convolutions."""
    tensors = renamed(vae.state_dict(), vae_names(_config(vae)), VAE)
    wide = tuple(f".attn_1.{name}.weight" for name in ("q", "k", "v", "proj_out"))
    return {k: v[:, :, None, None] if k.endswith(wide) else v for k, v in tensors.items()}


def text_tensors(text_encoder: nn.Module, prefix: str = TEXT) -> dict[str, Tensor]:
    """A CLIP text model's tensors under their single-file names: OpenAI's CLIP as in SD1.5, OpenCLIP as in SD2.

    OpenCLIP is recognised by its activation. diffusers drops the last layer of SD2's encoder, which no picture
    depends on, so it is missing here too.
    """
    state = {k.removeprefix("text_model."): v for k, v in text_encoder.state_dict().items()
             if not k.endswith("position_ids")}
    if _config(text_encoder)["hidden_act"] == "quick_gelu":
        return {f"{prefix}transformer.text_model.{k}": v for k, v in state.items()}
    layers = {k.split(".")[2] for k in state if k.startswith("encoder.layers.")}
    fused: dict[str, Tensor] = {"positional_embedding": state.pop("embeddings.position_embedding.weight")}
    if "text_projection.weight" in state:
        fused["text_projection"] = state.pop("text_projection.weight").T
    for i in layers:
        for leaf in ("weight", "bias"):
            rows = [state.pop(f"encoder.layers.{i}.self_attn.{part}_proj.{leaf}") for part in "qkv"]
            fused[f"transformer.resblocks.{i}.attn.in_proj_{leaf}"] = torch.cat(rows)
    named = renamed(state, open_clip_names(len(layers)), f"{prefix}model.")
    return named | {f"{prefix}model.{k}": v for k, v in fused.items()}


def open_clip_names(layers: int) -> dict[str, str]:
    """OpenCLIP's path of each CLIP text module, except those that OpenCLIP fuses or transposes."""
    names = {"embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final"}
    for i in range(layers):
        names |= {f"encoder.layers.{i}.{a}": f"transformer.resblocks.{i}.{b}" for a, b in OPEN_CLIP_LAYER.items()}
    return names


def save(tensors: Mapping[str, Tensor], file: Path, **header: str) -> Path:
    """Writes tensors as one safetensors file; `header` is what its header says besides."""
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, file, metadata={"format": "pt", **header})
    return file


def refuse_pickle(path: Path, how: str = "") -> None:
    """Raises UsageError if the path ends like a pickle. `how` is appended: where a safetensors file comes from."""
    if path.suffix.lower() in PICKLES:
        raise UsageError(f"{path} is a pickle, which can run any code when it is read; give the same weights as "
                         f".safetensors{how}")


def known_size(unet: Mapping[str, Any]) -> str | None:
    """The size that ComfyUI and A1111 recognise in a UNet's config, or None."""
    if unet.get("in_channels") != 4 or unet.get("layers_per_block") != 2:
        return None
    return SIZES.get((tuple(unet["block_out_channels"]), unet["cross_attention_dim"]))


def unet_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Single-file path of each module of a UNet2DConditionModel, from its config.

    A module without an entry keeps its name under the path of its nearest ancestor with an entry.
    """
    names, _ = _encoder(config)
    names |= {"conv_norm_out": "out.0", "conv_out": "out.2"}
    kinds, place = config["up_block_types"], 0
    for i, (kind, layers) in enumerate(zip(kinds, reversed(_layers(config)), strict=True)):
        attends = _attends(kind)
        for j in range(layers + 1):
            names |= _resnet(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{place}.0")
            if attends:
                names[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{place}.1"
            place += 1
        if i < len(kinds) - 1:  # it comes after the attention of the level's last block
            names[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{place - 1}.{2 if attends else 1}.conv"
    return names


def controlnet_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Single-file path of each module of a ControlNetModel: a UNet's encoder, a hint encoder, zero convolutions."""
    names, blocks = _encoder(config)
    hint = "controlnet_cond_embedding"
    names |= {f"{hint}.conv_in": "input_hint_block.0", f"{hint}.conv_out": f"input_hint_block.{HINT_OUT}"}
    halvings = 2 * (len(config["conditioning_embedding_out_channels"]) - 1)
    if halvings > HINT_OUT // 2 - 1:
        raise UsageError(f"the single-file layout holds a hint encoder of up to 4 widths, got {halvings // 2 + 1}; "
                         "export a diffusers folder")
    names |= {f"{hint}.blocks.{k}": f"input_hint_block.{2 * k + 2}" for k in range(halvings)}
    names |= {f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(blocks)}
    return names | {"controlnet_mid_block": "middle_block_out.0"}


def vae_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Single-file path of each module of an AutoencoderKL."""
    kinds = {*config["down_block_types"], *config["up_block_types"]} - {"DownEncoderBlock2D", "UpDecoderBlock2D"}
    if kinds:
        raise UsageError(f"the single-file layout has no place for an autoencoder's {sorted(kinds)[0]}; "
                         "export a diffusers folder")
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    last = len(config["block_out_channels"]) - 1
    for side in ("encoder", "decoder"):
        names |= {f"{side}.conv_in": f"{side}.conv_in", f"{side}.conv_norm_out": f"{side}.norm_out",
                  f"{side}.conv_out": f"{side}.conv_out"}
        names |= {f"{side}.mid_block.resnets.{j}": f"{side}.mid.block_{j + 1}" for j in range(2)}
        names |= {f"{side}.mid_block.attentions.0.{a}": f"{side}.mid.attn_1.{b}" for a, b in VAE_ATTENTION.items()}
    for i in range(last + 1):
        for j in range(config["layers_per_block"] + 1):
            for ours, theirs in ((f"encoder.down_blocks.{i}.resnets.{j}", f"encoder.down.{i}.block.{j}"),
                                 (f"decoder.up_blocks.{i}.resnets.{j}", f"decoder.up.{last - i}.block.{j}")):
                names |= {ours: theirs, f"{ours}.conv_shortcut": f"{theirs}.nin_shortcut"}
        names[f"encoder.down_blocks.{i}.downsamplers.0.conv"] = f"encoder.down.{i}.downsample.conv"
        names[f"decoder.up_blocks.{i}.upsamplers.0.conv"] = f"decoder.up.{last - i}.upsample.conv"
    return names


def _encoder(config: Mapping[str, Any]) -> tuple[dict[str, str], int]:
    """Paths of the modules that a UNet and a ControlNet share, and the number of input blocks."""
    names = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
             "conv_in": "input_blocks.0.0"}
    for kind, part in (("class_embed_type", "class_embedding"), ("addition_embed_type", "add_embedding")):
        if config.get(kind) is not None:
            names |= {f"{part}.linear_1": "label_emb.0.0", f"{part}.linear_2": "label_emb.0.2"}
    if config.get("num_class_embeds") is not None:
        names["class_embedding"] = "label_emb"
    kinds, place = config["down_block_types"], 1
    for i, (kind, layers) in enumerate(zip(kinds, _layers(config), strict=True)):
        attends = _attends(kind)
        for j in range(layers):
            names |= _resnet(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{place}.0")
            if attends:
                names[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{place}.1"
            place += 1
        if i < len(kinds) - 1:
            names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{place}.0.op"
            place += 1
    names |= {**_resnet("mid_block.resnets.0", "middle_block.0"), "mid_block.attentions.0": "middle_block.1",
              **_resnet("mid_block.resnets.1", "middle_block.2")}
    return names, place


def _layers(config: Mapping[str, Any]) -> list[int]:
    """Residual blocks per level."""
    layers = config["layers_per_block"]
    return [layers] * len(config["down_block_types"]) if isinstance(layers, int) else list(layers)


def _attends(kind: str) -> bool:
    if kind not in ("DownBlock2D", "UpBlock2D", "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"):
        raise UsageError(f"the single-file layout has no place for a {kind}; export a diffusers folder")
    return kind.startswith("CrossAttn")


def _resnet(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in RESNET.items()}


def renamed(state: Mapping[str, Item], names: Mapping[str, str], prefix: str) -> dict[str, Item]:
    """Renames the keys of `state` by the new paths of their modules.

    Raises:
        UsageError: a module has no new path, or two tensors have the same.
    """
    found: dict[str, Item] = {}
    for key, tensor in state.items():
        above, tail = key, ""
        while above not in names:
            above, _, last = above.rpartition(".")
            tail = f".{last}{tail}"
            if not above:
                raise UsageError(f"the single-file layout has no place for {key}; export a diffusers folder")
        name = f"{prefix}{names[above]}{tail}"
        if name in found:
            raise UsageError(f"the single-file layout has one place for two tensors, {name}; export a diffusers folder")
        found[name] = tensor
    return found


def _config(module: Any) -> Mapping[str, Any]:
    config = module.config
    return config if isinstance(config, Mapping) else config.to_dict()
