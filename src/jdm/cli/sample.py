"""`jdm sample`: draw pictures for a prompt and a control; writes control.png, 000.png, ... and grid.png."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from jdm.cli import checks, console
from jdm.controls import Control, checked, load_control
from jdm.data import pictures
from jdm.errors import UsageError
from jdm.evaluation.sampling import Sampler, control_named, default_guidance, warn_of_misfit
from jdm.evaluation.steering import Steering, frozen_posterior, likelihood
from jdm.generator import blended_noise
from jdm.library import load_controlnet, load_model
from jdm.models.family import Family, placed
from jdm.size import Size, height_width, size_of, sized, spelled
from jdm.space import from_bytes, unit

CONTROL, GRID = "control.png", "grid.png"


def command(asked: argparse.Namespace) -> int:
    out = Path(asked.out)
    checks.free_of_others([out / name for name in (*pictures.numbered(asked.n), CONTROL, GRID)],
                          [asked.image, asked.control_map], pictures.is_ours, "--out")
    model = load_model(asked.model).to(checks.device(asked.device))
    warn_of_misfit(asked.model, model)
    if asked.size:
        if len(asked.size) > 2:
            raise UsageError(f"--size is a side, or height and width; got {len(asked.size)} numbers")
        model = model.at(sized([asked.size[0], asked.size[-1]]))
    steering = steering_of(asked, model)
    unseen = steering is not None and model.controlnet is None  # the picture is steered to, and shown to nothing
    shown = shown_control(model, None if unseen else asked.image, asked.control_map, asked.control)
    also = [load_controlnet(name, model) for name in asked.also]
    if also:
        shown = _with_further(shown, [spec for _, spec in also], asked)
    guidance = default_guidance(model) if asked.guidance is None else asked.guidance
    sampler = Sampler(model, asked.steps, guidance,
                      [placed(net, asked.device) for net, _ in also], asked.strength, steering=steering)
    console.remark_cut(sampler.text, [asked.prompt])
    checks.writable(out)
    z = blended_noise(model.latent_shape(asked.n, model.size), asked.seed, asked.to_seed, asked.blend)
    images = sampler(z, [asked.prompt] * asked.n, None if shown is None else shown.expand(asked.n, -1, -1, -1),
                     seed=asked.seed)
    print(_written(out, images, shown, model.size))
    return 0


def _written(out: Path, images: Tensor, shown: Tensor | None, size: Size) -> Path:
    """The file of the grid, after all files were written."""
    pictures.save_pictures(images, out)
    sheet = images
    if shown is not None:
        measured = (torch.cat(shown.split(3, dim=1)) * 255).round().clamp(0, 255).to(torch.uint8)
        pictures.save_picture(pictures.grid(measured, len(measured), pad=0), out / CONTROL)
        sheet = torch.cat([measured, images])
    return pictures.save_picture(pictures.grid(sheet, 9, scale=max(1, 128 // max(height_width(size)))), out / GRID)


def shown_control(model: Family, image: str | None, control_map: str | None,
                  control: str | None) -> Tensor | None:
    """The control image for the model's ControlNet, [1, 3, H, W] in [0, 1]; None for a model without one.

    It is measured on the picture `image`, or read from the file `control_map`.

    Raises:
        UsageError: the model and these flags do not go together; the picture, map or control is bad.
    """
    if model.controlnet is None:
        if image or control_map or control:
            raise UsageError("this model takes no control; leave out --image, --control and --control-map, or name "
                             "a model with a ControlNet, such as nano-canny")
        return None
    if (image is None) == (control_map is None):
        raise UsageError("this model draws to a control; give --image with a picture to measure it on, or "
                         "--control-map with a ready map, and not both")
    if control_map is not None:
        if control:
            raise UsageError("--control says what is measured on --image; leave it out where --control-map is given")
        loaded = pictures.load_picture(control_map, model.size)
        with Image.open(control_map, formats=pictures.FORMATS) as file:
            width, height = file.size
        if (height, width) != height_width(model.size):
            raise UsageError(f"{control_map}: a control map must be {spelled(model.size)} pixels (height x width), got "
                             f"{height} x {width}; resize it, or give the picture itself with --image")
        return loaded[None].float() / 255
    assert image is not None
    return _measured(control_named(model, control), image, model.size)


def steering_of(asked: argparse.Namespace, model: Family) -> Steering | None:
    """The control that --steer steers to, with its weight and posterior; None without --steer.

    Raises:
        UsageError: the flags do not go together, or the posterior works on other latents.
    """
    if not asked.steer:
        if asked.posterior or asked.steer_weight is not None:
            raise UsageError("--posterior and --steer-weight need a control to steer to; add --steer, such as --steer "
                             "canny")
        return None
    weight = 1.0 if asked.steer_weight is None else asked.steer_weight
    if not 0 < weight < math.inf:
        raise UsageError(f"--steer-weight must be above 0 and finite, got {weight:g}")
    if not asked.image:
        raise UsageError("--steer measures its control on a picture; give one with --image")
    control = checked(load_control(asked.steer), model.size)
    image = unit(from_bytes(pictures.load_picture(asked.image, model.size)))[None].to(asked.device)
    posterior = None
    if asked.posterior:
        found = load_model(asked.posterior).at(model.size).to(asked.device)
        if found.latent_shape(1, model.size) != model.latent_shape(1, model.size):
            raise UsageError(f"{asked.posterior} works on other latents than {asked.model}; train a posterior for this "
                             "model: jdm train nano-posterior")
        posterior = frozen_posterior(found, model.schedule)
    return Steering(likelihood(control, model.space, control.h(image), image), posterior, weight)


def _with_further(shown: Tensor | None, specs: Sequence[str | None], asked: argparse.Namespace) -> Tensor:
    """The control images of all ControlNets, [1, 3 K, H, W]: the model's own, then those of `--also`."""
    if shown is None or asked.image is None:
        raise UsageError("--also measures its control on a picture; give one with --image to a model that draws to a "
                         "control, such as nano-canny")
    parts = [shown]
    for spec, name in zip(specs, asked.also, strict=True):
        if not spec:
            raise UsageError(f"{name} does not say which control it draws to; it needs a jdm.json with one")
        control = checked(load_control(spec), size_of(shown), likelihood=False)
        parts.append(_measured(control, asked.image, size_of(shown)))
    return torch.cat(parts, dim=1)


def _measured(control: Control, image: str, size: Size) -> Tensor:
    """A control measured on a picture file, as an image [1, 3, H, W] in [0, 1]."""
    return control.image(control.h(unit(from_bytes(pictures.load_picture(image, size)))[None]))
