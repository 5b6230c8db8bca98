"""Pictures from a model, in a student's few steps or in many: the Python face of `jdm sample`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from jdm.controls import Control, checked, load_control
from jdm.data.sources import Pictures, load_pictures
from jdm.errors import RunError, TeacherWarning, UsageError, plural
from jdm.evaluation.steering import Steering
from jdm.generator import Generator, Renoise, blended_noise, fresh_noise
from jdm.library import SHIPPED, load_controlnet, load_model
from jdm.models.family import Family
from jdm.models.teacher_check import doubts
from jdm.score import Estimate
from jdm.size import Size, height_width, size_of
from jdm.space import from_bytes, to_bytes, unit


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
            seed: seed of the noise that a student of several steps adds between them: a function of seed, row and step.

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
                               "model with intact weights")
            pictures.append(to_bytes(pixels).cpu())
        return torch.cat(pictures)


def warn_of_misfit(name: str, model: Family, pictures: Pictures | None = None) -> None:
    """Warns where a multi-step model's parts do not seem to belong together, by four small pictures or a large one.

    Shipped models are not checked, nor are students and posteriors, which predict no noise.

    Args:
        pictures: pictures of the model's kind; by default packaged ones, enlarged to the model's size.
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


def default_guidance(model: Family) -> float:
    """Guidance where none is asked for: what the model's card found best, or 2."""
    return float((model.card or {}).get("guidance", 2.0))


def control_named(model: Family, spec: str | None = None) -> Control:
    """The control of that name, its h tried at the model's size; the one of the model's card where None.

    Raises:
        UsageError: neither names one.
    """
    found = spec or (model.card or {}).get("control")
    if not found:
        raise UsageError("this model does not say which control it draws to; name it with --control canny")
    return checked(load_control(found), model.size, likelihood=False)


class Drawing:
    """Draws as `jdm sample` does: a prompt and a picture, or a ready control map, become pictures.

    Args:
        control: measures the picture for the model's own ControlNet; None for a model that has none.
        also: further ControlNets of the same backbone, each with the control that it was trained for.
        strengths: factor on each control in turn, the model's own first; by default 1.

    Attributes:
        controls: those that a picture is measured with, the model's own first.
        sampler: the sampler, at the model's size.
    """

    def __init__(self, model: Family, control: Control | None = None, steps: int | None = None,
                 guidance: float | None = None, also: Sequence[tuple[nn.Module, Control]] = (),
                 strengths: Sequence[float] = ()):
        if also and control is None:
            raise UsageError("further controls can only be added to a model's own; name a model that draws to a "
                             "control, such as nano-canny")
        self.controls = [] if control is None else [control, *(more for _, more in also)]
        self.sampler = Sampler(model, steps, default_guidance(model) if guidance is None else guidance,
                               [net for net, _ in also], strengths)

    @property
    def model(self) -> Family:
        return self.sampler.model

    @torch.no_grad()
    def shown(self, image: Tensor) -> Tensor:
        """The control images [1, 3 K, H, W] in [0, 1], one after the other, measured on uint8 [3, H, W]."""
        images = unit(from_bytes(image))[None].to(next(self.sampler.net.parameters()).device)
        return torch.cat([control.image(control.h(images)) for control in self.controls], dim=1)

    def __call__(self, prompt: str, shown: Tensor | None = None, n: int = 1, seed: int = 0, to_seed: int = 0,
                 blend: float = 0.0) -> Tensor:
        """uint8 pictures [n, 3, H, W] on the CPU.

        Args:
            shown: control images, as `shown` makes them; None for a model without a ControlNet.
            to_seed, blend: the starting noise is `blended_noise` of both seeds.
        """
        z = blended_noise(self.model.latent_shape(n, self.model.size), seed, to_seed, blend)
        return self.sampler(z, [prompt] * n, None if shown is None else shown.expand(n, -1, -1, -1), seed=seed)


def generator(model: str | Family, control: Control | None = None, steps: int | None = None,
              guidance: float | None = None, also: Sequence[str] = (),
              strengths: Sequence[float] = ()) -> Callable[..., Tensor]:
    """Returns a function (prompt, image, n, seed, to_seed, blend, control_map) -> uint8 pictures [n, 3, H, W].

    It draws what `jdm sample` draws. `image` and `control_map`, of which one is given where the model has a
    ControlNet, are uint8 [3, H, W]; their size is that of the pictures.

    Args:
        model: a shipped name, a folder, a hub id, or a loaded model.
        control: measures `image`; by default the one that the model's card names.
        steps: a student's own, 50 for other models unless given.
        guidance: guidance of a multi-step model; by default the one of its card, or 2.
        also: further ControlNets of the same UNet, by the names that `jdm sample --also` takes.
        strengths: factor on each control in turn, the model's own first; by default 1.
    """
    loaded = load_model(model) if isinstance(model, str) else model
    further = [load_controlnet(name, loaded) for name in also]

    @cache
    def drawing(size: Size) -> Drawing:
        sized = loaded.at(size)
        own = control
        if own is None and loaded.controlnet is not None:
            own = control_named(sized)
        more = [(net, control_named(sized.with_parts(card={"control": spec}))) for net, spec in further]
        return Drawing(sized, own, steps, guidance, more, strengths)

    def pictures(prompt: str, image: Tensor | None = None, n: int = 1, seed: int = 0, to_seed: int = 0,
                 blend: float = 0.0, control_map: Tensor | None = None) -> Tensor:
        given = image if control_map is None else control_map
        if loaded.controlnet is not None and (image is None) == (control_map is None):
            raise UsageError("this model has a ControlNet; give a control and a picture to measure, or "
                             "control_map= with a ready map, and not both")
        draw = drawing(loaded.size if given is None else size_of(given))
        if loaded.controlnet is None or given is None:
            return draw(prompt, None, n, seed, to_seed, blend)
        shown = draw.shown(given) if control_map is None else given[None].float() / 255
        return draw(prompt, shown, n, seed, to_seed, blend)

    return pictures
