"""Whether a teacher's parts belong together: one pass that predicts noise which was added to pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jdm.errors import UsageError
from jdm.models.family import Family
from jdm.score import Estimate

FEW = 4  # pictures that errors with right and with wrong prompts are compared on, at least
LEVELS = (0.1, 0.5, 0.9)  # t: nearly clean, in between, nearly noise
LONGER = 1.15  # how much an x0 of the middle level may be longer or shorter than the true one
STRETCHED = 0.05  # how far the length of the noise predicted at the last level may be from that of the best guess
DEAF = 0.88  # error at the last level with the pictures' own prompts over that with one another's, at most
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
        slope = float((estimate.eps * eps).sum() / estimate.eps.square().sum())
        if t == LEVELS[2] and abs(slope - 1) > STRETCHED:
            return (f"the noise it predicts at t = {t} is {1 / slope:.2f} times as long as it should be: {PARTS}, "
                    "above all the scheduler's betas and number of levels, or it was never trained on such pictures")
        if t == LEVELS[1] and not 1 / LONGER <= length <= LONGER:
            return (f"its x0 at t = {t} is {1 / length:.2f} times as long as it should be: {PARTS}, above all the "
                    "scheduler's betas, or it was never trained on such pictures")
    if len(x) >= FEW and (heard := _heard(model, x, y)) > DEAF:
        return (f"its prediction at t = {LEVELS[2]} is no better with a picture's own prompt than with another's (its "
                f"error is {heard:.2f} of that): the text encoder, the tokenizer and the UNet may not be of one model, "
                "or it was never trained on such prompts")
    return ""


def _heard(model: Family, x: Tensor, y: Sequence[str]) -> float:
    """The error at the last level with the right prompts over that with the others'; 0 where all prompts are alike."""
    right = wrong = 0.0
    errors = {k: _errors(model, x, [*y[k:], *y[:k]]) for k in range(len(y))}
    for k in range(1, len(y)):
        others = torch.tensor([a != b for a, b in zip(y, [*y[k:], *y[:k]], strict=True)])
        right, wrong = right + float(errors[0][others].sum()), wrong + float(errors[k][others].sum())
    return right / wrong if wrong else 0.0


def _errors(model: Family, x: Tensor, y: Sequence[str]) -> Tensor:
    """The squared error of the noise predicted for each picture at the last level, [B] on the CPU."""
    estimate, eps = _estimate(model, x, LEVELS[2], y)
    return (estimate.eps - eps).square().flatten(1).mean(1).cpu()


def _estimate(model: Family, x: Tensor, t: float, y: Sequence[str]) -> tuple[Estimate, Tensor]:
    schedule, score = model.schedule, model.score_of(model.text(), model.denoiser())
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(round(1000 * t))).to(x)
    at = schedule.t(max(0, round(t * schedule.n) - 1)).to(x.device).expand(len(x))
    return score(schedule.noised(x, at, eps), at, list(y)), eps


def _clipped_share(model: Family, x: Tensor) -> float:
    """The share of the latents' values that the model's scheduler would cut off; 0 where it cuts none of note."""
    share = float((x.abs() > model.clip).float().mean())
    return share if share > 0.01 else 0.0
