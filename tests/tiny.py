"""A model of a few thousand parameters and runs of a few steps: whatever the tests train."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from jdm.methods.denoising import Denoising
from jdm.methods.jdm import JDM
from jdm.metrics.classifier import Classifier, ClassifierConfig
from jdm.models import nano
from jdm.models.stable_diffusion import StableDiffusion, new_controlnet, one_step_scheduler, save_pipeline
from jdm.run import Data, Run

DATA = Data(split="test[:64]", validation="test[64:128]")


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


def student(teacher: StableDiffusion, folder: Path) -> Path:
    """The folder of a one-step student whose ControlNet speaks up: no convolution of it is zero."""
    controlnet = new_controlnet(teacher.unet, teacher.downscale).eval().requires_grad_(False)
    for parameter in controlnet.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    card = {"kind": "one-step", "method": "jdm", "control": "canny", "t_init": 625}
    return save_pipeline(teacher.with_parts(controlnet=controlnet), folder, one_step_scheduler(nano.SCHEDULER, 625),
                         card=card)


def run(recipe: Run, out: Path, teacher: Path, steps: int = 2, **changes) -> Run:
    """A recipe cut down to a few steps of the tiny model on packaged pictures."""
    method = recipe.method
    if isinstance(method, JDM):
        method = replace(method, rank=2)
    if isinstance(method, Denoising):
        method = replace(method, vae=str(teacher / "vae"))
    small = replace(recipe, method=method, out=out, model=str(teacher), data=DATA, steps=steps, batch=4, probe_every=0,
                    save_every=1, log_every=1)
    return replace(small, **changes)


@cache
def judge() -> Classifier:
    """An untrained classifier, where the shipped one would be read."""
    torch.manual_seed(0)
    return Classifier(ClassifierConfig(name="untrained", widths=(4, 4, 4, 4), dimensions=8)).eval()
