"""Sampling from a model in one or many steps; the Python interface of `jdm sample`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from jdm.controls import Control
from jdm.errors import UsageError
from jdm.generator import starting_noise
from jdm.library import load_model
from jdm.models.stable_diffusion import Denoiser, StableDiffusion, ddim_scheduler
from jdm.score import ScoreModel
from jdm.size import Size, size_of
from jdm.space import to_bytes


@dataclass
class Sampler:
    """Turns noise, prompts and control images into uint8 pictures.

    Attributes:
        steps: with 1 the one-step generator is run; with more, DDIM on the guided score.
        guidance: w in uncond + w (cond - uncond), for many steps; a one-step student has learnt its guidance.
        also: further ControlNets for the same UNet, such as those of a shared generator; their control images follow
            the model's own along the channels.
        strengths: factor on each ControlNet's residuals, starting with the model's own; 1 by default.
    """

    model: StableDiffusion
    steps: int = 1
    guidance: float = 1.0
    also: Sequence[nn.Module] = ()
    strengths: Sequence[float] = ()

    def __post_init__(self):
        if self.steps < 1:
            raise UsageError(f"steps must be at least 1, got {self.steps}")
        if self.steps > 1 and self.model.one_step:
            raise UsageError(f"a one-step student needs steps = 1, got {self.steps}")
        self.text = self.model.text()
        self.net = Denoiser(self.model.unet, self.model.controlnet, self.also)
        if len(self.strengths) > len(self.net.strengths):
            raise UsageError(f"{len(self.strengths)} strengths for {len(self.net.strengths)} controls; give one each")
        self.net.strengths[: len(self.strengths)] = self.strengths
        self.generator = self.model.generator(self.text, self.net)
        self.score = ScoreModel(self.net, self.model.schedule, self.model.prediction, self.text, self.guidance)
        self._scheduler = ddim_scheduler({**self.model.scheduler, "prediction_type": "epsilon"})  # x() passes it eps

    @property
    def nfe(self) -> int:
        """Network function evaluations per picture; a guided step counts as two."""
        return self.steps * (2 if self.steps > 1 and self.guidance != 1 else 1)

    def x(self, z: Tensor, y: Sequence[str], control: Tensor | None = None) -> Tensor:
        """Model-space samples, shaped like z [B, ...]."""
        if self.steps == 1:
            return self.generator(z, y, control)
        scheduler: Any = self._scheduler
        n = self.model.schedule.n
        scheduler.set_timesteps(self.steps)
        x_t = z * scheduler.init_noise_sigma
        for index in scheduler.timesteps:
            t = ((index.double() + 1) / n).expand(len(z)).to(z.device)
            eps = self.score.guided(x_t, t, y, control).eps
            x_t = scheduler.step(eps, index, x_t).prev_sample
        return x_t

    @torch.no_grad()
    def __call__(self, z: Tensor, y: Sequence[str], control: Tensor | None = None, batch: int = 64) -> Tensor:
        """uint8 pictures [B, 3, H, W] on the CPU, sampled in batches."""
        device = next(self.net.parameters()).device
        pictures = []
        for rows in torch.arange(len(z)).split(batch):
            shown = None if control is None else control[rows].to(device)
            x = self.x(z[rows].to(device), [y[int(i)] for i in rows], shown)
            pictures.append(to_bytes(self.model.space.decode(x)).cpu())
        return torch.cat(pictures)


def generator(model: str | StableDiffusion, control: Control | None = None, steps: int | None = None,
              guidance: float = 2.0) -> Callable[..., Tensor]:
    """Returns a function (prompt, image, n, seed) -> uint8 pictures [n, 3, H, W].

    Args:
        model: a shipped model's name, a folder, a hub id, or a loaded model.
        control: measures `image`; required if the model has a ControlNet.
        steps: by default 1 for a one-step student, 50 for others.
    """
    loaded = load_model(model) if isinstance(model, str) else model

    @cache
    def sampler(size: Size) -> Sampler:
        return Sampler(loaded.at(size), steps or (1 if loaded.one_step else 50), guidance)

    def pictures(prompt: str, image: Tensor | None = None, n: int = 1, seed: int = 0) -> Tensor:
        if loaded.controlnet is not None and (control is None or image is None):
            raise UsageError("this model has a ControlNet; give a control and a picture to measure")
        size = loaded.size if image is None else size_of(image)
        c = None if control is None or image is None else control.image(control.h(image[None].float() / 255))
        shown = None if c is None else c.expand(n, -1, -1, -1)
        return sampler(size)(starting_noise(loaded.latent_shape(n, size), seed), [prompt] * n, shown)

    return pictures
