"""Scheduler configs of diffusers: the noise levels they stand for, and those that run a generator's levels."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

import diffusers
from torch import Tensor

from jdm.errors import UsageError, in_short, plural
from jdm.generator import checked_levels
from jdm.schedule import NoiseSchedule
from jdm.score import Estimate

# The samplers of diffusers that read alpha^2 + sigma^2 = 1 from a table of betas.
KINDS = tuple(f"{name}Scheduler" for name in (
    "DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep",
    "EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM",
    "LMSDiscrete", "PNDM", "SASolver", "TCD", "UniPCMultistep"))
# Those of a flow's straight line.
FLOWS = ("FlowMatchEulerDiscreteScheduler",)
LEVELS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
PREDICTED = ("epsilon", "v_prediction", "sample")


def complete(config: dict, kinds: tuple[str, ...] = KINDS) -> dict:
    """A scheduler config with what it leaves out, by the defaults of its own class in diffusers.

    Keys that its class does not take mean nothing to it and are dropped, as in diffusers.

    Raises:
        UsageError: it names no class, or one that is not among `kinds`.
    """
    kind = config.get("_class_name")
    if kind not in kinds:
        named = f"is of {kind}" if kind else "names no _class_name"
        raise UsageError(f"the scheduler's config {named}; the schedulers that are read for this family are "
                         f"{', '.join(kinds)}")
    own = _defaults(kind)
    return {"_class_name": kind, **own, **{k: v for k, v in config.items() if k in own}}


@cache
def _defaults(kind: str) -> dict:
    parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters
    return {name: p.default for name, p in parameters.items() if name != "self"}


def alphas_cumprod(config: dict) -> Tensor:
    """alpha_t^2 of each level [N], from a scheduler config; 0 at the last with rescale_betas_zero_snr."""
    return _table(config).alphas_cumprod


def scheduler_of(config: dict) -> Any:
    """The scheduler that a config names."""
    whole = complete(config, (*KINDS, *FLOWS))
    return getattr(diffusers, whole["_class_name"]).from_config(whole)


def ddim_scheduler(config: dict) -> diffusers.DDIMScheduler:
    """A DDIM sampler on a scheduler config's levels; it clips x0 only if the config's own class does."""
    unclipped: Any = {"clip_sample": False}  # of a class that has no such setting
    return cast(diffusers.DDIMScheduler, diffusers.DDIMScheduler.from_config(unclipped | complete(config)))


class DDIMSteps:
    """A `ManySteps` of DDIM on a scheduler config's levels.

    Raises:
        UsageError: it has not as many levels.
    """

    def __init__(self, config: dict, steps: int):
        self.scheduler: Any = ddim_scheduler(config)
        n = self.scheduler.config["num_train_timesteps"]
        if steps <= n:
            self.scheduler.set_timesteps(steps)
        if steps > n or int(self.scheduler.timesteps.max()) >= n:
            most = n - 1 if steps == n else n
            raise UsageError(f"steps must be at most {most} for this model's {plural(n, 'noise level')}, got {steps}; "
                             "50 are enough")
        self.times = [(index.double() + 1) / n for index in self.scheduler.timesteps]
        self.prediction = complete(config)["prediction_type"]

    def start(self, z: Tensor) -> Tensor:
        return z * self.scheduler.init_noise_sigma

    def step(self, estimate: Estimate, k: int, x_t: Tensor) -> Tensor:
        return self.scheduler.step(estimate.read(self.prediction), self.scheduler.timesteps[k], x_t).prev_sample


def clip(config: dict) -> float:
    """The largest |x0| that a sampler of this config keeps."""
    own = ddim_scheduler(config).config
    if own["thresholding"]:
        return own["sample_max_value"]
    return own["clip_sample_range"] if own["clip_sample"] else math.inf


def step_scheduler(config: dict, levels: Sequence[int]) -> dict:
    """The scheduler config by which a stock pipeline runs a generator's levels, from the config of its teacher.

    One level: DDIM, num_inference_steps=1. Several: LCM, which adds fresh noise between steps, for
    num_inference_steps=len(levels) where they are `evenly_spaced`, for timesteps=levels where not.

    Raises:
        UsageError: LCM cannot run them: level 0 is among several.
    """
    betas, config = _table(config).betas, complete(config)
    levels = checked_levels(levels, len(betas))
    n = levels[0] + 1
    found = {"num_train_timesteps": n, "trained_betas": [float(b) for b in betas[:n]], "set_alpha_to_one": True,
             "clip_sample": False, "prediction_type": config["prediction_type"]}
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
    whole = complete(config)
    kept = {k: whole[k] for k in LEVELS if k in whole}
    return cast(diffusers.DDPMScheduler, diffusers.DDPMScheduler.from_config(kept))


# What a config that was read may say


def checked_scheduler(config: dict, file: str, kinds: tuple[str, ...] = KINDS) -> dict:
    """The config itself, as read from a file, after each of its values was found to make sense.

    Raises:
        UsageError: its class is not read, or a value is not one that its class takes.
    """
    try:
        whole = complete(config, kinds)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None
    values = FLOW_VALUES if whole["_class_name"] in FLOWS else VALUES
    for key, value in whole.items():
        if key in values and not values[key][0](value):
            raise UsageError(f"{file}: {key} must be {values[key][1]}, got {_short(value)}; put back the scheduler "
                             "that the model was trained with")
    betas, n = whole.get("trained_betas"), whole["num_train_timesteps"]
    if betas is not None and len(betas) != n:
        raise UsageError(f"{file}: trained_betas has {plural(len(betas), 'level')} and num_train_timesteps is {n}; "
                         "they must agree")
    try:
        getattr(diffusers, whole["_class_name"]).from_config(whole)
        if whole["_class_name"] in KINDS:
            NoiseSchedule(alphas_cumprod(whole))
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None
    except Exception as error:  # an option that the class takes and does not implement
        raise UsageError(f"{file}: diffusers cannot make a {whole['_class_name']} of it ({in_short(error)})") from None
    return config


def _number(low: float, high: float, open_low: bool = False) -> tuple[Callable[[Any], bool], str]:
    def inside(value: Any) -> bool:
        plain = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return plain and low <= value <= high and not (open_low and value == low)

    return inside, f"a number in {'(' if open_low else '['}{low:g}, {high:g}]"


def _whole(low: int, high: int) -> tuple[Callable[[Any], bool], str]:
    return (lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high,
            f"a whole number in [{low}, {high}]")


def _among(*values: Any) -> tuple[Callable[[Any], bool], str]:
    return (lambda v: any(v is one or (isinstance(v, str) and v == one) for one in values),
            " or ".join(str(value).lower() if isinstance(value, bool) else str(value) for value in values))


def _are_betas(value: Any) -> bool:
    return value is None or (isinstance(value, list | tuple) and len(value) > 0 and all(map(BETA[0], value)))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


BETA = _number(0, 1, open_low=True)
VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_train_timesteps": _whole(1, 100_000), "beta_start": BETA, "beta_end": BETA,
    "trained_betas": (_are_betas, "null or a list of numbers in (0, 1]"),
    "beta_schedule": _among("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
    "prediction_type": _among(*PREDICTED), "steps_offset": _whole(0, 1000),
    "timestep_spacing": _among("leading", "linspace", "trailing"), "timestep_type": _among("discrete"),
    "clip_sample_range": _number(0, 1e6, open_low=True), "sample_max_value": _number(0, 1e6, open_low=True),
    "dynamic_thresholding_ratio": _number(0, 1), "use_flow_sigmas": _among(False),
    "shift": _number(0, 1000, open_low=True), "base_shift": _number(-10, 10), "max_shift": _number(-10, 10),
    "base_image_seq_len": _whole(1, 2**24), "max_image_seq_len": _whole(1, 2**24), "invert_sigmas": _among(False),
    "shift_terminal": (lambda value: value is None, "null"), "time_shift_type": _among("exponential", "linear"),
    **dict.fromkeys(("use_dynamic_shifting", "stochastic_sampling"), _among(True, False)),
    **dict.fromkeys(("clip_sample", "thresholding", "set_alpha_to_one", "rescale_betas_zero_snr"),
                    _among(True, False))}
# A flow's line is the shifted one and no other.
FLOW_VALUES = {**VALUES, **dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
                                         _among(False))}
