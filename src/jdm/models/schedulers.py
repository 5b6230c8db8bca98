"""Scheduler configs of diffusers: the noise levels they stand for, and those that run a generator's levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import diffusers
from torch import Tensor

from jdm.errors import UsageError
from jdm.generator import checked_levels

KINDS: dict[str, Any] = {"DDIMScheduler": diffusers.DDIMScheduler, "PNDMScheduler": diffusers.PNDMScheduler,
                         "LCMScheduler": diffusers.LCMScheduler}
LEVELS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")


def alphas_cumprod(config: dict) -> Tensor:
    """alpha_t^2 of each level [N], from a scheduler config; 0 at the last with rescale_betas_zero_snr."""
    return _table(config).alphas_cumprod


def scheduler_of(config: dict) -> Any:
    """The scheduler that a config names; a DDIMScheduler on its levels where the name is not of KINDS."""
    return KINDS.get(config.get("_class_name", ""), diffusers.DDIMScheduler).from_config(config)


def ddim_scheduler(config: dict) -> diffusers.DDIMScheduler:
    """A DDIM sampler on a scheduler config's levels."""
    return cast(diffusers.DDIMScheduler, diffusers.DDIMScheduler.from_config(config))


def step_scheduler(config: dict, levels: Sequence[int]) -> dict:
    """The scheduler config by which a stock pipeline runs a generator's levels, from the config of its teacher.

    One level: DDIM, num_inference_steps=1. Several: LCM, which adds fresh noise between steps, for
    num_inference_steps=len(levels) where they are `evenly_spaced`, for timesteps=levels where not.

    Raises:
        UsageError: LCM cannot run them: level 0 is among several.
    """
    betas = _table(config).betas
    levels = checked_levels(levels, len(betas))
    n = levels[0] + 1
    found = {"num_train_timesteps": n, "trained_betas": [float(b) for b in betas[:n]], "set_alpha_to_one": True,
             "clip_sample": False, "prediction_type": config.get("prediction_type", "epsilon")}
    if len(levels) == 1:
        return {"_class_name": "DDIMScheduler", **found, "timestep_spacing": "trailing", "steps_offset": 0}
    if levels[-1] == 0:
        raise UsageError("level 0 cannot be one of several: LCMScheduler returns what it is given there; end at a "
                         "noisier level")
    # LCM's skip connection, c_skip = 0.25 / ((timestep_scaling t)^2 + 0.25), is not part of the generator.
    return {"_class_name": "LCMScheduler", **found, "timestep_scaling": 1e6,
            "original_inference_steps": len(levels) if evenly_spaced(levels) else n}


def evenly_spaced(levels: Sequence[int]) -> bool:
    """The levels are n k - 1, ..., 2 k - 1, k - 1 for some k, as LCMScheduler spaces them: (999, 749, 499, 249)."""
    apart = levels[-1] + 1
    return list(levels) == [k * apart - 1 for k in range(len(levels), 0, -1)]


def _table(config: dict) -> diffusers.DDPMScheduler:
    kept = {k: config[k] for k in LEVELS if k in config}
    return cast(diffusers.DDPMScheduler, diffusers.DDPMScheduler.from_config(kept))
