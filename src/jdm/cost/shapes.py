"""A run's needs with the right shapes and no contents: what an estimate runs a step on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from jdm.controls import load_control
from jdm.controls.depth import Depth, Preprocessing
from jdm.controls.encoders import image_encoder
from jdm.controls.hed import HED, HEDNetwork
from jdm.controls.image_prompt import ImagePrompt
from jdm.controls.processors import Standard
from jdm.cost.known_configs import clip_vision, dpt_hybrid, frozen, image_reward, without_weights
from jdm.data.sources import Pictures
from jdm.loading import Loaded
from jdm.models.family import Family, copied
from jdm.rewards import load_reward
from jdm.rewards.clip_score import WEIGHTS as CLIP_L
from jdm.run import Run
from jdm.size import Size, height_width


class Shapes(Loaded):
    """Everything a run needs, with the right shapes and no contents: only configurations are read.

    Attributes:
        models: by what they are in the estimate: "teacher", "guide", "2. model NAME".
        others: further networks that run, by name.
        notes: what could not be counted.
    """

    def __init__(self, run: Run, mode: FakeTensorMode):
        super().__init__(run)
        self.mode, self.models, self.others, self.notes = mode, {}, {}, []

    def making(self) -> AbstractContextManager[Any]:
        return self.mode

    def split(self, split: str) -> Pictures:
        n, size = self.run.batch, self.run.data.size
        height, width = height_width(size)
        return Pictures(lambda rows, frames=None: torch.zeros(len(rows), 3, height, width, dtype=torch.uint8),
                        (("a picture",),) * n, None, torch.arange(n), size, self.run.data.source,
                        sides=lambda rows: [(width, height)] * len(rows))

    @cached_property
    def held_out(self) -> Pictures:
        """No validation pictures: the probe is not part of a step."""
        return replace(self.split("validation"), indices=torch.arange(0))

    def apart(self, role: str) -> float:
        return 0.0

    def student(self, role: str, levels: tuple[int, ...]) -> Family:
        """The teacher, whose shapes a student has."""
        return self.teacher

    def _model(self, role: str, name: str) -> Family:
        with self.mode:
            model = without_weights(name).at(self.run.data.size)
        known = {"teacher": "teacher", "guide": "guide"}.get(role.split()[0])
        self.models[known or f"{len(self.models) + 1}. model {name}"] = model
        return model

    def _controlnet(self, name: str) -> nn.Module:
        with self.mode:
            return self.teacher.new_controlnet(self.teacher.backbone)

    def _decoder(self, name: str) -> nn.Module:
        with self.mode:
            net = AutoencoderTiny(latent_channels=self.teacher.latent_shape(1, self.run.data.size)[1])
            self.others["tiny decoder"] = frozen(net)
        return self.others["tiny decoder"]

    def _control(self, spec: str, size: Size) -> Any:
        control = load_control(spec)
        if isinstance(control, HED):
            with self.mode:
                control.__dict__["network"] = self.others["control: HED"] = frozen(HEDNetwork(control.widths))
        elif isinstance(control, Depth):
            network = self._emptied(dpt_hybrid)
            control.__dict__["loaded"] = network, Preprocessing((384, 384), False, 32, 1, "bicubic", Standard())
            self.others["control: DPT"] = network
            if control.model != Depth.model:
                self.notes.append(f"the depth estimator {control.model} is counted as {Depth.model}")
        elif isinstance(control, ImagePrompt):
            known = control.encoder == CLIP_L
            encoder = clip_vision() if known else image_encoder(control.encoder, weights=False)
            network = self.others["control: encoder"] = self._emptied(lambda: encoder.network)
            control.__dict__["loaded"] = replace(encoder, network=network)
        return control

    def _reward(self, spec: str) -> Any:
        reward = self._emptied(image_reward) if spec.partition(":")[0] == "image-reward" else \
            load_reward(spec, self.run.device)
        if isinstance(reward, nn.Module):
            self.others["reward"] = reward
        else:
            self.notes.append(f"the weights of reward {spec} are not counted")
        return reward

    def _emptied(self, make: Callable[[], nn.Module]) -> nn.Module:
        """A network whose making looks at values: it is made for real, then emptied."""
        real = make()
        with self.mode:
            return copied(real).requires_grad_(False)
