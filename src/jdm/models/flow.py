"""Parts that the families of flow-matching transformers share: noise levels, schedulers and control pictures."""

from __future__ import annotations

import math
import re
import weakref
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import diffusers
import torch
from torch import Tensor, nn

from jdm.models.adapters import Adapter
from jdm.models.family import Denoiser, ManySteps
from jdm.models.schedulers import FLOWS, complete
from jdm.models.stock import StockModel
from jdm.schedule import FlowSchedule, NoiseSchedule, precise
from jdm.score import Estimate, Prediction
from jdm.size import Size, height_width, sized

# What the names of models say that were distilled with their guidance inside, and draw in a few steps.
DISTILLED = re.compile(r"turbo|lightning|schnell|hyper|distill", re.IGNORECASE)


class TransformerDenoiser(Denoiser):
    """A transformer and its ControlNets, which see the control's latents.

    Args:
        model: model whose autoencoder encodes control pictures, with its latents' scale and shift.
    """

    def __init__(self, model: FlowModel, backbone: nn.Module | None, controlnet: nn.Module | None = None,
                 also: Sequence[nn.Module] = (), adapters: Sequence[Adapter] = ()):
        super().__init__(backbone or model.backbone, controlnet, also, adapters)
        space = model.space
        self.encode, self.patch, self.scale, self.shift = model.encoded, model.patch, space.scale, space.shift
        self._seen = (lambda: None, [])

    def latents_of(self, control: Tensor) -> list[Tensor]:
        """Raw latents of each ControlNet's picture in `control` [B, 3 k, H, W]; the last ones are remembered."""
        of, latents = self._seen
        if of() is not control:
            pictures = control.split(3, dim=1) if self.also else [control]
            latents = [self.encode(picture) for picture in pictures]
            self._seen = weakref.ref(control), latents
        return latents

    def seen(self, output: Any, x_t: Tensor) -> Tensor:
        tokens = output if isinstance(output, Tensor) else output[-1]  # of two streams the picture's comes last
        height, width = (side // self.patch for side in x_t.shape[2:])
        return tokens[:, : height * width].mT.unflatten(2, (height, width))

    @staticmethod
    def spread(blocks: Sequence[nn.Module]) -> list[nn.Module]:
        """At most four of the blocks, evenly spread, the last one among them."""
        return list(blocks)[:: -max(1, len(blocks) // 4)][3::-1]

    def compressible(self) -> list[nn.Module]:
        kinds = cast(Any, self.backbone)._no_split_modules
        return [layer for block in self.backbone.modules() if type(block).__name__ in kinds
                for key, layer in block.named_modules() if isinstance(layer, nn.Linear) and "lora_" not in key]

    @abstractmethod
    def blocks(self, net: nn.Module) -> list[nn.Module]:
        """A network's transformer blocks, and what else is sharded as a unit of its own."""
        ...

    def shard_units(self) -> list[nn.Module]:
        return [unit for net in (*self.controlnets, self.backbone) for unit in (*self.blocks(net), net)]


@dataclass(frozen=True)
class EulerSteps:
    """A `ManySteps` of Euler on a flow's line, at the sigmas of the stock pipeline."""

    scheduler: Any
    times: Sequence[Tensor]

    @classmethod
    def of(cls, scheduler: Any, schedule: FlowSchedule) -> Self:
        """The sampler of a diffusers scheduler whose timesteps are set."""
        sigmas = scheduler.sigmas[:-1].double()
        return cls(scheduler, list(schedule.nearest(-2 * torch.logit(sigmas))))

    def start(self, z: Tensor) -> Tensor:
        return z

    def step(self, estimate: Estimate, k: int, x_t: Tensor) -> Tensor:
        return self.scheduler.step(estimate.read("flow"), self.scheduler.timesteps[k], x_t).prev_sample


def told_size(size: Size | None) -> dict[str, int]:
    """Height and width as arguments of a pipeline; none where the size is None."""
    return {} if size is None else dict(zip(("height", "width"), height_width(size), strict=True))


class FlowModel(StockModel):
    """A flow-matching transformer in a diffusers folder; subclasses are frozen dataclasses with a field `pixels`."""

    BACKBONE: ClassVar[str] = "transformer"
    NETWORK: ClassVar[str] = "transformer"
    SCHEDULERS: ClassVar[tuple[str, ...]] = FLOWS

    pixels: Size | None

    @classmethod
    def _card(cls, path: str) -> dict | None:
        found = super()._card(path)
        if (found or {}).get("kind") or not DISTILLED.search(Path(path).name):
            return found
        return {**(found or {}), "kind": "distilled"}

    @classmethod
    def _of_card(cls, card: dict) -> dict[str, Any]:
        return {"pixels": sized(card["size"]) if "size" in card else None}

    @property
    def noted(self) -> dict[str, Any]:
        return {} if self.pixels is None else {"size": list(height_width(self.pixels))}

    @property
    def distilled(self) -> str:
        of_name = "its name says that it is distilled, with guidance inside"
        return of_name if (self.card or {}).get("kind") == "distilled" else super().distilled

    @property
    def schedule(self) -> FlowSchedule:
        """The line of its scheduler: the static shift, or the dynamic one at its picture size."""
        config = complete(self.scheduler, FLOWS)
        return FlowSchedule(self._shift(config), config["num_train_timesteps"])

    def _shift(self, config: dict) -> float:
        if not config["use_dynamic_shifting"]:
            return config["shift"]
        mu = self._mu(config)
        return math.exp(mu) if config["time_shift_type"] == "exponential" else mu

    def _mu(self, config: dict) -> float:
        """diffusers' mu: a line through the shifts at two numbers of tokens."""
        _, _, height, width = self.latent_shape(1, self.size)
        slope = ((config["max_shift"] - config["base_shift"])
                 / (config["max_image_seq_len"] - config["base_image_seq_len"]))
        tokens = height * width // self.patch**2
        return config["base_shift"] + slope * (tokens - config["base_image_seq_len"])

    @property
    def prediction(self) -> Prediction:
        return "flow"

    @property
    def size(self) -> Size:
        return self._own_size if self.pixels is None else self.pixels

    @property
    @abstractmethod
    def _own_size(self) -> Size:
        """Size of its pictures where none is noted."""
        ...

    def at(self, size: Size) -> Self:
        """The same weights with another picture size."""
        self.latent_shape(1, size)
        return self if size == self.size else self.with_parts(pixels=size)

    def encoded(self, control: Tensor) -> Tensor:
        """Raw latents of control pictures in [0, 1]: the mean, of which stock pipelines may draw a sample.

        Its graph is not kept: a control is data.
        """
        with torch.no_grad():
            mean: Any = self.vae.encode(2 * control - 1).latent_dist.mean  # type: ignore[union-attr]
        return precise(mean)

    def step_scheduler(self, levels: Sequence[int]) -> dict:
        """The scheduler by which a stock pipeline runs a student's levels, given as sigmas before the shift.

        Between steps it adds fresh noise to x0, as `Generator` does. The shift is the one of the model's picture size.
        """
        config = complete(self.scheduler, FLOWS)
        return {**config, "use_dynamic_shifting": False, "shift": self.schedule.shift,
                "stochastic_sampling": len(levels) > 1}

    def many_steps(self, steps: int) -> ManySteps:
        config = {**complete(self.scheduler, FLOWS), "stochastic_sampling": False}
        scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
        scheduler.set_timesteps(**self._spacing(steps), mu=self._mu(config))
        return EulerSteps.of(scheduler, self.schedule)

    @classmethod
    def _spacing(cls, steps: int) -> dict[str, Any]:
        """Arguments that the stock pipeline gives its scheduler for a number of steps."""
        return {"num_inference_steps": steps}

    STEPS: ClassVar[int] = 4  # of its distilled release

    def begins(self, levels: Sequence[int], schedule: NoiseSchedule) -> str:
        """A student may begin as a distilled release too, at the sigmas that its scheduler gives."""
        own, ours = self.levels, schedule.sigma(schedule.t(torch.tensor(list(levels))))
        if own is None and (self.card or {}).get("kind") == "distilled":
            t = 1 - torch.arange(self.STEPS, dtype=torch.float64) / self.STEPS
            sigmas = self.schedule.sigma(t)
        elif why := super().begins(levels, schedule):
            return why
        else:
            sigmas = self.schedule.sigma(self.schedule.t(torch.tensor(list(own or ()))))
        apart = (ours[:, None] - sigmas[None]).abs().amin(1)
        if float(apart.max()) <= 2e-3:
            return ""
        fitting = [round(float(t) * schedule.n) - 1 for t in schedule.nearest(-2 * torch.logit(sigmas.double()))]
        return (f"runs at sigmas {', '.join(f'{float(s):.3f}' for s in sigmas)}, where its own scheduler puts them; "
                f"the levels asked for are {', '.join(f'{float(s):.3f}' for s in ours)}; use --levels among "
                f"{' '.join(map(str, fitting))}")
