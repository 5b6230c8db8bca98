"""Stable-Diffusion-format models: a diffusers folder in, score models and generators out.

The home of diffusers' networks and pipelines. No branch on a model's size or name.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, cast

import diffusers
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from jdm.errors import RunError, UsageError
from jdm.generator import Generator
from jdm.models.adapters import Adapter, merged, switched_on, without_adapters
from jdm.models.execution import computing
from jdm.models.text import TextEncoder
from jdm.schedule import NoiseSchedule
from jdm.score import Prediction, ScoreModel, Text
from jdm.size import Size, height_width, sized, spelled
from jdm.space import Space, channels_last

ENCODER = ("conv_in.", "time_embedding.", "add_embedding.", "class_embedding.", "down_blocks.", "mid_block.")
CARD = "jdm.json"  # what a stock pipeline ignores: method, control, steps, provenance
Module = TypeVar("Module", bound=nn.Module)


class Denoiser(nn.Module):
    """A UNet, alone or with ControlNets: (x_t, index, text, control) -> output like x_t.

    Adapters are part of its function, and of no other that shares the UNet; autocast is the type it computes in.
    Several ControlNets add their residuals, each times its strength; their control images come side by side along the
    channels, [B, 3 k, H, W].
    """

    def __init__(self, unet: nn.Module, controlnet: nn.Module | None = None, also: Sequence[nn.Module] = (),
                 adapters: Sequence[Adapter] = ()):
        super().__init__()
        self.unet, self.controlnet, self.also = unet, controlnet, nn.ModuleList(also)
        self.strengths = [1.0] * (1 + len(also))
        self.adapters, self.autocast = tuple(adapters), None

    adapters: tuple[Adapter, ...]
    autocast: torch.dtype | None

    def forward(self, x_t: Tensor, index: Tensor, text: Text, control: Tensor | None = None) -> Tensor:
        with switched_on(self.adapters), computing(x_t.device, self.autocast):
            shown = None if control is None else channels_last(control)
            return self._denoised(channels_last(x_t), index, text, shown).contiguous()

    def _denoised(self, x_t: Tensor, index: Tensor, text: Text, control: Tensor | None) -> Tensor:
        states, added = (text, None) if isinstance(text, Tensor) else text
        told: dict[str, Any] = {"encoder_hidden_states": states, "added_cond_kwargs": added, "return_dict": False}
        if self.controlnet is None or control is None:
            return self.unet(x_t, index, **told)[0]
        nets = [self.controlnet, *self.also]
        images = control.split(3, dim=1) if self.also else [control]
        sums: list[Tensor] = []
        for net, image, strength in zip(nets, images, self.strengths, strict=True):
            down, mid = net(x_t, index, controlnet_cond=image, conditioning_scale=strength, **told)
            sums = [a + b for a, b in zip(sums, [*down, mid], strict=True)] if sums else [*down, mid]
        return self.unet(x_t, index, down_block_additional_residuals=tuple(sums[:-1]),
                         mid_block_additional_residual=sums[-1], **told)[0]


@dataclass(frozen=True)
class StableDiffusion:
    """The parts of a Stable-Diffusion-format folder, in float32, frozen and in eval mode."""

    NAME: ClassVar[str] = "Stable-Diffusion-format"
    PARTS: ClassVar[tuple[str, ...]] = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: dict
    controlnet: ControlNetModel | None = None
    card: dict | None = None

    @classmethod
    def load(cls, path: str, controlnet: str | None = None) -> Self:
        """From a diffusers folder or hub id; `controlnet` adds one from its own folder.

        Raises:
            UsageError: the folder is no Stable-Diffusion-format model.
        """
        index = model_index(path)
        missing = [p for p in cls.PARTS if p not in index]
        if missing:
            raise UsageError(f"{path} is no {cls.NAME} model: it lacks {', '.join(missing)}")
        has_own = index.get("controlnet", [None])[0] is not None
        try:
            control = (whole_network(ControlNetModel, controlnet) if controlnet else
                       whole_network(ControlNetModel, path, "controlnet") if has_own else None)
            model = cls(
                whole_network(UNet2DConditionModel, path, "unet"),
                whole_network(AutoencoderKL, path, "vae"),
                whole_network(CLIPTextModel, path, "text_encoder"),
                CLIPTokenizer.from_pretrained(path, subfolder="tokenizer"),
                _json(path, "scheduler/scheduler_config.json") or {},
                control,
                _json(path, CARD),
                **cls._more(path, index),
            )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise UsageError(f"{path} could not be loaded as a {cls.NAME} model: "
                             f"{(str(error).splitlines() or [type(error).__name__])[0][:200]}") from None
        for part in model.modules().values():
            part.float().eval().requires_grad_(False)
        model._refuse_misfits(path)
        return model

    def _refuse_misfits(self, path: str) -> None:
        """UsageError where the parts were made for different models: their shapes or levels would be wrong."""
        read, written = self.unet.config["cross_attention_dim"], self._text_width
        if read != written:
            raise UsageError(f"{path}: the UNet reads text states of width {read}, its text encoder writes {written}; "
                             "put back the text encoder it was trained with")
        taken, latents = self.unet.config["in_channels"], self.vae.config["latent_channels"]
        if taken != latents:
            raise UsageError(f"{path}: the UNet takes {taken} channels, its autoencoder writes latents of {latents}; "
                             "put back its own autoencoder (inpainting and image-editing UNets cannot be teachers)")
        if self.scheduler.get("rescale_betas_zero_snr"):
            raise UsageError(f"{path}: its schedule ends without signal (rescale_betas_zero_snr), where no x0 can be "
                             "read; use a model without it")

    @property
    def _text_width(self) -> int:
        """Of the hidden states that the UNet reads."""
        return self.text_encoder.config.hidden_size

    @classmethod
    def _more(cls, path: str, index: dict) -> dict[str, Any]:
        """Further fields of another family's folder."""
        return {}

    def modules(self) -> dict[str, nn.Module]:
        parts = {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder,
                 "controlnet": self.controlnet}
        return {k: v for k, v in parts.items() if v is not None}

    def to(self, device: torch.device | str) -> StableDiffusion:
        for part in self.modules().values():
            part.to(device)
        return self

    @property
    def schedule(self) -> NoiseSchedule:
        """The scheduler's levels: from its trained_betas, or its beta ramp."""
        return NoiseSchedule(alphas_cumprod(self.scheduler))

    @property
    def prediction(self) -> Prediction:
        return self.scheduler.get("prediction_type", "epsilon")

    @property
    def one_step(self) -> bool:
        """Exported by this project to answer in one step."""
        return (self.card or {}).get("kind") == "one-step"

    @property
    def space(self) -> Space:
        return Space(self.vae)

    @property
    def downscale(self) -> int:
        """Pixels per latent, along one side."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    def latent_shape(self, n: int, size: Size) -> tuple[int, int, int, int]:
        height, width = height_width(size)
        if min(height, width) < 1 or height % self.downscale or width % self.downscale:
            raise UsageError(f"both sides of a picture must be multiples of {self.downscale}, got {spelled(size)}")
        return n, self.unet.config["in_channels"], height // self.downscale, width // self.downscale

    @property
    def size(self) -> Size:
        """Of the pictures the model was trained on, in pixels."""
        return sized([side * self.downscale for side in height_width(self.unet.config["sample_size"])])

    def at(self, size: Size) -> Self:
        """The same weights, saying another picture size: what pipelines draw where none is asked for."""
        unet = copy.copy(self.unet)  # the weights are shared, the config is not
        unet.register_to_config(sample_size=sized(self.latent_shape(1, size)[2:]))
        return self if size == self.size else self.with_parts(unet=unet)

    def text(self, one_by_one: bool = False) -> TextEncoder:
        """A family that tells its UNet the pictures' size tells it this model's."""
        return TextEncoder(self.text_encoder, self.tokenizer, one_by_one=one_by_one)

    def pipeline(self, scheduler: Any) -> diffusers.DiffusionPipeline:
        """The stock pipeline of these parts."""
        kind = diffusers.StableDiffusionPipeline if self.controlnet is None else \
            diffusers.StableDiffusionControlNetPipeline
        parts: dict[str, Any] = {**self.modules(), "safety_checker": None, "feature_extractor": None}
        return kind(**parts, tokenizer=self.tokenizer, scheduler=scheduler, requires_safety_checker=False)

    def score(self, text: TextEncoder, unet: nn.Module | None = None, guidance: float = 1.0) -> ScoreModel:
        """The score of this model, or of another UNet of its kind."""
        return self.score_of(text, Denoiser(unet or self.unet), guidance)

    def score_of(self, text: TextEncoder, net: Denoiser, guidance: float = 1.0) -> ScoreModel[Denoiser]:
        """The score that a denoiser of this model's kind estimates."""
        return ScoreModel(net, self.schedule, self.prediction, text, guidance)

    def generator(self, text: TextEncoder, net: nn.Module | None = None, t_init: int | None = None) -> Generator:
        """One step at `t_init`; for an exported one-step folder that is its scheduler's last level."""
        t_init = self.schedule.n - 1 if t_init is None else t_init
        if not 0 <= t_init < self.schedule.n:
            raise UsageError(f"t_init must be in 0..{self.schedule.n - 1}, got {t_init}")
        return Generator(net or Denoiser(self.unet, self.controlnet), self.schedule, t_init, text, self.prediction)

    def with_parts(self, **parts) -> Self:
        return replace(self, **parts)


