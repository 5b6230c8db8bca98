"""The protocol of a family of models. A family is one file: it reads a folder and makes scores and generators of it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, Self, TypeVar, cast

import diffusers
import torch
from torch import Tensor, nn

from jdm.generator import Generator
from jdm.models.adapters import Adapter, merged, switched_on, without_adapters
from jdm.models.execution import computing
from jdm.models.text import TextEncoder
from jdm.schedule import NoiseSchedule
from jdm.score import Estimate, Prediction, ScoreModel, Text
from jdm.size import Size
from jdm.space import Space

Module = TypeVar("Module", bound=nn.Module)


class Denoiser(nn.Module, ABC):
    """A backbone, alone or with ControlNets: (x_t, timestep, text, control) -> output like x_t. Families subclass it.

    Args:
        also: further ControlNets. All of them add their residuals, each times its strength; their control images come
            side by side along the channels, [B, 3 k, H, W].
        adapters: LoRAs of the backbone that are part of this function, and of no other that shares the backbone.

    Attributes:
        strengths: one for each ControlNet, `controlnet` first; 1 at the start.
        autocast: the type it computes in; None for that of its weights.
    """

    def __init__(self, backbone: nn.Module, controlnet: nn.Module | None = None, also: Sequence[nn.Module] = (),
                 adapters: Sequence[Adapter] = ()):
        super().__init__()
        self.backbone, self.controlnet, self.also = backbone, controlnet, nn.ModuleList(also)
        self.strengths = [1.0] * (1 + len(also))
        self.adapters, self.autocast = tuple(adapters), None

    adapters: tuple[Adapter, ...]
    autocast: torch.dtype | None

    @property
    def controlnets(self) -> list[nn.Module]:
        """All of its ControlNets, its own first."""
        return [*([] if self.controlnet is None else [self.controlnet]), *self.also]

    def forward(self, x_t: Tensor, timestep: Tensor, text: Text, control: Tensor | None = None) -> Tensor:
        with switched_on(self.adapters), computing(x_t.device, self.autocast):
            return self._denoised(x_t, timestep, text, control).contiguous()

    @abstractmethod
    def _denoised(self, x_t: Tensor, timestep: Tensor, text: Text, control: Tensor | None) -> Tensor:
        ...

    def features(self, x_t: Tensor, timestep: Tensor, text: Text) -> list[Tensor]:
        """Outputs [B, C, h, w] of the `feature_layers` on the way to the denoiser's own; differentiable in x_t."""
        found: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            found.append(self.seen(output, x_t))

        hooks = [layer.register_forward_hook(keep) for layer in self.feature_layers()]
        try:
            self(x_t, timestep, text)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def seen(self, output: Any, x_t: Tensor) -> Tensor:
        """A feature layer's output as a picture [B, C, h, w]."""
        return output if isinstance(output, Tensor) else output[0]

    @abstractmethod
    def feature_layers(self) -> list[nn.Module]:
        """The layers of the backbone whose outputs say most of a picture, in the order in which they run."""
        ...

    def compressible(self) -> list[nn.Module]:
        """The layers of the backbone's blocks whose frozen weights may be kept in 8 bits; none by default."""
        return []

    @abstractmethod
    def shard_units(self) -> list[nn.Module]:
        """The modules FSDP2 shards, each as a unit: a network's blocks, then the network itself."""
        ...


class ManySteps(Protocol):
    """A stock sampler of a multi-step model, at a number of steps."""

    @property
    def times(self) -> Sequence[Tensor]:
        """t of each step, falling, in (0, 1]."""
        ...

    def start(self, z: Tensor) -> Tensor:
        """x_t of the first step from noise z of unit variance."""
        ...

    def step(self, estimate: Estimate, k: int, x_t: Tensor) -> Tensor:
        """x_t of the step after step k, from the estimate at step k; of the last one x0."""
        ...


