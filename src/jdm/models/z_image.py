"""Z-Image: a flow-matching transformer of one stream, which reads prompts as a chat with Qwen3."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import diffusers
import torch
from diffusers import AutoencoderKL, ZImageControlNetModel, ZImageTransformer2DModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2Tokenizer, Qwen3Model

from jdm.errors import UsageError
from jdm.models.adapters import Adapter, without_adapters
from jdm.models.flow import FlowModel, TransformerDenoiser, told_size
from jdm.models.folder import whole_network
from jdm.models.schedulers import evenly_spaced
from jdm.models.stock import Part
from jdm.models.text import TextEncoder, whole_tokenizer
from jdm.score import Prompts, Text
from jdm.size import Size

SHARE = 5  # a new ControlNet has one block for so many of the transformer's, as the public union ControlNets have
TOKENS = 512  # of a prompt at most, with the chat around it, as in the stock pipeline
# What a ControlNet uses of its transformer: networks, and parameters that stand for missing tokens.
NETWORKS = ("t_embedder", "all_x_embedder", "cap_embedder", "noise_refiner", "context_refiner")
PADS, PLAIN = ("x_pad_token", "cap_pad_token"), ("t_scale", "rope_embedder")


class ZImageDenoiser(TransformerDenoiser):
    """A ZImageTransformer2DModel and ZImageControlNetModels as one denoiser; its output is the velocity eps - x0.

    The networks put out x0 - eps, at times that run from 0, noise, to 1, clean.
    """

    def _denoised(self, x_t: Tensor, timestep: Tensor, text: Text, control: Tensor | None) -> Tensor:
        assert isinstance(text, tuple)
        captions = [states[:n] for states, n in zip(text[0], text[1]["lengths"].tolist(), strict=True)]
        told = list(x_t.contiguous().unsqueeze(2)), (1000 - timestep) / 1000, captions
        hints: dict[int, Tensor] = {}
        for net, raw, strength in zip(self.controlnets, self.latents_of(control) if control is not None else [],
                                      self.strengths, strict=False):
            shown = (raw.to(x_t) - self.shift) * self.scale
            more = cast(Any, net).config["control_in_dim"] - shown.shape[1]  # of models that also take a mask
            shown = functional.pad(shown, (0, 0, 0, 0, 0, more)).unsqueeze(2)
            with borrowed(cast(Any, net), self.backbone, self.autocast or x_t.dtype):
                found = net(*told, list(shown), conditioning_scale=strength)
            hints = {k: hints[k] + hint if k in hints else hint for k, hint in found.items()} | {
                k: hint for k, hint in hints.items() if k not in found}
        velocity = self.backbone(*told, controlnet_block_samples=hints or None, return_dict=False)[0]
        return -torch.stack(velocity).squeeze(2)

    def blocks(self, net: nn.Module) -> list[nn.Module]:
        if isinstance(net, ZImageControlNetModel):
            return [*net.control_layers, *(net.control_noise_refiner or ())]
        own = cast(Any, net)
        return [*own.noise_refiner, *own.context_refiner, *own.layers, own.t_embedder, *own.all_x_embedder.values(),
                own.cap_embedder]

    def feature_layers(self) -> list[nn.Module]:
        return self.spread(cast(Any, self.backbone).layers)


def trainable(net: Any) -> Any:
    """The ControlNet, with the attribute that diffusers 0.42 reads in its forward and does not set."""
    net.gradient_checkpointing = False
    return net


@contextmanager
def borrowed(net: ZImageControlNetModel, backbone: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Context in which a ControlNet uses parts of a transformer, as in its stock pipeline, without owning them.

    The tokens that fill a sequence up learn from the transformer's own pass alone.
    """
    def whole(pad: Tensor) -> Tensor:
        return (pad.full_tensor() if isinstance(pad, DTensor) else pad).detach().to(dtype)

    parts = {name: getattr(backbone, name) for name in (*NETWORKS, *PLAIN)}
    net.__dict__.update(parts | {name: whole(getattr(backbone, name)) for name in PADS})
    try:
        yield
    finally:
        net.__dict__.update(dict.fromkeys((*NETWORKS, *PLAIN, *PADS)))


