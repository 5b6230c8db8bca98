"""Emoji: things in six styles at 64 px, in colour, drawn by hand (docs/emoji.md)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from jdm.data.emoji.classes import CLASSES
from jdm.methods.autoencoder import Autoencoder
from jdm.methods.classification import Classification
from jdm.methods.controlnet import ControlNet
from jdm.methods.denoising import Denoising
from jdm.methods.nct import NCT
from jdm.methods.networks import Branch
from jdm.models.classifier import ClassifierConfig
from jdm.models.nano import TeacherConfig, VAEConfig
from jdm.recipes.scales import NANO
from jdm.run import Data, Optimiser, Run

EMOJI = Data(source="emoji", size=64)
STROKES = "strokes"


def _emoji(name: str, method: Any, **changes: Any) -> Run:
    run = Run(method=method, out=Path("runs") / name, data=EMOJI, model="runs/emoji-teacher/model", steps=3000,
              batch=32, ema=0.999, precision="bf16", probe_every=500)
    return replace(run, **changes)


# nano-sd's rates; none has been compared on emoji yet.
SCALE = replace(NANO, name="emoji", run=_emoji, guidance=3.0, student_folder="runs/emoji-strokes/model",
                generator="runs/emoji-diff-instruct/model", controlnet="runs/emoji-controlnet/model")


def emoji_strokes() -> Run:
    """The one-step student that draws what a hand sketches: Joint Distribution Matching."""
    return SCALE.run("emoji-strokes", SCALE.jdm(control=STROKES))


def emoji_shared() -> Run:
    """Phase 2: a ControlNet for blobs of paint, or another control, on the strokes student's frozen UNet."""
    return SCALE.run("emoji-shared", replace(SCALE.frozen(SCALE.student_folder), control="colour-hints"))


def emoji_controlnet() -> Run:
    """The multi-step ControlNet for strokes: the yardstick."""
    method = ControlNet(control=STROKES, optimiser=Optimiser(lr=1e-3, betas=(0.9, 0.95)))
    return SCALE.run("emoji-controlnet", method, probe_every=0)


def emoji_nct() -> Run:
    """Noise Consistency Training for strokes on the frozen Diff-Instruct generator."""
    rate = replace(SCALE.adapter, lr=5e-3)
    return SCALE.run("emoji-nct", NCT(control=STROKES, base=SCALE.generator, levels=1, xi=0.2,
                                      controlnet=Branch(optimiser=rate)))


def emoji_diff_instruct() -> Run:
    """The one-step emoji generator without control: Diff-Instruct."""
    return SCALE.run("emoji-diff-instruct", SCALE.diff_instruct())


def emoji_teacher() -> Run:
    """The UNet and text encoder of 64 px emoji, from nothing, on the latents of the packaged emoji-vae."""
    network = TeacherConfig(widths=(64, 128, 128), text_width=192, text_layers=4, tokens=24, merges=2000, pooled=True,
                            prediction="v_prediction")  # names are learnt sooner so (docs/log.md)
    method = Denoising("emoji-vae", network, optimiser=Optimiser(lr=8e-4, warmup=300))
    return Run(method=method, out=Path("runs/emoji-teacher"), data=EMOJI, steps=5000, batch=64, ema=0.9985,
               precision="bf16")


def emoji_classifier() -> Run:
    """The classifier of style and group that prompt agreement on emoji and their Frechet distance read."""
    config = ClassifierConfig("emoji-classifier", CLASSES, widths=(32, 48, 64, 96), grey=False)
    # No shifts: the pictures were drawn shifted, and a shift here would let black in beside white paper.
    method = Classification(config, shift=0)
    return Run(method=method, out=Path("runs/emoji-classifier"), data=EMOJI, steps=4000, batch=128)


def emoji_vae() -> Run:
    """The autoencoder of 64 px emoji, from nothing, on the pictures of: jdm data emoji data/emoji."""
    method = Autoencoder(VAEConfig(4, (16, 32, 64)), optimiser=Optimiser(lr=1e-3, weight_decay=1e-4))
    return Run(method=method, out=Path("runs/emoji-vae"), data=EMOJI, steps=8000, batch=16, ema=0.999,
               probe_every=1000)
