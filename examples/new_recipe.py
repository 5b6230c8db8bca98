"""A new recipe: JDM with a CFG-augmentation term that draws noise levels of its own."""

from dataclasses import replace

from jdm.levels import Levels
from jdm.recipes import find
from jdm.run import Run
from jdm.terms import CFGAugmentation, Fidelity


def recipe() -> Run:
    """nano-canny with fidelity unguided and guidance as a term, at the noisier levels."""
    run = find("nano-canny")()
    augmentation = CFGAugmentation(weight=1.0, normaliser="fake", levels=Levels(0.3, 0.98, "augmentation"))
    method = replace(run.method, fidelity=Fidelity(guidance=1.0), augmentation=augmentation)
    return replace(run, method=method)
