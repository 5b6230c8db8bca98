"""Text-to-image students of nano-sd: rewards and another teacher's guidance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from jdm.methods.diff_instruct import DiffInstruct
from jdm.methods.text_to_image import TextToImage
from jdm.recipes.nano import FAKE, STUDENT, nano_teacher
from jdm.recipes.nano_rivals import BATCH, STEPS
from jdm.run import Run

STRONG = {"reward_weight": 20.0, "reward_clip": 4.0}  # a reward that outruns the fidelity term: to see it hacked
WEAK = "runs/nano-weak-teacher/model"  # the teacher that needs a better one's guidance, as SD1.5 needs SD2.1's


def _row(name: str, **changes: Any) -> Run:
    method = TextToImage(unet=STUDENT, fake=FAKE, posterior=FAKE, **changes)
    return Run(method=method, out=Path("runs") / name, steps=STEPS, batch=BATCH, ema=0.999, probe_every=100)


def nano_weak_teacher() -> Run:
    """A deliberately weaker nano-sd: a tenth of its training."""
    return replace(nano_teacher(), out=Path("runs/nano-weak-teacher"), steps=1000, ema=0.995)


def nano_text_dmd() -> Run:
    """The DMD-like row: guided real score, DMD's normaliser."""
    return replace(_row("nano-text-dmd"), method=DiffInstruct(unet=STUDENT, fake=FAKE))


def nano_text_di() -> Run:
    """The Diff-Instruct row: the same without DMD's normaliser."""
    return replace(_row("nano-text-di"), method=DiffInstruct(weighting="x0", unet=STUDENT, fake=FAKE))


def nano_text_own() -> Run:
    """The weak teacher distilled with its own guidance."""
    return replace(_row("nano-text-own"), model=WEAK)


def nano_text_guided() -> Run:
    """The weak teacher distilled with nano-sd's guidance; fidelity on the prompt."""
    return replace(_row("nano-text-guided", guide="nano-sd"), model=WEAK)


def nano_text_guided_blind() -> Run:
    """The same with fidelity blind to the prompt, Eq. 5 to the letter."""
    return replace(_row("nano-text-guided-blind", guide="nano-sd", fidelity="blind"), model=WEAK)


def nano_text_reward() -> Run:
    """Human-feedback learning on the noisy posterior (Eq. 9)."""
    return replace(_row("nano-text-reward", reward="nano-reward"), model=WEAK)


def nano_text_reward_clean() -> Run:
    """The same reward on the clean sample."""
    return replace(_row("nano-text-reward-clean", reward="nano-reward", reward_on="sample"), model=WEAK)


def nano_text_reward_strong() -> Run:
    """The reward on the noisy posterior, up to four times the fidelity term's length: where hacking shows."""
    return replace(_row("nano-text-reward-strong", reward="nano-reward", **STRONG), model=WEAK)


def nano_text_reward_clean_strong() -> Run:
    """The same strength on the clean sample."""
    row = _row("nano-text-reward-clean-strong", reward="nano-reward", reward_on="sample", **STRONG)
    return replace(row, model=WEAK)


def nano_text_both() -> Run:
    """Another teacher's guidance and the reward together."""
    return replace(_row("nano-text-both", guide="nano-sd", reward="nano-reward"), model=WEAK)
