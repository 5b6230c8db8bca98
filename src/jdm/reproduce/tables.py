"""The paper's tables and figures as data: rows, columns, and every published number.

Published numbers are of SD1.5 and stand under the paper's own names: nothing here is on one scale with them.
"""

from __future__ import annotations

from functools import partial

from jdm.reproduce.form import CONTROLNET, CONTROLS, MANY, Published, Row, Table
from jdm.reproduce.models import COLUMN, Composed, Given, Spec, Trained
from jdm.reproduce.studies import STUDIES

# What several rows share.
DIFF_INSTRUCT = Trained("diff-instruct", control="")
PHASE_1 = Trained("canny", control="canny")
PHASE_2 = Trained("shared", needs=(("student.start", PHASE_1),))
WEAK = Trained("weak-teacher", control="", needs=(("vae", Given(part="vae")),))


def _trained(path: str, model: Spec, recipe: str, *needs: tuple[str, Spec], control: str = COLUMN) -> Trained:
    """The model that a recipe trains, given another one at that path of its method."""
    return Trained(recipe, control, ((path, model), *needs))


_on_diff_instruct = partial(_trained, "base", DIFF_INSTRUCT)
_from_diff_instruct = partial(_trained, "student.start", DIFF_INSTRUCT)
_on_weak = partial(_trained, "model", WEAK, control="")
FROZEN = _from_diff_instruct("no-warm-up")
_new = partial(Row, part="In no paper", beside="no-warm-up")
BOLTED = Row("di-controlnet", "DI + ControlNet", Composed(DIFF_INSTRUCT, CONTROLNET), published="di-controlnet")
SHARED = Row("jdm", "JDM", PHASE_2, on={"canny": PHASE_1}, published="jdm")
JOINT = Row("jdm-joint", "JDM, its UNet trained on for each control",
            Trained("joint", needs=(("student.start", PHASE_1),)), default=CONTROLS[1:])
FROZEN_DI = Row("frozen-di", "JDM on a frozen Diff-Instruct UNet", FROZEN, published="jdm-dagger")
RIVAL = Row("nct", "NCT", _on_diff_instruct("nct"), published="nct")
TWO_STAGES = Row("controlled-teacher", "controlled teacher, then distilled",
                 Trained("controlled-teacher", needs=(("teacher", CONTROLNET),)), default=("canny",))

# FID and mean |h(x) - c| per pixel. All but the first row, and JDM's own average, were printed by NCT.
METHODS = {
    "controlnet": Published("ControlNet", 50, {
        "canny": (14.48, 0.113), "HED": (19.21, 0.101), "depth": (15.25, 0.093), "8x SR": (11.93, 0.065),
        "average": (15.22, 0.093)}),
    "di-controlnet": Published("DI + ControlNet", 1, {
        "canny": (22.74, 0.141), "HED": (28.04, 0.113), "depth": (22.49, 0.097), "8x SR": (15.57, 0.126),
        "average": (22.21, 0.119)}),
    # Of its consistency the paper says that it is 24% better on average; what it prints by control could not be read.
    "jdm": Published("JDM, its own paper", 1, {"average": (14.58, None)}),
    "jdm-dagger": Published("JDM, re-run by NCT on a frozen DI generator", 1, {
        "canny": (14.35, 0.122), "HED": (16.75, 0.055), "depth": (16.71, 0.093), "8x SR": (13.23, 0.068),
        "average": (15.26, 0.085)}),
    "nct": Published("NCT", 1, {
        "canny": (13.67, 0.110), "HED": (14.96, 0.060), "depth": (16.45, 0.088), "8x SR": (12.17, 0.053),
        "average": (14.31, 0.078)}),
}
BASELINES = METHODS | {
    "dsm": Published("ControlNet by denoising (DSM)", 1, {"canny": (28.83, 0.109), "depth": (35.14, 0.094)}),
    "implicit": Published("implicit VSD", 1, {"canny": (22.87, 0.151), "depth": (22.34, 0.150)}),
    "nct-no-consistency": Published("NCT without L_con", 1, {"canny": (20.56, 0.165)}),
    "nct-no-boundary": Published("NCT without L_bound", 1, {"canny": (216.93, 0.113)}),
    "nct-no-dual": Published("NCT without primal-dual", 1, {"canny": (14.13, 0.117)}),
}
# Table 3 of the paper, whole: backbone, human-feedback learning, steps; HPSv2.1 on animation, concept art, painting and
# photographs, and its average; aesthetic score; CLIP score.
TEXT_HEAD = ("model", "backbone", "HFL", "steps", "animation", "concept art", "painting", "photo", "HPS average",
             "aesthetic", "CLIP")