class ChatTextEncoder(TextEncoder):
    """Prompts -> (hidden states [B, L, D] of Qwen3, filled up with zeros, {lengths [B]}).

    Args:
        tokens: most tokens of a prompt with the chat around it; what is longer is cut off.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, tokens: int, one_by_one: bool = False):
        super().__init__(model, tokenizer, one_by_one=one_by_one)
        self.tokens = tokens

    def encode(self, prompts: Prompts) -> list[Tensor]:
        """The states [L, D] of each prompt, of its own length."""
        chats = [self.tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                                    add_generation_prompt=True, enable_thinking=True)
                 for prompt in prompts]
        found = self.tokenizer(chats, padding="longest", truncation=True, max_length=self.tokens, return_tensors="pt")
        device = next(self.model.parameters()).device
        output: Any = self.model(input_ids=found.input_ids.to(device), attention_mask=found.attention_mask.to(device),
                                 output_hidden_states=True)
        lengths = found.attention_mask.sum(1).tolist()
        return [states[:n] for states, n in zip(output.hidden_states[-2], lengths, strict=True)]

    def kept(self, row: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return functional.pad(row, (0, 0, 0, self.tokens - len(row))), torch.tensor(len(row))

    def read(self, parts: tuple[Tensor, ...]) -> Tensor:
        return parts[0][: int(parts[1])]

    def stacked(self, rows: list[Any]) -> Text:
        return pad_sequence(rows, batch_first=True), {"lengths": torch.tensor([len(row) for row in rows])}


@dataclass(frozen=True)
class ZImage(FlowModel):
    """The parts of a Z-Image folder, in float32, frozen and in eval mode; a `Family`.

    Attributes:
        pixels: size of the pictures, where it is not the stock pipeline's 1024.
    """

    NAME: ClassVar[str] = "Z-Image"
    PARTS: ClassVar[dict[str, Part]] = {
        "transformer": Part.of(ZImageTransformer2DModel), "vae": Part.of(AutoencoderKL),
        "text_encoder": Part.of(Qwen3Model, also=("Qwen3ForCausalLM",)),
        "tokenizer": Part(("Qwen2Tokenizer", "Qwen2TokenizerFast"),
                          lambda path, part: whole_tokenizer(path, part, Qwen2Tokenizer)),
        "controlnet": Part(("ZImageControlNetModel",), lambda path, part: trainable(whole_network(
            ZImageControlNetModel, path, part)), lambda config: trainable(ZImageControlNetModel.from_config(config)),
            needed=False, kind=ZImageControlNetModel)}
    PIPELINES: ClassVar[tuple[str, str]] = ("ZImagePipeline", "ZImageControlNetPipeline")
    SHARED: ClassVar[tuple[str, ...]] = ("dim", "n_heads", "all_patch_size")
    STEPS: ClassVar[int] = 8
    # Attention and feed-forward.
    lora_targets: ClassVar[tuple[str, ...]] = (
        "attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0", "feed_forward.w1",
        "feed_forward.w2", "feed_forward.w3")

    transformer: ZImageTransformer2DModel
    vae: AutoencoderKL
    text_encoder: Qwen3Model
    tokenizer: Any
    scheduler: dict
    controlnet: ZImageControlNetModel | None = None
    card: dict | None = None
    pixels: Size | None = None

    def _refuse_widths(self, path: str) -> None:
        read, written = self.transformer.config["cap_feat_dim"], self.text_encoder.config.hidden_size
        if read != written:
            raise UsageError(f"{path}: the transformer reads text states of width {read}, its text encoder writes "
                             f"{written}; put back the text encoder it was trained with")
        if self.vae.config.get("shift_factor") is None:
            raise UsageError(f"{path}: its autoencoder's config names no shift_factor, which Z-Image's pipelines need; "
                             "put back its own autoencoder")

    def _refuse_tokenizers(self, path: str) -> None:
        words, rows = len(self.tokenizer), self.text_encoder.config.vocab_size
        if words > rows or not getattr(self.tokenizer, "chat_template", None):
            what = f"knows {words} words, its text encoder {rows}" if words > rows else "has no chat template"
            raise UsageError(f"{path}: the tokenizer {what}; put back the tokenizer it was trained with")

    @property
    def patch(self) -> int:
        return 2  # of the several that a transformer may know, the stock pipeline's

    @property
    def _own_size(self) -> Size:
        return 1024

    def text(self, one_by_one: bool = False) -> TextEncoder:
        return ChatTextEncoder(self.text_encoder, self.tokenizer, TOKENS, one_by_one=one_by_one)

    def denoiser(self, backbone: nn.Module | None = None, controlnet: nn.Module | None = None,
                 adapters: Sequence[Adapter] = (), also: Sequence[nn.Module] = ()) -> ZImageDenoiser:
        return ZImageDenoiser(self, backbone, controlnet, also, adapters)

    def new_controlnet(self, backbone: nn.Module | None = None) -> ZImageControlNetModel:
        """A ControlNet of every SHARE-th block of the transformer, with zero projections (JDM Eq. 10)."""
        net = cast(ZImageTransformer2DModel, backbone or self.transformer)
        config = dict(net.config)
        places = list(range(0, config["n_layers"], SHARE))
        shared = ("all_patch_size", "all_f_patch_size", "dim", "n_refiner_layers", "n_heads", "n_kv_heads", "norm_eps",
                  "qk_norm")
        made = ZImageControlNetModel(control_layers_places=places, control_in_dim=config["in_channels"],
                                     **{key: config[key] for key in shared})
        plain = without_adapters(net.state_dict())
        state = {f"control_{key}": value for key, value in plain.items()
                 if key.startswith(("noise_refiner.", "all_x_embedder."))}
        for i, place in enumerate(places):
            state |= {key.replace(f"layers.{place}.", f"control_layers.{i}.", 1): value for key, value in plain.items()
                      if key.startswith(f"layers.{place}.")}
        missing, unexpected = made.load_state_dict(state, strict=False)
        assert not unexpected, unexpected
        assert all(".before_proj." in key or ".after_proj." in key for key in missing), missing
        return trainable(made.float())

    def pipeline(self, scheduler: Any) -> diffusers.DiffusionPipeline:
        """The stock pipeline, whose ControlNet uses the transformer's parts and does not hold them twice."""
        if self.controlnet is None:
            return super().pipeline(scheduler)
        net = copy.copy(self.controlnet)
        net._modules, net._parameters = dict(net._modules), dict(net._parameters)
        pipe: Any = super(ZImage, self.with_parts(controlnet=net)).pipeline(scheduler)
        for name in (*NETWORKS, *PADS):
            net.__dict__[name] = (net._modules if name in NETWORKS else net._parameters).pop(name)
        return pipe

    @classmethod
    def _spacing(cls, steps: int) -> dict[str, Any]:
        return {"sigmas": torch.linspace(1.0, 1 / steps, steps).tolist()}

    @staticmethod
    def asked(levels: Sequence[int] | None, guidance: float, n: int, controlled: bool = False,
              size: Size | None = None) -> dict[str, Any]:
        """The pipeline's guidance is w - 1, and 0 is none."""
        steps: dict[str, Any] = {"num_inference_steps": len(levels) if levels else 50}
        if levels and not (levels[0] == n - 1 and evenly_spaced(levels)):  # sigmas before the shift
            steps["sigmas"] = [(level + 1) / n for level in levels]
        scale = {"controlnet_conditioning_scale": 1.0} if controlled else {}
        return {**steps, "guidance_scale": guidance - 1, **scale, **told_size(size)}
