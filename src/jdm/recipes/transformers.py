"""Flow-matching transformers: SD3.5 and Z-Image learn a control, and nano-flow, a small model of SD3's format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from jdm.methods.controlnet import ControlNet
from jdm.methods.denoising import Denoising
from jdm.methods.jdm import JDM
from jdm.methods.networks import Student
from jdm.models.nano_flow import FlowConfig
from jdm.recipes.scales import FOUR, NANO, SD15_SCALE, Scale
from jdm.run import Data, Optimiser, Run

SD35, Z_IMAGE = "stabilityai/stable-diffusion-3.5-medium", "Tongyi-MAI/Z-Image"
EIGHT = (999, 874, 749, 624, 499, 374, 249, 124)  # evenly spaced before the shift, as Z-Image's pipeline has them
NOISE = (999,)  # one step, from pure noise


def _lean(guidance: float) -> Scale:
    # Paper: SD1.5 only; here: its group's rates as they are, because none is printed for transformers. Student, fake
    # score and posterior are LoRAs of one frozen backbone in bfloat16. The fake score learns the velocity.
    return replace(SD15_SCALE, guidance=guidance, fake_rank=64)


def _student(s: Scale, method: JDM, levels: tuple[int, ...], control: str) -> JDM:
    student = replace(method.student, levels=levels, rank=64)
    return replace(method, control=control, student=student, fake=replace(method.fake, loss="own"))


def _large(name: str, model: str, method: JDM) -> Run:
    run = SD15_SCALE.run(name, method, batch=1, data=Data(source="my_pictures", size=1024))
    return replace(run, model=model)


def sd35_canny() -> Run:
    """The one-step canny student of SD3.5 medium at 1024 px, as a LoRA and a ControlNet."""
    s = _lean(4.5)
    return _large("sd35-canny", SD35, _student(s, s.jdm(), NOISE, "canny"))


def z_image_canny() -> Run:
    """The one-step canny student of Z-Image at 1024 px, as a LoRA and a ControlNet; for a GPU of 80 GB."""
    s = _lean(4.0)
    return _large("z-image-canny", Z_IMAGE, _student(s, s.jdm(), NOISE, "canny"))


def z_image_scribble_8() -> Run:
    """The eight-step scribble student of Z-Image at 1024 px, hybrid schedule."""
    s = _lean(4.0)
    return _large("z-image-scribble-8", Z_IMAGE, _student(s, s.hybrid(s.jdm()), EIGHT, "scribble"))


# Rates for a transformer of two million parameters.
FLOW_RATE = Optimiser(lr=1e-3, warmup=300)
FLOW_MODEL = "runs/nano-flow-teacher/model"


def nano_flow_teacher() -> Run:
    """nano-flow's transformer and text encoders, from nothing, on the latents of nano-vae."""
    return Run(method=Denoising(network=FlowConfig(), optimiser=FLOW_RATE), out=Path("runs/nano-flow-teacher"),
               steps=20_000, batch=64, ema=0.9995)


def _nano_flow(name: str, method: object, **changes: object) -> Run:
    return NANO.run(name, method, model=FLOW_MODEL, **changes)


def nano_flow_controlnet() -> Run:
    """The multi-step ControlNet of nano-flow: the yardstick."""
    method = ControlNet(optimiser=Optimiser(lr=1e-3, betas=(0.9, 0.95)))
    return _nano_flow("nano-flow-controlnet", method, steps=8000, batch=64, probe_every=0)


def _nano_student(method: JDM, levels: tuple[int, ...]) -> JDM:
    student: Student = replace(method.student, levels=levels)
    return replace(method, student=student, fake=replace(method.fake, loss="own"))


def nano_flow_canny() -> Run:
    """The one-step canny student of nano-flow: Joint Distribution Matching."""
    return _nano_flow("nano-flow-canny", _nano_student(NANO.jdm(), NOISE), steps=6000)


def nano_flow_canny_4() -> Run:
    """The four-step canny student of nano-flow: Joint Distribution Matching, hybrid schedule."""
    return _nano_flow("nano-flow-canny-4", _nano_student(NANO.hybrid(NANO.jdm()), FOUR), steps=6000)