def save_pipeline(
    model: StableDiffusion, folder: Path, scheduler: dict | None = None, card: dict | None = None
) -> Path:
    """Write a folder that stock diffusers loads; whole or not at all.

    Args:
        scheduler: a diffusers scheduler config in place of the model's own, e.g. `one_step_scheduler`'s.
        card: what this project knows of the model; kept in jdm.json, which stock diffusers ignores.
    """
    config = scheduler or model.scheduler
    kinds = {"DDIMScheduler": diffusers.DDIMScheduler, "PNDMScheduler": diffusers.PNDMScheduler}
    kind = kinds.get(config.get("_class_name", ""), diffusers.DDIMScheduler)
    whole = model.pipeline(kind.from_config(config))
    draft = folder.with_name(f".{folder.name}.draft")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        whole.save_pretrained(draft)
        for config in draft.rglob("*.json"):
            _forget_place(config)
        if card is not None:
            (draft / CARD).write_text(json.dumps(card, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise RunError(f"{folder} could not be written ({error}); free some space and run again") from None
    return folder


def _forget_place(config: Path) -> None:
    """Drop where a part was loaded from: a path of the machine that trained it."""
    values = json.loads(config.read_text(encoding="utf-8"))
    if isinstance(values, dict) and values.pop("_name_or_path", None) is not None:
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def model_index(path: str) -> dict:
    """model_index.json of a diffusers folder or hub id.

    Raises:
        UsageError: there is none.
    """
    if not Path(path).is_dir() and (path.count("/") != 1 or path.startswith(".")):
        raise UsageError(f"{path}: no such folder; give a diffusers folder, a .safetensors checkpoint, a hub id "
                         "(owner/name), or a shipped one, such as nano-sd or nano-canny")
    index = _json(path, "model_index.json")
    if index is None:
        raise UsageError(f"{path} is no model: model_index.json is missing; a diffusers folder has one at its top")
    return index


def alphas_cumprod(scheduler: dict) -> Tensor:
    """alpha_t^2 of each level, from a diffusers scheduler config."""
    return _levels(scheduler).alphas_cumprod


def one_step_scheduler(scheduler: dict, t_init: int) -> dict:
    """A DDIM config whose single step is the one-step generator at level index `t_init`."""
    betas = _levels(scheduler).betas
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": t_init + 1,
        "trained_betas": [float(b) for b in betas[: t_init + 1]],
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "clip_sample": False,
        "steps_offset": 0,
        "prediction_type": scheduler.get("prediction_type", "epsilon"),
    }


def ddim_scheduler(scheduler: dict) -> diffusers.DDIMScheduler:
    """A DDIM sampler on a scheduler config's levels."""
    return cast(diffusers.DDIMScheduler, diffusers.DDIMScheduler.from_config(scheduler))


def _levels(scheduler: dict) -> DDPMScheduler:
    kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    return cast(DDPMScheduler, DDPMScheduler.from_config({k: scheduler[k] for k in kept if k in scheduler}))


def new_controlnet(unet: UNet2DConditionModel, downscale: int) -> ControlNetModel:
    """A ControlNet that starts as the UNet's encoder, with zero convolutions (JDM Eq. 10).

    Its hint encoder halves a full-size control map until it meets the latent side.
    """
    halvings = downscale.bit_length() - 1
    widths = (16, 32, 96, 256)[: halvings + 1]
    if unet.config["block_out_channels"][0] < 256:  # a small UNet has a small hint encoder
        widths = (8, 16, 32, 64)[: halvings + 1]
    net = ControlNetModel.from_unet(unet, conditioning_channels=3, conditioning_embedding_out_channels=widths,
                                    load_weights_from_unet=False)
    plain = without_adapters(unet.state_dict())
    missing, _ = net.load_state_dict({k: v for k, v in plain.items() if k.startswith(ENCODER)}, strict=False)
    assert all(key.startswith("controlnet_") for key in missing), missing  # zero convolutions and the hint encoder
    return net.float()


def with_merged(unet: UNet2DConditionModel, adapter: Adapter | None) -> UNet2DConditionModel:
    """A float32 copy of a UNet that carries adapters: without them, or with one merged into its weights."""
    plain = cast(UNet2DConditionModel, UNet2DConditionModel.from_config(dict(unet.config)))
    state = merged(unet, adapter) if adapter else without_adapters(unet.state_dict())
    plain.load_state_dict({key: value.float() for key, value in state.items()})
    return placed(plain, unet.device).eval().requires_grad_(False)


def lone_controlnet(folder: Path) -> ControlNetModel:
    """A ControlNet from a folder of its own, in float32, frozen.

    Raises:
        UsageError: it is no ControlNet's.
    """
    try:
        return whole_network(ControlNetModel, str(folder)).float().eval().requires_grad_(False)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"{folder} is no ControlNet ({(str(error).splitlines() or [''])[0][:120]})") from None


def whole_network(kind: type[Module], path: str, subfolder: str | None = None) -> Module:
    """A network from its folder, none of its weights left at random; ValueError where some are missing.

    diffusers and transformers only log a warning there.
    """
    loader = cast(Any, kind)
    extra = {} if subfolder is None else {"subfolder": subfolder}
    net, info = loader.from_pretrained(path, output_loading_info=True, **extra)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{len(missing)} weights of the {kind.__name__} are missing, {missing[0]} first")
    return net


def placed(module: Module, device: torch.device | str) -> Module:
    """The module itself, on the device."""
    nn.Module.to(module, device)
    return module


def copied(module: nn.Module) -> nn.Module:
    """A trainable float32 copy."""
    return copy.deepcopy(module).float().requires_grad_(True)


def _json(path: str, name: str) -> dict | None:
    file = Path(path) / name
    if not Path(path).is_dir():
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(path, name))
        except Exception:
            return None
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{file} is not JSON ({error}); fetch the model again") from None
