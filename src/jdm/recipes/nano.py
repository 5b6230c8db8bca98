"""Recipes of the nano family, on Fashion-MNIST: functions that return one Run each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from jdm.methods.autoencoder import Autoencoder
from jdm.methods.classification import Classification
from jdm.methods.controlnet import ControlNet
from jdm.methods.denoising import Denoising
from jdm.methods.diff_instruct import DiffInstruct
from jdm.methods.jdm import JDM
from jdm.run import Optimiser, Run


def nano_vae() -> Run:
    """nano-sd's autoencoder, from nothing."""
    return Run(method=Autoencoder(), out=Path("runs/nano-vae"), steps=3600, ema=0.998)


def nano_classifier() -> Run:
    """The classifier that prompt agreement and the Frechet distance read."""
    return Run(method=Classification(), out=Path("runs/nano-classifier"), steps=4300, batch=128)


def nano_teacher() -> Run:
    """nano-sd's UNet and text encoder, from nothing, on the latents of nano-vae."""
    return Run(method=Denoising(), out=Path("runs/nano-teacher"), steps=10_000, batch=64, ema=0.9995)


def nano_controlnet() -> Run:
    """The multi-step canny ControlNet of nano-sd: the yardstick."""
    return Run(method=ControlNet(), out=Path("runs/nano-controlnet"), steps=8000, batch=64)


# Rates for a UNet of 3M parameters, chosen on validation pictures (docs/log.md).
STUDENT, FAKE = Optimiser(lr=1e-4, betas=(0.0, 0.95)), Optimiser(lr=5e-4, betas=(0.0, 0.95))
CONTROL = Optimiser(lr=2e-3, betas=(0.9, 0.95))


def jdm(**changes: Any) -> JDM:
    """JDM at the nano family's rates."""
    method = JDM(condition_clip=(0.3, 0.8), unet=STUDENT, controlnet=CONTROL, fake=FAKE, posterior=FAKE)
    return replace(method, **changes)


def nano_canny() -> Run:
    """The one-step canny student: Joint Distribution Matching."""
    return Run(method=jdm(), out=Path("runs/nano-canny"), steps=6000, batch=32, ema=0.999, probe_every=500)


def nano_canny_own_t() -> Run:
    """Ablation: the condition term draws a t and noise of its own."""
    return replace(nano_canny(), method=jdm(shared_noise=False), out=Path("runs/nano-canny-own-t"))


def nano_diff_instruct() -> Run:
    """The one-step student without control: Diff-Instruct."""
    return replace(nano_canny(), method=DiffInstruct(unet=STUDENT, fake=FAKE), out=Path("runs/nano-diff-instruct"))
