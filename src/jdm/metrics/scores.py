"""Scores of pictures for their prompts, as papers report them: CLIP, HPSv2.1 by style, LAION aesthetic, others."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jdm.errors import UsageError
from jdm.files import expanded, read_json
from jdm.metrics.spread import bootstrap
from jdm.rewards import load_reward, reward_name
from jdm.space import from_bytes, unit

PRINTED = {"clip": 100.0, "hpsv2": 100.0}  # factor by which tables scale the network's score
BATCH = 32


@torch.no_grad()
def scores(specs: Sequence[str], pictures: Tensor, prompts: Sequence[str], device: str | torch.device = "cpu",
           styles: Sequence[str] = (), taken: Collection[str] = ()) -> dict[str, Any]:
    """Mean score of uint8 pictures [N, 3, H, W] for N prompts, by each of `specs`, scaled as tables print it.

    Args:
        specs: rewards as `load_reward` takes them: clip, hpsv2, aesthetic, pick-score, image-reward, each with
            `:FOLDER` if its weights are elsewhere, or your own. Only one network is in memory at a time.
        styles: the style of each prompt, if there are any; a score is then the mean of the styles' means, as HPSv2
            defines it.
        taken: names already in use; a score with such a name, or that of an earlier score, becomes NAME_2 and so on.

    Returns:
        NAME, its bootstrap error NAME_spread, NAME_STYLE for each style, and NAME_network if several networks
        compute this score, as for CLIP.
    """
    row: dict[str, Any] = {}
    for spec in specs:
        reward = load_reward(spec, device)
        scale = PRINTED.get(reward_name(reward), 1.0)
        name = _free(reward_name(reward).replace("-", "_"), {*taken, *row})
        parts = torch.arange(len(pictures)).split(BATCH)
        values = torch.cat([reward(unit(from_bytes(pictures[rows].to(device))), [prompts[int(i)] for i in rows]).cpu()
                            for rows in parts]) * scale
        by_style = {style: values[[i for i, own in enumerate(styles) if own == style]]
                    for style in dict.fromkeys(styles)}
        row[name] = statistics.fmean(float(v.mean()) for v in (by_style or {"": values}).values())
        row[f"{name}_spread"] = bootstrap(values)[1]
        row |= {f"{name}_{style.replace('-', '_')}": float(v.mean()) for style, v in by_style.items()}
        row |= {f"{name}_network": network} if (network := getattr(reward, "network", None)) else {}
    return row


def _free(name: str, taken: Collection[str]) -> str:
    """The first of NAME, NAME_2, NAME_3, ... that is not taken."""
    names = chain([name], (f"{name}_{k}" for k in count(2)))
    return next(each for each in names if each not in taken)


def read_prompts(place: str | Path) -> dict[str, list[str]]:
    """Reads prompts by style, in file order.

    A folder of JSON lists has one style per file, as in HPSv2's benchmark (anime, concept-art, paintings, photo). A
    single JSON list, or a text file with one prompt per line, is one style named "".

    Raises:
        UsageError: no prompt was found.
    """
    path = expanded(place)
    files = sorted(path.glob("*.json")) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        raise UsageError(f"{place} holds no prompts; give a folder with one JSON list per style, such as HPSv2's "
                         "benchmark, or a file that is a JSON list or has one prompt per line")
    found = {file.stem if path.is_dir() else "": _prompts(file) for file in files}
    if empty := [str(file) for file, own in zip(files, found.values(), strict=True) if not own]:
        raise UsageError(f"{empty[0]} holds no prompt; add some or delete the file")
    return found


def _prompts(file: Path) -> list[str]:
    if file.suffix == ".json":
        return read_json(file, list[str], "give a list of strings, one per prompt")
    if not file.is_file():
        raise UsageError(f"{file} is not a regular file; replace it by one, or move it away")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} could not be read as prompts ({error})") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def chosen(prompts: Mapping[str, list[str]], n: int) -> tuple[list[str], list[str]]:
    """The first n prompts of every style, or all it has if fewer, as (prompts, the style of each)."""
    kept = [(prompt, style) for style, own in prompts.items() for prompt in own[:n]]
    return [prompt for prompt, _ in kept], [style for _, style in kept] if set(prompts) != {""} else []
