"""Whether a teacher's parts belong together: one pass that predicts noise which was added to pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jdm.errors import UsageError
from jdm.models.family import Family
from jdm.score import Estimate

LEVELS = (0.1, 0.5, 0.9)  # t: nearly clean, in between, nearly noise
LONGER = 1.15  # how much an x0 of the middle level may be longer or shorter than the true one
PARTS = "the scheduler's config, the autoencoder and the network may not be of one model"


@torch.no_grad()
def doubts(model: Family, pixels: Tensor, y: Sequence[str]) -> str:
    """A sentence that says why the model's parts do not seem to belong together; empty if they do.

    Chance is the best linear guess, which knows no more than the latents' variance v: eps = s x_t / (a^2 v + s^2), with
    the error a^2 v / (a^2 v + s^2). Random numbers are those of a generator of its own.

    Args:
        pixels: [B, 3, H, W] in [-1, 1], of a size of the model.
        y: their prompts.

    Raises:
        UsageError: its latents or its predictions are not finite.
    """
    device = next(model.backbone.parameters()).device
    x = model.space.encode(pixels.to(device))
    if cut := _clipped_share(model, x):
        return (f"its scheduler clips x0, which cuts {100 * cut:.0f}% of this model's latents; set clip_sample and "
                "thresholding to false in its scheduler_config.json")
    variance = float(x.square().mean())
    for t in LEVELS:
        estimate, eps = _estimate(model, x, t, y)
        if not all(bool(value.isfinite().all()) for value in (x, estimate.output)):
            raise UsageError(f"the teacher's prediction at t = {t} is not finite (NaN or infinity); give one whose "
                             "weights are whole")
        alpha, sigma = float(estimate.alpha.max()), float(estimate.sigma.max())
        chance = alpha**2 * variance / (alpha**2 * variance + sigma**2)
        error = float((estimate.eps - eps).square().mean())
        if error > chance:
            return (f"it predicts the noise at t = {t} with an error of {error:.3g}, a guess with {chance:.3g}: "
                    f"{PARTS}, or it was never trained on such pictures")
        length = float((estimate.x0 * x).sum() / estimate.x0.square().sum())
        if t == LEVELS[1] and not 1 / LONGER <= length <= LONGER:
            return (f"its x0 at t = {t} is {1 / length:.2f} times as long as it should be: {PARTS}, above all the "
                    "scheduler's betas, or it was never trained on such pictures")
    return ""


def _estimate(model: Family, x: Tensor, t: float, y: Sequence[str]) -> tuple[Estimate, Tensor]:
    schedule, score = model.schedule, model.score_of(model.text(), model.denoiser())
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(round(1000 * t))).to(x)
    at = schedule.t(max(0, round(t * schedule.n) - 1)).to(x.device).expand(len(x))
    return score(schedule.noised(x, at, eps), at, list(y)), eps


def _clipped_share(model: Family, x: Tensor) -> float:
    """The share of the latents' values that the model's scheduler would cut off; 0 where it cuts none of note."""
    share = float((x.abs() > model.clip).float().mean())
    return share if share > 0.01 else 0.0
