"""Pictures from a model, in a student's few steps or in many: the Python face of `jdm sample`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from jdm.controls import Control
from jdm.data.sources import Pictures, load_pictures
from jdm.errors import RunError, TeacherWarning, UsageError, plural
from jdm.evaluation.steering import Steering
from jdm.generator import Generator, Renoise, fresh_noise, starting_noise
from jdm.library import SHIPPED, load_model
from jdm.models.family import Family
from jdm.models.teacher_check import doubts
from jdm.score import Estimate
from jdm.size import Size, height_width, size_of
from jdm.space import from_bytes, to_bytes


class Sampler:
    """Turns noise, prompts and control images into uint8 pictures.

    Args:
        steps: `default_steps` where None. A student, and any model at 1, runs its generator; others run DDIM on the
            guided score.
        guidance: w of uncond + w (cond - uncond), for a multi-step model; a student has its own inside.
        also: further ControlNets of the same backbone, such as those of a shared generator; their control images
            follow the model's own along the channels.
        strengths: factor on each ControlNet's residuals, the model's own first; by default 1.
        generator: run in place of the model's own, such as a student's in training.
        steering: control at sampling, for a model that has not learnt it.

    Raises:
        UsageError: the model has no such number of steps, or fewer ControlNets than strengths.
    """

    def __init__(self, model: Family, steps: int | None = None, guidance: float = 1.0, also: Sequence[nn.Module] = (),
                 strengths: Sequence[float] = (), generator: Generator | None = None,
                 steering: Steering | None = None):
        self.model, self.guidance, self.steering = model, guidance, steering
        own = model.levels if generator is None else generator.levels
        self.steps = steps if steps is not None else len(own) if own else default_steps(model)
        if self.steps < 1:
            raise UsageError(f"steps must be at least 1, got {self.steps}")
        if own and self.steps != len(own):
            raise UsageError(f"this model draws in {counted(len(own))}; asked for {self.steps}; leave out the number "
                             f"of steps (it runs at levels {', '.join(map(str, own))}), or train a student at "
                             f"{plural(self.steps, 'level')}: jdm train RECIPE --method.student.levels ...")
        self._many = self.steps > 1 and not own
        self.text = model.text()
        self.net = model.denoiser(controlnet=model.controlnet, also=also)
        if len(strengths) > len(self.net.strengths):
            raise UsageError(f"{plural(len(strengths), 'strength')} for "
                             f"{plural(len(self.net.strengths), 'control')}; give one each")
        self.net.strengths[: len(strengths)] = strengths
        self.generator = generator or model.generator(self.text, self.net)
        self.score = model.score_of(self.text, self.net, guidance)
        if self._many:
            model.many_steps(self.steps)  # refused before anything is drawn

    @property
    def nfe(self) -> int:
        """Network function evaluations per picture; a guided step counts two, one steered by a posterior one more."""
        more = self.steering is not None and self.steering.posterior is not None
        return self.steps * ((2 if self._many and self.guidance != 1 else 1) + more)

    def x(self, z: Tensor, y: Sequence[str], control: Tensor | None = None, renoise: Renoise | None = None) -> Tensor:
        """Model-space samples [B, ...] like z; a student of several steps needs `renoise`, as `Generator` does."""
        if not self._many:
            return self.generator(z, y, control, renoise, self.steering)
        many = self.model.many_steps(self.steps)
        x_t = many.start(z)
        for k, at in enumerate(many.times):
            t = at.expand(len(z)).to(z.device)

            def estimate(x_t: Tensor, t: Tensor = t) -> Estimate:
                return self.score.guided(x_t, t, y, control)

            found = self.steering(estimate, x_t, t, y) if self.steering else estimate(x_t)
            x_t = many.step(found, k, x_t)
        return x_t

    @torch.no_grad()
    def __call__(self, z: Tensor, y: Sequence[str], control: Tensor | None = None, batch: int = 64,
                 seed: int = 0) -> Tensor:
        """uint8 pictures [B, 3, H, W] on the CPU, in batches.

        Args:
            seed: of the noise that a student of several steps adds between them: a function of seed, row and step.

        Raises:
            RunError: a picture is not finite.
        """
        device = next(self.net.parameters()).device
        fresh = {k: fresh_noise(tuple(z.shape), seed, k).to(device) for k in range(1, len(self.generator.levels))}
        pictures = []
        for rows in torch.arange(len(z)).split(batch):
            shown = None if control is None else control[rows].to(device)
            x = self.x(z[rows].to(device), [y[int(i)] for i in rows], shown, lambda k, rows=rows: fresh[k][rows])
            pixels = self.model.space.decode(x)
            if not bool(pixels.isfinite().all()):
                raise RunError("a picture is not finite (NaN or infinity); lower --guidance or --strength, or name a "
                               "model whose weights are whole")
            pictures.append(to_bytes(pixels).cpu())
        return torch.cat(pictures)


def warn_of_misfit(name: str, model: Family, pictures: Pictures | None = None) -> None:
    """Warns where a multi-step model's parts do not seem to belong together, by four small pictures or a large one.

    Shipped models are known, and students and posteriors predict no noise: of them nothing is computed.

    Args:
        pictures: of the model's kind; packaged ones, enlarged to the model's size, where None.
    """
    if name in SHIPPED or model.levels or (model.card or {}).get("kind", "many-step") != "many-step":
        return
    taken = load_pictures("fashion-mnist", "test[:4]", 32) if pictures is None else pictures
    size = height_width(model.size if pictures is None else pictures.size)
    rows, images, _ = taken.sound(torch.arange(min(len(taken), 4 if max(size) <= 64 else 1)))
    pixels, y = from_bytes(images), taken.prompts(rows, torch.zeros(len(rows)))
    if pixels.shape[2:] != size:
        pixels = functional.interpolate(pixels, size, mode="bilinear", antialias=True)
    if why := doubts(model, pixels, y):
        warnings.warn(f"{name}: {why}", TeacherWarning, stacklevel=2)


def default_steps(model: Family) -> int:
    """Network steps where none are asked for: a student's own, 50 of DDIM for other models."""
    return len(model.levels) if model.levels else 50


def counted(steps: int) -> str:
    """For a sentence: "one step", "4 steps"."""
    return "one step" if steps == 1 else f"{steps} steps"


def generator(model: str | Family, control: Control | None = None, steps: int | None = None,
              guidance: float = 2.0) -> Callable[..., Tensor]:
    """Returns a function (prompt, image, n, seed) -> uint8 pictures [n, 3, H, W].

    Args:
        model: a shipped name, a folder, a hub id, or a loaded model.
        control: measures `image`; needed where the model has a ControlNet.
        steps: a student's own, 50 for other models unless given.
    """
    loaded = load_model(model) if isinstance(model, str) else model

    @cache
    def sampler(size: Size) -> Sampler:
        return Sampler(loaded.at(size), steps, guidance)

    def pictures(prompt: str, image: Tensor | None = None, n: int = 1, seed: int = 0) -> Tensor:
        if loaded.controlnet is not None and (control is None or image is None):
            raise UsageError("this model has a ControlNet; give a control and a picture to measure")
        size = loaded.size if image is None else size_of(image)
        c = None if control is None or image is None else control.image(control.h(image[None].float() / 255))
        shown = None if c is None else c.expand(n, -1, -1, -1)
        return sampler(size)(starting_noise(loaded.latent_shape(n, size), seed), [prompt] * n, shown, seed=seed)

    return pictures
