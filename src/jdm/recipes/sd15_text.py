"""Text-to-image students of SD1.5: the rows of the paper's table 3 that can be trained; none has been."""

from __future__ import annotations

from jdm.recipes.nano_text import STRONG
from jdm.recipes.sd15 import SD21, _run, _text
from jdm.recipes.sd15_rivals import _score_distilled
from jdm.run import Run

REWARD = "image-reward"


def sd15_text_di() -> Run:
    """The Diff-Instruct row: the same without DMD's normaliser."""
    return _run("sd15-text-di", _score_distilled(weighting="x0"))


def sd15_text_own() -> Run:
    """SD1.5 distilled with its own guidance."""
    return _run("sd15-text-own", _text())


def sd15_text_guided() -> Run:
    """SD1.5 distilled with SD2.1's guidance; fidelity on the prompt."""
    return _run("sd15-text-guided", _text(guide=SD21))


def sd15_text_reward_clean() -> Run:
    """The same reward on the clean sample."""
    return _run("sd15-text-reward-clean", _text(reward=REWARD, reward_on="sample"))


def sd15_text_reward_strong() -> Run:
    """The reward on the noisy posterior, up to four times the fidelity term's length: where hacking shows."""
    return _run("sd15-text-reward-strong", _text(reward=REWARD, **STRONG))


def sd15_text_reward_clean_strong() -> Run:
    """The same strength on the clean sample."""
    return _run("sd15-text-reward-clean-strong", _text(reward=REWARD, reward_on="sample", **STRONG))


def sd15_text_both() -> Run:
    """SD2.1's guidance and the reward together."""
    return _run("sd15-text-both", _text(guide=SD21, reward=REWARD))
