"""Recipes of the nano family's reward and of its judge: two networks of two kinds, on two halves of the pictures."""

from __future__ import annotations

from pathlib import Path

from jdm.methods.classification import Classification
from jdm.models.classifier import ClassifierConfig
from jdm.run import Data, Optimiser, Run

# Neither half has a picture of the other: what the judge confirms is not what the reward remembers.
REWARD, JUDGE = Data(split="train[:27500]"), Data(split="train[27500:]")


def nano_reward() -> Run:
    """The classifier that nano-sd's human-feedback runs climb: convolutions, on the first half of the pictures."""
    config = ClassifierConfig(name="nano-reward", widths=(32, 64, 96, 128), dimensions=96)
    return Run(method=Classification(config), out=Path("runs/nano-reward"), data=REWARD, steps=4300, batch=128)


def nano_judge() -> Run:
    """The classifier that judges those runs and is never climbed: a mixer, on the second half of the pictures."""
    config = ClassifierConfig(name="nano-judge", trunk="mixer", widths=(32, *[64] * 5), dimensions=96)
    # Shifts of one pixel: a mixer has no convolution's indifference to them, and learns each for itself.
    method = Classification(config, shift=1, optimiser=Optimiser(lr=2e-3, weight_decay=5e-2))
    return Run(method=method, out=Path("runs/nano-judge"), data=JUDGE, steps=8600, batch=64)
