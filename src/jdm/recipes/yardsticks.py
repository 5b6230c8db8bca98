"""Yardsticks and rivals: what the students are compared with, at the same rates and budget."""

from __future__ import annotations

from dataclasses import replace

from jdm.methods.controlled_teacher import ControlledTeacher
from jdm.methods.controlnet import ControlNet
from jdm.methods.diff_instruct import ImplicitVSD
from jdm.methods.dsm_controlnet import DSMControlNet
from jdm.methods.nct import NCT
from jdm.methods.networks import Branch
from jdm.recipes.scales import Scale
from jdm.run import Optimiser, Run


def controlnet(s: Scale) -> Run:
    """The multi-step ControlNet: the yardstick."""
    rate = Optimiser(lr=1e-3, betas=(0.9, 0.95)) if s.name == "nano" else s.control
    return s.run(f"{s.name}-controlnet", ControlNet(optimiser=rate), steps=8000, batch=64 if s.name == "nano" else 16,
                 probe_every=0)


def implicit(s: Scale) -> Run:
    """Score distillation with a ControlNet and no term for the control (Eq. 12)."""
    plain = s.diff_instruct()
    return s.run(f"{s.name}-implicit", ImplicitVSD("canny", plain.student, Branch(optimiser=s.control), plain.fake,
                                                   plain.fidelity))


def dsm(s: Scale) -> Run:
    """A ControlNet on the frozen one-step generator by denoising (Eq. 11)."""
    return s.run(f"{s.name}-dsm", DSMControlNet(base=s.generator, controlnet=Branch(optimiser=s.adapter)))


def dsm_teacher(s: Scale) -> Run:
    """The same on the frozen multi-step UNet, Eq. 11's subscript phi."""
    return s.run(f"{s.name}-dsm-teacher", DSMControlNet(controlnet=Branch(optimiser=s.adapter)))


def controlled_teacher(s: Scale) -> Run:
    """The multi-step ControlNet distilled with a controlled fake score (Eq. 2)."""
    plain = s.diff_instruct()
    method = ControlledTeacher(s.controlnet, "canny", plain.student, Branch(optimiser=s.control),
                               replace(plain.fake, controlnet=s.fake), plain.fidelity)
    return s.run(f"{s.name}-controlled-teacher", method)


def nct(s: Scale) -> Run:
    """Noise Consistency Training on the frozen Diff-Instruct generator."""
    # Levels, xi and nano-sd's rate are the best of eight short runs on its validation pictures (docs/log.md).
    rate = replace(s.adapter, lr=5e-3) if s.name == "nano" else s.adapter
    return s.run(f"{s.name}-nct", NCT(base=s.generator, levels=1, xi=0.2, controlnet=Branch(optimiser=rate)))


def text_dmd(s: Scale) -> Run:
    """DMD-like: guided real score, DMD's normaliser."""
    return s.run(f"{s.name}-text-dmd", s.diff_instruct(), probe_every=100)


def text_di(s: Scale) -> Run:
    """Diff-Instruct: the same without DMD's normaliser."""
    return s.run(f"{s.name}-text-di", s.diff_instruct(normaliser="none"), probe_every=100)


def text_own(s: Scale) -> Run:
    """The teacher distilled with its own guidance."""
    return s.run(f"{s.name}-text-own", s.text(), model=s.text_teacher, probe_every=100)
