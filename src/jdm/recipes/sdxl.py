"""Recipes of SDXL at 1024 px, on pictures and captions of your own: functions that return one Run each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from jdm.recipes.sd15 import sd15_canny
from jdm.run import Data, Run

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


def sdxl_canny() -> Run:
    """The one-step canny student of SDXL: Joint Distribution Matching."""
    run = sd15_canny()
    # Paper: SD1.5 only; here: its settings as they are, because none is published for SDXL. t_init, too, is an index
    # into the same schedule. The fake score is a LoRA on the frozen UNet and moments are in 8 bits, because a second
    # full copy of 2.6 billion parameters with its states does not fit 80 GB beside the student.
    eight = {name: replace(getattr(run.method, name), states="8bit")
             for name in ("unet", "controlnet", "fake", "posterior")}
    method = replace(run.method, guidance=5.0, **eight)  # 5: SDXL's own default
    return replace(run, method=method, out=Path("runs/sdxl-canny"), model=SDXL,
                   data=Data(source="my_pictures", size=1024), batch=2)
