"""Rewards: how good each picture is for its prompt, differentiable in the picture."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from jdm.errors import UsageError, in_short
from jdm.size import Size
from jdm.user_code import check_gradient, imported, probe

NAMED = {
    "nano-reward": "jdm.rewards.classifier:nano_reward",
    "nano-judge": "jdm.rewards.classifier:nano_judge",
    "clip": "jdm.rewards.clip_score:CLIPScore",
    "pick-score": "jdm.rewards.pick_score:PickScore",
    "hpsv2": "jdm.rewards.hpsv2:HPSv2",
    "aesthetic": "jdm.rewards.aesthetic:Aesthetic",
    "image-reward": "jdm.rewards.image_reward:ImageReward",
}


class Reward(Protocol):
    """r(images, prompts): a function, a frozen network or any other such callable. Higher is better."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images [B, 3, H, W], nominally in [0, 1] (a decoder may overshoot), and B prompts -> [B].

        Differentiable in images; each value depends on its own picture and prompt only.
        """
        ...


def load_reward(spec: str, device: str | torch.device = "cpu") -> Reward:
    """Returns the reward named by `spec`: `nano-reward`, `my_rewards.py:brightness` or `package.module:Name`.

    A known name may be followed by the place of its weights: `pick-score:FOLDER`. A function is used as it is, a
    class is instantiated without arguments; networks are moved to `device`. Loading executes the file, as
    `python my_rewards.py` would. Raises UsageError if the name is unknown or the class cannot be instantiated.
    """
    known, colon, weights = spec.partition(":")
    if known in NAMED and (weights or not colon):
        source, _, name = NAMED[known].partition(":")
        make = getattr(importlib.import_module(source), name)
        reward = make(weights) if weights else make()
    else:
        reward = _own(spec)
    return reward.to(device) if isinstance(reward, nn.Module) else reward


def checked_reward(reward: Reward, size: Size, prompts: Sequence[str]) -> Reward:
    """Returns `reward` after trying it on two random pictures [2, 3, H, W], so that it can be trained on.

    Raises UsageError unless it returns [2], finite, with a finite, nonzero gradient over the pictures; and if it
    is a judge, which must not be trained on.

    Args:
        prompts: the run's prompts; the first two are used.
    """
    name = reward_name(reward)
    if getattr(reward, "judge", False):
        raise UsageError(f"{name} judges runs trained on other rewards and must not be trained on; "
                         "train on nano-reward, or on a reward of your own")
    if len(prompts) == 0:
        raise UsageError(f"checking {name} needs at least 1 prompt, got none; pass the run's prompts")
    parameter = next(reward.parameters(), None) if isinstance(reward, nn.Module) else None
    images = probe(size, seed=0).to("cpu" if parameter is None else parameter.device).requires_grad_()
    with torch.enable_grad():
        try:
            value = reward(images, [prompts[k % len(prompts)] for k in range(len(images))])
        except UsageError:
            raise
        except Exception as error:  # a user's code may raise anything
            raise UsageError(f"{name} failed on two random pictures ({in_short(error)}); it must take "
                             "images [B, 3, H, W] in [0, 1] and B prompts") from error
        check_gradient(name, value, images)
    return reward


def reward_name(reward: Reward) -> str:
    """Name for tables and messages: the reward's `name`, or else its function's or class's name."""
    return getattr(reward, "name", None) or getattr(reward, "__name__", None) or type(reward).__name__


def _own(spec: str) -> Any:
    source, colon, name = spec.rpartition(":")
    if not colon or not source or not name:
        near = difflib.get_close_matches(spec, NAMED, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the known ones are {', '.join(NAMED)};"
        raise UsageError(f"there is no reward {spec!r}; {hint} name your own by file and function, "
                         "such as my_rewards.py:brightness")
    try:
        module = imported(source)
    except UsageError:
        near = difflib.get_close_matches(source, NAMED, n=1)
        if near:
            raise UsageError(f"there is no reward {source!r}; did you mean {near[0]}:{name}?") from None
        raise
    found = getattr(module, name, None)
    if found is None:
        own = [key for key, value in vars(module).items()
               if callable(value) and getattr(value, "__module__", None) == module.__name__]
        near = difflib.get_close_matches(name, own, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it defines: {', '.join(own) or 'nothing'}"
        raise UsageError(f"{source} has no function or class {name}; {hint}")
    try:
        made = found() if isinstance(found, type) else found
    except UsageError:
        raise
    except Exception as error:  # a user's constructor may raise anything
        raise UsageError(f"{spec} could not be instantiated without arguments ({in_short(error)}); "
                         "give every argument a default") from error
    if not callable(made):
        raise UsageError(f"{spec} is not a reward but {type(made).__name__}; write "
                         f"`def {name}(images, prompts)`, or a class with __call__")
    return made