class Family(Protocol):
    """A loaded model, in float32, frozen and in eval mode, as methods, samplers and exporters see it."""

    NAME: ClassVar[str]
    """The family's name, for messages."""

    BACKBONE: ClassVar[str]
    """The backbone's name in the folder."""

    NETWORK: ClassVar[str]
    """The backbone in a sentence: UNet, transformer."""

    PARTS: ClassVar[dict[str, Any]]
    """The parts in the model's folder, by name (`jdm.models.stock.Part`)."""

    SHARED: ClassVar[tuple[str, ...]]
    """Keys of its config in which a ControlNet and its backbone must agree."""

    PIPELINES: ClassVar[tuple[str, str]]
    """The stock pipelines that load it, without and with a ControlNet."""

    @property
    def backbone(self) -> nn.Module:
        """The network that denoises."""
        ...

    @property
    def vae(self) -> Any:
        """The autoencoder between pictures and latents, a diffusers network."""
        ...

    @property
    def controlnet(self) -> nn.Module | None:
        """The model's own control branch, if it has one."""
        ...

    @property
    def scheduler(self) -> dict:
        """The config of the diffusers scheduler in the model's folder."""
        ...

    @property
    def card(self) -> dict | None:
        """jdm.json, where this project made the model."""
        ...

    @property
    def noted(self) -> dict[str, Any]:
        """The settings that jdm.json keeps because no other file of the folder can."""
        ...

    @property
    def distilled(self) -> str:
        """Why its guidance means nothing: it was distilled with guidance inside. Empty where it has guidance."""
        ...

    def begins(self, levels: Sequence[int], schedule: NoiseSchedule) -> str:
        """Why a student at these levels of a schedule cannot begin as it, the remedy included; empty if it can."""
        ...

    def denoiser(self, backbone: nn.Module | None = None, controlnet: nn.Module | None = None,
                 adapters: Sequence[Adapter] = (), also: Sequence[nn.Module] = ()) -> Denoiser:
        """A denoiser of this backbone, the model's own where None, with the ControlNets and LoRAs that are named."""
        ...

    def new_controlnet(self, backbone: nn.Module | None = None) -> nn.Module:
        """A control branch that starts as this backbone, the model's own where None, and changes nothing yet."""
        ...

    lora_targets: ClassVar[tuple[str, ...]]
    """The layers of the backbone that a LoRA attaches to, by the end of their path."""

    def text(self, one_by_one: bool = False) -> TextEncoder:
        """An encoder of prompts, which remembers; `one_by_one` as in `TextEncoder`."""
        ...

    def latent_shape(self, n: int, size: Size) -> tuple[int, int, int, int]:
        """[n, C, h, w] of x for pictures of a size in pixels; UsageError where the model cannot draw that size."""
        ...

    @property
    def downscale(self) -> int:
        """Pixels per latent, along one side."""
        ...

    @property
    def space(self) -> Space:
        """The space that x lives in."""
        ...

    @property
    def schedule(self) -> NoiseSchedule:
        """alpha_t and sigma_t, and what the backbone is told of t."""
        ...

    @property
    def prediction(self) -> Prediction:
        """The quantity that the backbone predicts, as diffusers names it, or flow."""
        ...

    def score_of(self, text: TextEncoder, net: Denoiser, guidance: float = 1.0) -> ScoreModel[Denoiser]:
        """The score that a denoiser of this family estimates."""
        ...

    def generator(self, text: TextEncoder, net: Denoiser, levels: Sequence[int] | None = None) -> Generator:
        """A denoiser run at these levels; where None at the model's own, or at the noisiest if it has none."""
        ...

    @property
    def levels(self) -> tuple[int, ...] | None:
        """The level indices that a distilled student runs at; None for a multi-step model."""
        ...

    def with_networks(self, **networks: nn.Module | None) -> Self:
        """With another `backbone` or `controlnet`; controlnet=None drops the model's own."""
        ...

    def with_parts(self, **parts: Any) -> Self:
        """With other fields, such as `scheduler` or `card`."""
        ...

    def step_scheduler(self, levels: Sequence[int]) -> dict:
        """The scheduler config by which a stock pipeline runs a student at these levels."""
        ...

    def many_steps(self, steps: int) -> ManySteps:
        """A stock sampler of the model as a multi-step one; UsageError where it has not as many levels."""
        ...

    @property
    def clip(self) -> float:
        """The largest |x0| that its scheduler keeps; infinite where it cuts none."""
        ...

    CONTROL: ClassVar[str]
    """The argument by which its stock pipeline takes a control picture."""

    @staticmethod
    def asked(levels: Sequence[int] | None, guidance: float, n: int, controlled: bool = False,
              size: Size | None = None) -> dict[str, Any]:
        """The arguments with which its stock pipeline draws, beside the prompt and the control.

        Args:
            levels: levels of a student; None for a multi-step model.
            guidance: w of uncond + w (cond - uncond); 1 for a student.
            n: the scheduler's number of levels.
            controlled: it draws to a control.
            size: size of the pictures, for pipelines that must be told.
        """
        ...

    def pipeline(self, scheduler: Any) -> diffusers.DiffusionPipeline:
        """The stock pipeline of these parts."""
        ...

    @property
    def size(self) -> Size:
        """Side of the pictures the model draws by default, in pixels."""
        ...

    def at(self, size: Size) -> Self:
        """The same weights with another picture size."""
        ...

    def modules(self) -> dict[str, nn.Module]:
        """Every network, by its name in the folder."""
        ...

    def to(self, device: torch.device | str, texts: bool = True) -> Self:
        """The same model, its networks moved to the device; its text encoders too unless `texts` is False."""
        ...


def copied(module: Module) -> Module:
    """A trainable float32 copy."""
    def clone(value: Tensor) -> Tensor:
        value = value.detach().clone()
        return value.float() if value.is_floating_point() else value

    # Plain deepcopy reads the memory of tensors, and FakeTensors have none.
    memo: dict[int, Any] = {id(p): nn.Parameter(clone(p)) for p in module.parameters()}
    return copy.deepcopy(module, memo | {id(b): clone(b) for b in module.buffers()})


def placed(module: Module, device: torch.device | str) -> Module:
    """The module itself, on the device."""
    nn.Module.to(module, device)
    return module


def with_merged(backbone: Module, adapter: Adapter | None) -> Module:
    """A frozen float32 copy of a backbone that carries adapters: without them, or with one merged into its weights."""
    kind: Any = type(backbone)
    plain = kind.from_config(dict(cast(Any, backbone).config))
    state = merged(backbone, adapter) if adapter else without_adapters(backbone.state_dict())
    plain.load_state_dict({key: value.float() for key, value in state.items()})
    return placed(plain, next(backbone.parameters()).device).eval().requires_grad_(False)
