"""Students: generators that answer in one step or a few, with a control or with text alone."""

from __future__ import annotations

from dataclasses import replace

from jdm.methods.decoupled_dmd import DecoupledDMD
from jdm.recipes.scales import FOUR, SD15_SCALE, Scale
from jdm.recipes.yardsticks import nct
from jdm.run import Data, Run
from jdm.terms import Reward


def canny(s: Scale) -> Run:
    """The one-step canny student: Joint Distribution Matching."""
    return s.run(f"{s.name}-canny", s.jdm(), steps=6000)


def shared(s: Scale) -> Run:
    """Phase 2 of the shared generator: a ControlNet for a further control on the canny student's frozen UNet."""
    return s.run(f"{s.name}-shared", replace(s.frozen(s.student_folder), control=s.shared))


def image_prompt(s: Scale) -> Run:
    """A ControlNet for image prompts (draw what looks like this picture) on the frozen Diff-Instruct UNet."""
    return s.run(f"{s.name}-image-prompt", replace(s.frozen(s.generator), control=s.prompted))


def diff_instruct(s: Scale) -> Run:
    """The one-step student without control: Diff-Instruct."""
    return s.run(f"{s.name}-diff-instruct", s.diff_instruct(), steps=6000)


def ddmd_4(s: Scale) -> Run:
    """The four-step student without control: Decoupled DMD, hybrid schedule."""
    plain = DecoupledDMD()
    augmentation = None if plain.augmentation is None else replace(plain.augmentation, weight=s.guidance - 1)
    method = replace(plain, student=replace(plain.student, optimiser=s.student), fake=s.fakes(loss="x0"),
                     augmentation=augmentation)
    return s.run(f"{s.name}-ddmd-4", method, steps=6000)


def canny_4(s: Scale) -> Run:
    """The four-step canny student: Joint Distribution Matching, hybrid schedule."""
    return s.run(f"{s.name}-canny-4", s.hybrid(s.jdm()), steps=6000)


def adapter_4(s: Scale) -> Run:
    """A ControlNet by Joint Distribution Matching on the frozen four-step student."""
    return s.run(f"{s.name}-adapter-4", s.hybrid(s.frozen(s.model("ddmd-4"))))


def nct_4(s: Scale) -> Run:
    """A ControlNet by Noise Consistency Training on the frozen four-step student."""
    return s.run(f"{s.name}-nct-4", replace(nct(s).method, base=s.model("ddmd-4"), base_levels=FOUR))


def text_reward(s: Scale) -> Run:
    """Human-feedback learning on the noisy posterior (Eq. 9)."""
    return s.run(f"{s.name}-text-reward", s.text(reward=_reward(s)), model=s.text_teacher, probe_every=100)


def text_guided_blind(s: Scale) -> Run:
    """A better teacher's guidance, fidelity blind to the prompt: JDM's decoupled CFG, Eq. 5 to the letter."""
    return s.run(f"{s.name}-text-guided-blind", s.text(s.guide, blind=True), model=s.text_teacher, probe_every=100)


def text_both(s: Scale) -> Run:
    """A better teacher's guidance and the reward together."""
    return s.run(f"{s.name}-text-both", s.text(s.guide, _reward(s)), model=s.text_teacher, probe_every=100)


def _reward(s: Scale) -> Reward:
    return Reward(model=s.reward, posterior=s.condition().posterior)


def sd15_canny_lora() -> Run:
    """The canny student on one frozen UNet: student, fake score and posterior are LoRAs of it; for a GPU of 16 GB."""
    # Paper: a full student; here: rank 64 and 8-bit moments, so that a batch of 4 fits. What a student's rank costs in
    # quality has not been measured.
    s = _lean(SD15_SCALE)
    method = s.jdm()
    return s.run("sd15-canny-lora", replace(method, student=replace(method.student, rank=64)), batch=4)


def sd15_hed() -> Run:
    """The one-step HED student."""
    return SD15_SCALE.run("sd15-hed", SD15_SCALE.jdm(control="hed"))


def sd15_depth() -> Run:
    """The one-step depth student."""
    return SD15_SCALE.run("sd15-depth", SD15_SCALE.jdm(control="depth"))


def sd15_sr() -> Run:
    """The one-step 8x super-resolution student."""
    return SD15_SCALE.run("sd15-sr", SD15_SCALE.jdm(control="lowres8"))


def sdxl_canny() -> Run:
    """The one-step canny student of SDXL at 1024 px."""
    # Paper: SD1.5 only; here: its settings as they are, because none is published for SDXL; its level, too, is an index
    # into the same schedule. The fake score is a LoRA on the frozen UNet and moments are in 8 bits, because a second
    # full copy of 2.6 billion parameters with its states does not fit 80 GB beside the student. 5 is SDXL's own
    # default guidance.
    s = replace(_lean(SD15_SCALE), guidance=5.0)
    run = s.run("sdxl-canny", s.jdm(), batch=2, data=Data(source="my_pictures", size=1024))
    return replace(run, model="stabilityai/stable-diffusion-xl-base-1.0")


def _lean(s: Scale) -> Scale:
    """The scale with moments in 8 bits."""
    student, fake, control = (replace(o, states="8bit") for o in (s.student, s.fake, s.control))
    return replace(s, student=student, fake=fake, control=control)
