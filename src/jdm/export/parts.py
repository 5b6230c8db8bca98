"""A student's parts as graphs: text encoder, network, decoder, control; levels, alpha and sigma are inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from jdm.controls import Control
from jdm.errors import UsageError
from jdm.export.graphs import Graph
from jdm.generator import fresh_noise
from jdm.models.stable_diffusion import StableDiffusion
from jdm.score import Estimate, Text
from jdm.space import unit
from jdm.user_code import probe

ROWS = 2  # of the examples


class Parts:
    """The graphs of one student, each with an example of what it reads.

    A tensor's name is the same wherever it goes: `x_t` [n, C, h, w], the noise or, in a student of several steps, the
    noised x; `step` int64 [1], which step it is, of those alone; `states` (and SDXL's `pooled`) of the prompts; `map`
    [n, 3, H, W] in [0, 1] and its `strength`; `x`, the picture in model space, of which the next step's x_t is
    alpha x + sigma noise.

    Raises:
        UsageError: the model is of another family than the UNets', or draws in many guided steps.
    """

    def __init__(self, name: str, model: Any):
        if not isinstance(model, StableDiffusion):
            raise UsageError(f"{name} is a {model.NAME} model; ONNX graphs are written for students that are UNets")
        if not model.levels:
            raise UsageError(f"{name} draws in many guided steps; ONNX graphs are written for students, such as "
                             "nano-canny")
        self.model, self.net, self.text = model, model.denoiser(controlnet=model.controlnet), model.text()
        t = torch.stack([model.schedule.t(level) for level in model.levels])
        self.alpha, self.sigma, self.timestep = (of(t) for of in (model.schedule.alpha, model.schedule.sigma,
                                                                  model.schedule.timestep))
        self._ids: dict[str, Tensor] = dict(zip(("ids", "ids_2"), self.text.ids(["a b", "c"]), strict=False))
        with torch.no_grad():
            states = self.text.states(list(self._ids.values()))
        self._states: dict[str, Tensor] = dict(zip(("states", "pooled"), states, strict=False))
        x_t = fresh_noise(model.latent_shape(ROWS, model.size), 0, 0)
        steps = {"step": torch.tensor([len(t) - 1])} if len(t) > 1 else {}
        self.latents = tuple(x_t.shape[1:])
        self._asked = {"x_t": x_t, **steps, **self._states}
        self._map = {"map": probe(model.size, 0), "strength": torch.tensor(0.75)}

    def text_encoder(self) -> Graph:
        """ids int64 [n, L] (and SDXL's ids_2) -> states."""
        networks = [network for network, _ in self.text.networks]
        return Graph(lambda *ids: self.text.states(ids), networks, self._ids, list(self._states))

    def student(self) -> Graph:
        """x_t, step, states, map, strength -> x. UNet and ControlNet in one; without a ControlNet, without a map."""
        net = self.model.controlnet
        inputs = {**self._asked, **({} if net is None else self._map)}

        def run(*tensors: Tensor) -> list[Tensor]:
            given = dict(zip(inputs, tensors, strict=True))
            return [self._x(given, [] if net is None else self._residuals(net, given))]

        return Graph(run, [self.net], inputs, ["x"])

    def controlnet(self, net: nn.Module) -> Graph:
        """x_t, step, states, map, strength -> residual_0, residual_1, ..., which several ControlNets may add up."""
        inputs = {**self._asked, **self._map}
        return Graph(lambda *tensors: self._residuals(net, dict(zip(inputs, tensors, strict=True))), [net], inputs,
                     list(self._examples(net)))

    def unet(self) -> Graph:
        """x_t, step, states, residual_0, residual_1, ... -> x; without residuals if the student has no ControlNet."""
        net = self.model.controlnet
        more = {} if net is None else self._examples(net)

        def run(*tensors: Tensor) -> list[Tensor]:
            given = dict(zip([*self._asked, *more], tensors, strict=True))
            return [self._x(given, [given[name] for name in more])]

        return Graph(run, [self.net.backbone], {**self._asked, **more}, ["x"])

    def decoder(self) -> Graph:
        """x -> images [n, 3, H, W] in [0, 1]."""
        return Graph(lambda x: (unit(self.model.space.decode(x)).clamp(0, 1),), [self.model.vae],
                     {"x": self._asked["x_t"]}, ["images"])

    def control(self, control: Control) -> Graph:
        """images [1, 3, H, W] in [0, 1] -> map [1, 3, H, W]."""
        images = probe(self.model.size, 1)[1:]
        control.h(images)  # some read their weights at the first picture, which must not be a traced one
        return Graph(lambda images: (control.image(control.h(images)),), [], {"images": images}, ["map"], rows=False)

    def _at(self, table: Tensor, given: dict[str, Tensor]) -> Tensor:
        """[1], the step's value."""
        return table[given["step"]] if "step" in given else table

    def _timestep(self, given: dict[str, Tensor]) -> Tensor:
        return self._at(self.timestep, given).expand(given["x_t"].shape[0])

    def _told(self, given: dict[str, Tensor]) -> Text:
        return self.text.joined(*(given[name] for name in self._states))

    def _residuals(self, net: nn.Module, given: dict[str, Tensor]) -> list[Tensor]:
        return self.net.residuals(net, given["x_t"], self._timestep(given), self._told(given), given["map"],
                                  given["strength"])

    def _examples(self, net: nn.Module) -> dict[str, Tensor]:
        with torch.no_grad():
            found = self._residuals(net, {**self._asked, **self._map})
        return {f"residual_{i}": value for i, value in enumerate(found)}

    def _x(self, given: dict[str, Tensor], residuals: list[Tensor]) -> Tensor:
        output = self.net.with_residuals(given["x_t"], self._timestep(given), self._told(given), residuals)
        return Estimate(given["x_t"], output, self._at(self.alpha, given), self._at(self.sigma, given),
                        self.model.prediction).x0
