"""A model of a few thousand parameters and runs of a few steps: whatever the tests train."""

from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from jdm.controls import Canny
from jdm.export.graphs import SMALLEST
from jdm.loading import Loaded
from jdm.methods.networks import Networks
from jdm.models import nano
from jdm.models.classifier import Classifier, ClassifierConfig
from jdm.models.folder import save_pipeline
from jdm.models.stable_diffusion import StableDiffusion
from jdm.recipes import find
from jdm.recipes.scales import FOUR
from jdm.rewards import PromptClassifier
from jdm.run import Data, Run

DATA = Data(split="test[:64]", validation="test[64:128]")
# What a method's settings that name a model stand for: folders beside the tiny teacher's.
STAND_INS = {"student.start": "student", "controlnet.start": "student", "base": "student", "teacher": "controlled",
             "guidance.teacher": "teacher", "condition.posterior.model": "teacher", "vae": "teacher/vae"}
nano_canny, nano_diff_instruct = find("nano-canny"), find("nano-diff-instruct")
nano_controlnet, nano_text_reward = find("nano-controlnet"), find("nano-text-reward")
VAE, TEACHER = nano.VAEConfig(), nano.TeacherConfig()
NETWORKS = ("hed", "depth")  # controls whose weights would be fetched


def model() -> StableDiffusion:
    """Random weights in nano-sd's shapes, with two pictures' worth of width."""
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=VAE.latent_channels, out_channels=VAE.latent_channels,
        block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=8, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEACHER.text_width)
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=VAE.latent_channels, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False)
    tokenizer = nano.tokenizer(["a photo of an ankle boot", "a coat", "one dress"], TEACHER.tokens)
    parts = StableDiffusion(unet, vae, nano.text_encoder(TEACHER, tokenizer), tokenizer, nano.SCHEDULER)
    for part in parts.modules().values():
        part.eval().requires_grad_(False)
    return parts


def with_controlnet(teacher: StableDiffusion) -> StableDiffusion:
    """With a ControlNet that speaks up: no convolution of it is zero."""
    controlnet = teacher.new_controlnet().eval().requires_grad_(False)
    for parameter in controlnet.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return teacher.with_networks(controlnet=controlnet)


def halved(model: StableDiffusion) -> StableDiffusion:
    """A model whose larger weights are rounded to float16 in place, as its graphs store them."""
    for network in model.modules().values():
        for weight in network.parameters():
            if weight.numel() >= SMALLEST:
                weight.copy_(weight.half().float())
    return model


def student(teacher: StableDiffusion, folder: Path, levels: tuple[int, ...] = (625,)) -> Path:
    """The folder of a student with a ControlNet, by default of one step."""
    kind = "one-step" if len(levels) == 1 else "few-step"
    card = {"kind": kind, "method": "jdm", "control": "canny", "preprocessor": Canny().preprocessor,
            "levels": list(levels)}
    return save_pipeline(with_controlnet(teacher), folder, teacher.step_scheduler(levels), card=card)


def family(folder: Path) -> Path:
    """The teacher's folder; beside it `controlled`, it with a multi-step ControlNet, `student` and `student-4`."""
    teacher = model()
    student(teacher, folder / "student")
    card = {"kind": "many-step", "control": "canny", "preprocessor": Canny().preprocessor}
    save_pipeline(with_controlnet(teacher), folder / "controlled", card=card)
    student(teacher, folder / "student-4", FOUR)
    return save_pipeline(teacher, folder / "teacher")


def run(recipe: Run, out: Path, teacher: Path, steps: int = 2, **changes) -> Run:
    """A recipe cut down to a few steps of the tiny models of `family` on packaged pictures."""
    whole = replace(recipe, method=_small(recipe.method, teacher), out=out, model=str(teacher), data=DATA, steps=steps,
                    batch=4, device="cpu", probe_every=0, save_every=1, log_every=1)
    return replace(whole, **changes)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def cached(run: Run, folder: Path, out: Path | None = None) -> Run:
    """The run on what `jdm prepare` left in the folder."""
    return replace(run, out=out or run.out, data=replace(run.data, prepared=str(folder)))


def _small(settings: Any, teacher: Path, path: str = "") -> Any:
    """A method's settings with stand-ins for models and networks, and posteriors of rank 2."""
    found: dict[str, Any] = {}
    for field in fields(settings):
        value, name = getattr(settings, field.name), f"{path}{field.name}"
        if is_dataclass(value):
            found[field.name] = _small(value, teacher, f"{name}.")
        elif name in STAND_INS and value:
            several = len(getattr(settings, "levels" if name == "student.start" else "base_levels", ())) > 1 \
                if name in ("student.start", "base") else False
            found[field.name] = str(teacher.parent / (STAND_INS[name] + "-4" * several))
        elif name == "reward.model":
            found[field.name] = f"{__file__}:Taste"
        elif name == "control" and value in NETWORKS:
            found[field.name] = "soft-edge"
        elif name == "control" and value.startswith("image-prompt:"):
            found[field.name] = "image-prompt"  # whose weights are inside a package
        elif name.endswith("posterior.rank"):
            found[field.name] = 2
    return replace(settings, **found)


def ranked(run: Run, student: int = 0, fake: int = 0) -> Run:
    """The run with LoRAs of these ranks; 0 for full copies."""
    method = run.method
    return replace(run, method=replace(method, student=replace(method.student, rank=student),
                                       fake=replace(method.fake, rank=fake)))


def networks(run: Run) -> Networks:
    """The networks of a declared method, as its task builds them."""
    loaded, declared = Loaded(run), run.method.distillation()
    made = Networks(loaded, declared.student, declared.branch, declared.fake, controlled=bool(declared.teacher))
    for posterior in declared.posteriors:
        made.add_posterior(posterior)
    return made


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
