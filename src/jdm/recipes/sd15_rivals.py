"""Baselines, ablations and rivals of sd15-canny, with its rates and budget: what `jdm reproduce --scale sd15` trains.

Rows that sd15.py has a recipe of already are its own (`reproduce/scales.py`).

Every recipe takes another control by `--method.control`. Nothing here has been trained; settings that were chosen on
nano-sd's validation pictures say so.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jdm.methods.controlled_teacher import ControlledTeacher
from jdm.methods.controlnet import ControlNet
from jdm.methods.diff_instruct import DiffInstruct
from jdm.methods.dsm_controlnet import DSMControlNet
from jdm.methods.nct import NCT
from jdm.methods.posterior_training import PosteriorTraining
from jdm.recipes.nano_rivals import LOW
from jdm.recipes.sd15 import CONTROL, FAKE, FAKE_RANK, GUIDANCE, STUDENT, T_INIT, _frozen, _jdm, _run
from jdm.run import Run

ONE_STEP = "runs/sd15-diff-instruct/model"  # the frozen generator of NCT, DSM and the row without warm-up


def _score_distilled(**changes: Any) -> DiffInstruct:
    method = DiffInstruct(t_init=T_INIT, guidance=GUIDANCE, fake_rank=FAKE_RANK, unet=STUDENT, controlnet=CONTROL,
                          fake=FAKE)
    return replace(method, **changes)


def sd15_controlnet() -> Run:
    """The multi-step ControlNet of SD1.5: the yardstick."""
    return _run("sd15-controlnet", ControlNet(optimiser=CONTROL))


def sd15_diff_instruct() -> Run:
    """The one-step SD1.5 without control: Diff-Instruct."""
    return _run("sd15-diff-instruct", _score_distilled())


def sd15_joint() -> Run:
    """What phase 2 leaves out: the UNet of phase 1 trained on for the further control, together with its ControlNet."""
    return _run("sd15-joint", _frozen("runs/sd15-canny/model", control="depth", train_unet=True))


def sd15_no_warm_up() -> Run:
    """Ablation: a frozen Diff-Instruct UNet in place of phase 1."""
    return _run("sd15-no-warm-up", _frozen(ONE_STEP))


def sd15_clean_likelihood() -> Run:
    """Ablation: log p(c | x) on the clean sample in place of log p(c | x_t)."""
    return _run("sd15-clean-likelihood", _jdm(condition_on="sample"))


def sd15_fake_x0() -> Run:
    """Ablation: the fake score's own x0 as the posterior's sample, the paper's easy way."""
    return _run("sd15-fake-x0", _jdm(condition_on="fake"))


def sd15_canny_own_t() -> Run:
    """Ablation: the condition term draws a t and noise of its own."""
    return _run("sd15-canny-own-t", _jdm(shared_noise=False))


def sd15_low_t() -> Run:
    """The condition term at low noise levels of its own: two schedules, as Decoupled DMD has."""
    return _run("sd15-low-t", _jdm(shared_noise=False, condition_range=LOW))


def sd15_implicit() -> Run:
    """Baseline: score distillation with a ControlNet that nothing asks to obey (Eq. 12)."""
    return _run("sd15-implicit", _score_distilled(control="canny"))


def sd15_dsm() -> Run:
    """Baseline: a ControlNet on the frozen one-step generator by denoising (Eq. 11)."""
    return _run("sd15-dsm", DSMControlNet(base=ONE_STEP, t_init=T_INIT, optimiser=CONTROL))


def sd15_dsm_teacher() -> Run:
    """Baseline: the same on the frozen multi-step UNet, Eq. 11's subscript phi."""
    return _run("sd15-dsm-teacher", DSMControlNet(t_init=T_INIT, optimiser=CONTROL))


def sd15_controlled_teacher() -> Run:
    """Baseline: the multi-step ControlNet distilled with a controlled fake score (Eq. 2)."""
    method = ControlledTeacher(teacher="runs/sd15-controlnet/model", t_init=T_INIT, guidance=GUIDANCE, unet=STUDENT,
                               controlnet=CONTROL, fake=FAKE)
    return _run("sd15-controlled-teacher", method)


def sd15_nct() -> Run:
    """Rival: Noise Consistency Training on the frozen Diff-Instruct generator."""
    # Levels and xi as chosen on nano-sd (docs/log.md).
    return _run("sd15-nct", NCT(base=ONE_STEP, t_init=T_INIT, levels=1, xi=0.2, controlnet=CONTROL))


def _nct(name: str, **changes: Any) -> Run:
    return _run(name, replace(sd15_nct().method, **changes))


def sd15_nct_no_consistency() -> Run:
    """NCT's ablation without its consistency loss."""
    return _nct("sd15-nct-no-consistency", consistency=False)


def sd15_nct_no_boundary() -> Run:
    """NCT's ablation without its boundary loss."""
    return _nct("sd15-nct-no-boundary", boundary=False)


def sd15_nct_no_dual() -> Run:
    """NCT's ablation with a fixed multiplier."""
    return _nct("sd15-nct-no-dual", dual_rate=0.0)


def sd15_posterior() -> Run:
    """A posterior of real pictures, to be frozen."""
    return _run("sd15-posterior", PosteriorTraining(optimiser=CONTROL))


def sd15_controlled_fake() -> Run:
    """The exact joint KL: a fake score that sees c in the fidelity term."""
    return _run("sd15-controlled-fake", _frozen(ONE_STEP, fake_sees_control=True))


def sd15_draws() -> Run:
    """Four samples of p(x | x_t) in the condition term."""
    return _run("sd15-draws", _frozen(ONE_STEP, draws=4))


def sd15_frozen_posterior() -> Run:
    """A frozen posterior of real pictures in the condition term."""
    return _run("sd15-frozen-posterior", _frozen(ONE_STEP, frozen_posterior="runs/sd15-posterior/model"))


def sd15_from_nct() -> Run:
    """JDM that goes on from the ControlNet of NCT."""
    return _run("sd15-from-nct", _frozen(ONE_STEP, controlnet_start="runs/sd15-nct/model"))


def sd15_one_t() -> Run:
    """One noise level for both terms, as Eq. 5 has it, in place of two schedules."""
    return _run("sd15-one-t", _frozen(ONE_STEP, shared_noise=True))


def sd15_unfrozen() -> Run:
    """The Diff-Instruct UNet trained on, together with the ControlNet."""
    return _run("sd15-unfrozen", _frozen(ONE_STEP, train_unet=True))
