"""Baselines, ablations and rivals of the canny student on nano-sd, each with the student's own rates and budget.

Every recipe takes another control by `--method.control`; out folders follow with `--out`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from jdm.methods.controlled_teacher import ControlledTeacher
from jdm.methods.diff_instruct import DiffInstruct
from jdm.methods.dsm_controlnet import DSMControlNet
from jdm.methods.jdm import JDM
from jdm.methods.nct import NCT
from jdm.methods.posterior_training import PosteriorTraining
from jdm.recipes.nano import CONTROL, FAKE, STUDENT, jdm
from jdm.run import Optimiser, Run

# One budget for every row of a table: samples and updates, not seconds.
STEPS, BATCH = 1500, 32
ADAPTER = Optimiser(lr=2e-3, betas=(0.9, 0.95))
LOW = (0.02, 0.3)  # noise levels at which the posterior's one sample points the right way


def _row(name: str, method: Any, **changes: Any) -> Run:
    return replace(Run(method=method, out=Path("runs") / name, steps=STEPS, batch=BATCH, ema=0.999, probe_every=500),
                   **changes)


# A ControlNet alone, on a UNet that draws well already, so that the control may weigh more: levels, weight and bound
# are the best of nine short runs on validation pictures (docs/log.md).
FROZEN: dict[str, Any] = {"train_unet": False, "shared_noise": False, "condition_range": LOW, "condition_weight": 4.0,
                          "condition_clip": (2.0, 0.8)}


def frozen(start: str, **changes: Any) -> JDM:
    """JDM on the frozen UNet of `start`."""
    return jdm(**{"start": start, **FROZEN, **changes})


def nano_jdm() -> Run:
    """JDM at the tables' budget: what its ablations are compared with."""
    return _row("nano-jdm", jdm())


def nano_shared() -> Run:
    """Phase 2 of the shared generator: a new ControlNet on the shipped student's frozen UNet."""
    return _row("nano-shared", frozen("nano-canny", control="soft-edge"))


def nano_joint() -> Run:
    """What phase 2 leaves out: the UNet of phase 1 trained on for the further control, together with its ControlNet."""
    return _row("nano-joint", frozen("nano-canny", control="soft-edge", train_unet=True))


def nano_no_warm_up() -> Run:
    """Ablation: a frozen Diff-Instruct UNet in place of phase 1."""
    return _row("nano-no-warm-up", frozen("nano-diff-instruct"))


def nano_clean_likelihood() -> Run:
    """Ablation: log p(c | x) on the clean sample in place of log p(c | x_t)."""
    return _row("nano-clean-likelihood", jdm(condition_on="sample"))


def nano_fake_x0() -> Run:
    """Ablation: the fake score's own x0 as the posterior's sample, the paper's easy way."""
    return _row("nano-fake-x0", jdm(condition_on="fake"))


def nano_low_t() -> Run:
    """The condition term at low noise levels of its own: two schedules, as Decoupled DMD has."""
    return _row("nano-low-t", jdm(shared_noise=False, condition_range=LOW))


def nano_implicit() -> Run:
    """Baseline: score distillation with a ControlNet that nothing asks to obey (Eq. 12)."""
    return _row("nano-implicit", DiffInstruct(control="canny", unet=STUDENT, controlnet=CONTROL, fake=FAKE))


def nano_dsm() -> Run:
    """Baseline: a ControlNet on the frozen one-step generator by denoising (Eq. 11)."""
    return _row("nano-dsm", DSMControlNet(base="nano-diff-instruct", optimiser=ADAPTER))


def nano_dsm_teacher() -> Run:
    """Baseline: the same on the frozen multi-step UNet, Eq. 11's subscript phi."""
    return _row("nano-dsm-teacher", DSMControlNet(optimiser=ADAPTER))


def nano_controlled_teacher() -> Run:
    """Baseline: the multi-step ControlNet distilled with a controlled fake score (Eq. 2)."""
    return _row("nano-controlled-teacher", ControlledTeacher(unet=STUDENT, controlnet=CONTROL, fake=FAKE))


def nano_nct() -> Run:
    """Rival: Noise Consistency Training on the frozen Diff-Instruct generator."""
    # Levels, xi and the rate are the best of eight short runs on validation pictures (docs/log.md).
    return _row("nano-nct", NCT(base="nano-diff-instruct", levels=1, xi=0.2, controlnet=replace(ADAPTER, lr=5e-3)))


def nano_nct_no_consistency() -> Run:
    """NCT's ablation without its consistency loss."""
    return replace(nano_nct(), method=replace(nano_nct().method, consistency=False),
                   out=Path("runs/nano-nct-no-consistency"))


def nano_nct_no_boundary() -> Run:
    """NCT's ablation without its boundary loss."""
    return replace(nano_nct(), method=replace(nano_nct().method, boundary=False), out=Path("runs/nano-nct-no-boundary"))


def nano_nct_no_dual() -> Run:
    """NCT's ablation with a fixed multiplier."""
    return replace(nano_nct(), method=replace(nano_nct().method, dual_rate=0.0), out=Path("runs/nano-nct-no-dual"))


def nano_posterior() -> Run:
    """A posterior of real pictures, to be frozen."""
    rate = Optimiser(lr=5e-4, betas=(0.9, 0.95))
    return _row("nano-posterior", PosteriorTraining(optimiser=rate), batch=64, probe_every=0)


# What could make JDM better, each on the frozen Diff-Instruct UNet, as nano-no-warm-up and NCT are.
def nano_controlled_fake() -> Run:
    """The exact joint KL: a fake score that sees c in the fidelity term."""
    return _row("nano-controlled-fake", frozen("nano-diff-instruct", fake_sees_control=True))


def nano_draws() -> Run:
    """Four samples of p(x | x_t) in the condition term."""
    return _row("nano-draws", frozen("nano-diff-instruct", draws=4))


def nano_frozen_posterior() -> Run:
    """A frozen posterior of real pictures in the condition term."""
    return _row("nano-frozen-posterior",
                frozen("nano-diff-instruct", frozen_posterior="runs/nano-posterior/model"))


def nano_from_nct() -> Run:
    """JDM that goes on from the ControlNet of NCT."""
    return _row("nano-from-nct", frozen("nano-diff-instruct", controlnet_start="runs/nano-nct/model"))


def nano_one_t() -> Run:
    """One noise level for both terms, as Eq. 5 has it, in place of two schedules."""
    return _row("nano-one-t", frozen("nano-diff-instruct", shared_noise=True))


def nano_unfrozen() -> Run:
    """The Diff-Instruct UNet trained on, together with the ControlNet."""
    return _row("nano-unfrozen", frozen("nano-diff-instruct", train_unet=True))
