"""Building blocks: teachers, autoencoders, classifiers and posteriors that other recipes start from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from jdm.methods.autoencoder import Autoencoder
from jdm.methods.classification import Classification
from jdm.methods.denoising import Denoising
from jdm.methods.posterior_training import PosteriorTraining
from jdm.models.classifier import ClassifierConfig
from jdm.recipes.scales import NANO, Scale
from jdm.run import Data, Optimiser, Run


def posterior(s: Scale) -> Run:
    """A posterior of real pictures, to be frozen."""
    rate = Optimiser(lr=5e-4, betas=(0.9, 0.95)) if s.name == "nano" else s.control
    return s.run(f"{s.name}-posterior", PosteriorTraining(optimiser=rate), batch=64 if s.name == "nano" else 16,
                 probe_every=0)


def nano_vae() -> Run:
    """nano-sd's autoencoder, from nothing."""
    return Run(method=Autoencoder(), out=Path("runs/nano-vae"), steps=3600, ema=0.998)


def nano_teacher() -> Run:
    """nano-sd's UNet and text encoder, from nothing, on the latents of nano-vae."""
    return Run(method=Denoising(), out=Path("runs/nano-teacher"), steps=10_000, batch=64, ema=0.9995)


def nano_weak_teacher() -> Run:
    """A deliberately weaker nano-sd: a tenth of its training."""
    return replace(nano_teacher(), out=Path("runs/nano-weak-teacher"), steps=1000, ema=0.995)


def nano_classifier() -> Run:
    """The classifier that prompt agreement and the Frechet distance read."""
    return Run(method=Classification(), out=Path("runs/nano-classifier"), steps=4300, batch=128)


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


def nano_jdm() -> Run:
    """JDM at the tables' budget: what its ablations are compared with."""
    return NANO.run("nano-jdm", NANO.jdm())