TEXT_PUBLISHED = (
    ("Base model", "SD1.5", "no", 25, 26.29, 24.85, 24.87, 26.01, 25.50, 5.49, 33.03),
    ("Base model", "SD2.1", "no", 25, 27.82, 27.14, 27.17, 28.17, 27.58, 5.66, 33.46),
    ("SD Turbo", "SD2.1", "no", 1, 28.30, 26.92, 26.43, 25.54, 26.80, 5.31, 32.21),
    ("InstaFlow", "SD1.5", "no", 1, 23.17, 23.04, 22.73, 22.97, 22.98, 5.25, 31.97),
    ("TCD", "SD1.5", "no", 4, 23.14, 21.11, 21.08, 23.62, 22.24, 5.43, 29.07),
    ("LCM-dreamshaper", "SD1.5", "no", 4, 26.51, 26.40, 25.96, 24.32, 25.80, 5.94, 31.55),
    ("PeRFlow", "SD1.5", "no", 4, 22.79, 22.17, 21.28, 23.50, 22.43, 5.35, 30.77),
    ("DMD2", "SD1.5", "no", 1, 24.17, 22.68, 22.97, 24.30, 23.53, 5.82, 30.92),
    ("Diff-Instruct", "SD1.5", "no", 1, 27.32, 26.15, 26.41, 25.50, 26.35, 5.71, 32.08),
    ("Hyper-SD", "SD1.5", "yes", 1, 28.65, 28.16, 28.41, 26.90, 28.01, 5.64, 30.87),
    ("JDM with HFL", "SD1.5", "yes", 1, 30.16, 29.17, 30.14, 28.35, 29.46, 5.89, 33.75),
    ("JDM with better CFG", "SD1.5", "no", 1, 30.56, 29.46, 30.38, 28.59, 29.75, 5.90, 33.97),
)

TABLE_1 = Table("table1", "methods and controls", (MANY, BOLTED, SHARED, JOINT, FROZEN_DI, RIVAL, TWO_STAGES),
                published=METHODS)

DSM = Row("dsm", "ControlNet by denoising on the one-step generator", _on_diff_instruct("dsm"), published="dsm")
DSM_TEACHER = Row("dsm-teacher", "the same on the teacher's UNet", Trained("dsm-teacher"))
IMPLICIT = Row("implicit", "implicit VSD", Trained("implicit"), published="implicit")
TABLE_2 = Table("table2", "ablations and potential baselines", (
    Row("jdm", "JDM", Trained("jdm"), published="jdm"),
    Row("no-warm-up", "without warm-up: a frozen Diff-Instruct UNet", FROZEN, published="jdm-dagger"),
    Row("clean-likelihood", "without p(c|x_t): p(c|x)", Trained("clean-likelihood")),
    Row("fake-x0", "p(x|x_t) by the fake score's own x0", Trained("fake-x0")),
    Row("own-t", "the condition term at a t and noise of its own", Trained("canny-own-t", like="jdm")),
    DSM, DSM_TEACHER, IMPLICIT, RIVAL,
    Row("nct-no-consistency", "NCT without consistency", _on_diff_instruct("nct-no-consistency"),
        published="nct-no-consistency"),
    Row("nct-no-boundary", "NCT without boundary", _on_diff_instruct("nct-no-boundary"), published="nct-no-boundary"),
    Row("nct-no-dual", "NCT without primal-dual", _on_diff_instruct("nct-no-dual"), published="nct-no-dual"),
    Row("low-t", "the condition term at low noise levels of its own", Trained("low-t"), part="In no paper",
        beside="own-t"),
    _new("controlled-fake", "without warm-up, (a): a fake score that sees c, the exact joint KL",
        _from_diff_instruct("controlled-fake")),
    _new("draws", "without warm-up, (b): four samples of p(x|x_t)", _from_diff_instruct("draws")),
    _new("frozen-posterior", "without warm-up, (c): a frozen posterior of real pictures",
        _from_diff_instruct("frozen-posterior", ("condition.posterior.model", Trained("posterior", control="")))),
    _new("from-nct", "without warm-up, its ControlNet NCT's first",
         _from_diff_instruct("from-nct", ("controlnet.start", RIVAL.spec))),
    Row("one-t", "without warm-up, one noise level for both terms", _from_diff_instruct("one-t"), beside="no-warm-up"),
    Row("unfrozen", "without warm-up, the UNet trained on", _from_diff_instruct("unfrozen"), beside="no-warm-up"),
), columns=("canny", "depth"), published=BASELINES)

