"""A model of a few thousand parameters and runs of a few steps: whatever the tests train."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from jdm.models import nano
from jdm.models.classifier import Classifier, ClassifierConfig
from jdm.models.folder import save_pipeline
from jdm.models.stable_diffusion import StableDiffusion
from jdm.rewards import PromptClassifier
from jdm.run import Data, Run

DATA = Data(split="test[:64]", validation="test[64:128]")
# What a method's fields that name a model stand for: folders beside the tiny teacher's.
STAND_INS = {"start": "student", "base": "student", "teacher": "controlled", "guide": "teacher",
             "frozen_posterior": "teacher", "controlnet_start": "student", "vae": "teacher/vae"}
NETWORKS = ("hed", "depth")  # controls whose weights would be fetched


def model() -> StableDiffusion:
    """Random weights in nano-sd's shapes, with two pictures' worth of width."""
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=nano.LATENT_CHANNELS, out_channels=nano.LATENT_CHANNELS,
        block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=8, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=nano.TEXT_WIDTH)
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=nano.LATENT_CHANNELS, sample_size=nano.SIZE,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False)
    tokenizer = nano.tokenizer(["a photo of an ankle boot", "a coat", "one dress"])
    parts = StableDiffusion(unet, vae, nano.text_encoder(tokenizer), tokenizer, nano.SCHEDULER)
    for part in parts.modules().values():
        part.eval().requires_grad_(False)
    return parts


def with_controlnet(teacher: StableDiffusion) -> StableDiffusion:
    """With a ControlNet that speaks up: no convolution of it is zero."""
    controlnet = teacher.new_controlnet().eval().requires_grad_(False)
    for parameter in controlnet.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return teacher.with_networks(controlnet=controlnet)


def student(teacher: StableDiffusion, folder: Path) -> Path:
    """The folder of a one-step student with a ControlNet."""
    card = {"kind": "one-step", "method": "jdm", "control": "canny", "levels": [625]}
    return save_pipeline(with_controlnet(teacher), folder, teacher.step_scheduler([625]), card=card)


def family(folder: Path) -> Path:
    """The teacher's folder; beside it `controlled`, it with a multi-step ControlNet, and `student`."""
    teacher = model()
    student(teacher, folder / "student")
    save_pipeline(with_controlnet(teacher), folder / "controlled", card={"kind": "many-step", "control": "canny"})
    return save_pipeline(teacher, folder / "teacher")


def run(recipe: Run, out: Path, teacher: Path, steps: int = 2, **changes) -> Run:
    """A recipe cut down to a few steps of the tiny models of `family` on packaged pictures."""
    method = recipe.method
    small: dict[str, Any] = {k: str(teacher.parent / v) for k, v in STAND_INS.items()
                             if isinstance(getattr(method, k, None), str) and getattr(method, k)}
    if getattr(method, "reward", ""):
        small["reward"] = f"{__file__}:Taste"
    if getattr(method, "control", "") in NETWORKS:
        small["control"] = "soft-edge"
    if hasattr(method, "rank"):
        small["rank"] = 2
    whole = replace(recipe, method=replace(method, **small), out=out, model=str(teacher), data=DATA, steps=steps,
                    batch=4, device="cpu", probe_every=0, save_every=1, log_every=1)
    return replace(whole, **changes)


@cache
def judge() -> Classifier:
    """An untrained classifier, where the shipped one would be read."""
    with torch.random.fork_rng():  # a run that meets it first must draw what one that meets it later draws
        torch.manual_seed(0)
        return Classifier(ClassifierConfig(name="untrained", widths=(4, 4, 4, 4), dimensions=8)).eval()


class Taste(PromptClassifier):
    """A reward that knows the packaged pictures' captions."""

    def __init__(self):
        super().__init__(judge())