GUIDE = ("guidance.teacher", Given(guide=True))
REWARD = Row("reward", "JDM + HFL (Eq. 9, on the noisy posterior)", _on_weak("text-reward"))
REWARD_CLEAN = Row("reward-clean", "HFL on the clean sample", _on_weak("text-reward-clean"))
OWN = Row("own", "its own guidance, no reward", _on_weak("text-own"))
TABLE_3 = Table("table3", "text-to-image", (
    Row("weak", "base: the weak teacher, 25 steps", WEAK, steps=25, guidance=2.0),
    Row("base", "base: the full teacher, 25 steps", Given(guide=True), steps=25, guidance=2.0),
    Row("di", "Diff-Instruct", _on_weak("text-di")),
    Row("dmd", "DMD-like (DMD's normaliser)", _on_weak("text-dmd")),
    OWN, REWARD, REWARD_CLEAN,
    Row("guided", "JDM + better CFG, fidelity on the prompt", _on_weak("text-guided", GUIDE)),
    Row("guided-blind", "JDM + better CFG, fidelity blind to the prompt (Eq. 5)",
        _on_weak("text-guided-blind", GUIDE)),
    Row("both", "JDM + better CFG + HFL", _on_weak("text-both", GUIDE)),
), columns=(), measures=("prompt_agreement", "judge", "judge_accuracy", "fd", "fd_efflite0", "diversity"),
    theirs=(TEXT_HEAD, *TEXT_PUBLISHED),
    theirs_note="Published, on SD1.5 with HPSv2.1 and its four styles, aesthetic and CLIP scores: other pictures, "
                "other measurements, for reference only.")

FIG_1 = Table("fig1", "the ControlNet over guidance, beside JDM", (
    *(Row(f"guidance-{w:g}", f"ControlNet, 50 steps, guidance {w:g}", CONTROLNET, steps=50, guidance=w)
      for w in (1.0, 2.0, 3.0, 5.0, 7.5)), SHARED),
    columns=("canny",), measures=("fd", "consistency", "prompt_agreement", "std"), picture=True, n=1000)
FIG_3 = Table("fig3", "the baselines on one control and noise",
              (MANY, BOLTED, DSM, DSM_TEACHER, IMPLICIT, RIVAL, SHARED), columns=("canny",), picture=True, n=1000)
FIG_6 = Table("fig6", "reward on clean samples and on the noisy posterior", (
    OWN, REWARD_CLEAN, REWARD,
    Row("clean-strong", "HFL on the clean sample, weight 20, bound 4", _on_weak("text-reward-clean-strong")),
    Row("strong", "HFL on the noisy posterior, weight 20, bound 4", _on_weak("text-reward-strong")),
), columns=(), measures=("judge", "judge_accuracy", "prompt_agreement", "fd"), picture=True, n=1000)
TABLES = {table.name: table for table in (TABLE_1, TABLE_2, TABLE_3, FIG_1, FIG_3, FIG_6)} | STUDIES
