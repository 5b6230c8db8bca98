"""README.md of an exported folder: what the model is, how stock software loads it, its measurements and settings."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jdm.evaluation.sampling import counted
from jdm.library import FAMILIES
from jdm.models.stable_diffusion import StableDiffusion
from jdm.models.stable_diffusion_xl import StableDiffusionXL
from jdm.models.stock import StockModel
from jdm.size import Size, height_width, spelled

CHECKPOINT_FILE, CONTROLNET_FILE = "{name}.safetensors", "{name}_controlnet.safetensors"
KOHYA_FILE, COMFYUI_FILE = "{name}_kohya.safetensors", "{name}_comfyui.safetensors"
NOT_SETTINGS = ("type", "out", "device", "save_every", "log_every", "probe_every")


@dataclass(frozen=True)
class Subject:
    """The facts that a card reports of a model.

    Attributes:
        name: name of the folder. kind: the class of stock diffusers that loads it, None where there is none.
        card: jdm.json. record: run.json. metrics: what `jdm evaluate` wrote. Empty where there is none.
        base: model it was trained from, by folder or hub id. pixels: size of its pictures.
        sigma: sigma / alpha at a student's first level; same_levels: Stable Diffusion's table has it too.
        known_as: the size of UNet that ComfyUI and A1111 take it for.
        errors, left_out, rank: of a LoRA that stands for a full student.
        n: number of the scheduler's levels. stepper: its class, "" where the folder has none.
        absent: parts that the pipeline takes and the folder does not have.
        comfyui: files in ComfyUI's layout, where this format has any.
    """

    name: str
    format: str
    kind: str | None
    card: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None
    controlled: bool = False
    pixels: Size | None = None
    dtype: str = "float32"
    sigma: float | None = None
    same_levels: bool = True
    prediction: str = "epsilon"
    known_as: str | None = None
    errors: Mapping[int, float] = field(default_factory=dict)
    left_out: float = 0.0
    rank: int = 0
    n: int = 1000
    stepper: str = ""
    absent: tuple[str, ...] = ()
    comfyui: Mapping[str, str] = field(default_factory=dict)

    @property
    def family(self) -> type[StockModel] | None:
        """The family of the model; None where no stock pipeline runs it."""
        return FAMILIES.get(self.kind or "")

    @property
    def levels(self) -> tuple[int, ...] | None:
        """The level indices that a student runs at; None for a multi-step model."""
        found = self.card.get("levels")
        return None if found is None else tuple(found)

    @property
    def one_step(self) -> bool:
        return self.levels is not None and len(self.levels) == 1

    @property
    def method(self) -> Mapping[str, Any]:
        found = self.record.get("run", {}).get("method")
        return found if isinstance(found, Mapping) else {}

    @property
    def partner(self) -> str:
        """The model that a lone ControlNet belongs to."""
        if self.levels and self.method.get("train_unet", True):
            return "student"
        return public(str(self.method.get("start") or self.base or "base"))


def model_card(of: Subject) -> str:
    """The README in Markdown, with the header that hubs read."""
    parts = [_header(of), f"# {of.name}", _summary(of), _facts(of)]
    if code := snippet(of):
        parts += ["## Use", f"```python\n{code}```"]
    if of.format not in ("diffusers", "onnx"):
        parts += ["## In ComfyUI and A1111", *_other_programs(of)]
    if of.errors:
        parts += ["## What the LoRA holds", *_lora(of)]
    if of.metrics:
        rows = [(k.replace("_", " "), _value(v)) for k, v in of.metrics.items() if v is not None]
        parts += ["## Measurements", "By `jdm evaluate`, on the whole model in the precision it was trained in.",
                  _table("measurement", "value", rows)]
    if of.record:
        parts += ["## Training", _table("setting", "value", _settings(of.record))]
    whose = f" ({_value(of.base)})" if of.base else ""
    parts += ["## Licence", f"Inherit from the base model{whose}: its licence and terms of use apply to this one. "
              "Name them here before you publish it."]
    return "\n\n".join(parts) + "\n"


def snippet(of: Subject) -> str:
    """Python that draws a picture without this package, to run inside the folder; empty where nothing else can."""
    draw = {"diffusers": _whole, "single-file": _single_file, "controlnet": _controlnet, "lora": _lora_code,
            "onnx": _onnx_code}
    return draw[of.format](of)


def public(name: str) -> str:
    """A model's or dataset's name; an absolute path is reduced to its last part."""
    return Path(name).name if Path(name).is_absolute() else name


def _header(of: Subject) -> str:
    tags = [re.sub(r"[^\w-]", "", str(of.card.get("kind")))] * bool(of.levels)
    tags += ["controlnet"] * of.controlled + ["lora"] * (of.format == "lora")
    lines = ["license: other", "license_name: inherit-from-base-model", "library_name: diffusers",
             "pipeline_tag: text-to-image"]
    on_disk = of.base and (Path(of.base).exists() or of.base.endswith(".safetensors"))
    if of.base and re.fullmatch(r"[\w.-]+/[\w.-]+", of.base) and not on_disk:
        lines.append(f"base_model: {of.base}")
    if tags:
        lines.append(f"tags: [{', '.join(tags)}]")
    return "\n".join(["---", *lines, "---"])


def _summary(of: Subject) -> str:
    network = (of.family or StableDiffusion).NETWORK
    what = {"controlnet": "The ControlNet of a model", "lora": f"A LoRA of the {network}"}.get(of.format, "A model")
    steps = f" that draws in {counted(len(of.levels))}" if of.levels else ""
    control = of.card.get("control")
    control = f", following a control ({_value(control)})" if control and of.controlled else ""
    return f"{what}{steps}{control}; made with jdm."


def _facts(of: Subject) -> str:
    levels = _value(of.levels) if of.levels else None
    if levels and of.sigma:
        levels += f" (sigma / alpha = {of.sigma:.4f}{' at the first' * (not of.one_step)})"
    rows = [("base model", public(of.base) if of.base else "not recorded"),
            ("method", of.card.get("method") or of.method.get("type")), ("control", of.card.get("control")),
            ("control map", _map(of.card.get("preprocessor"))), ("levels", levels),
            ("pictures", of.pixels and spelled(of.pixels) + " (height x width)" * isinstance(of.pixels, tuple)),
            ("weights on disk", of.dtype)]
    return _table("", "", [(k, _value(v)) for k, v in rows if v is not None])


def _map(preprocessor: Any) -> str | None:
    """The function that makes the control map of a picture, then its settings."""
    if not isinstance(preprocessor, Mapping):
        return None
    return ", ".join([f"{preprocessor.get('function')}", *(
        f"{k.replace('_', ' ')} {_value(v)}" for k, v in preprocessor.items() if k != "function")])


def _settings(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Settings of the run, nested ones with dots, without those of place and logging."""
    for key, value in _flat(record.get("run", {})):
        if key.split(".")[-1] not in NOT_SETTINGS:
            yield key, _value(value)
    for part in ("data", "versions"):
        for key, value in _flat(record.get(part, {})):
            yield f"{part}: {key}", _value(value)


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(_value(v) for v in value)
    return " ".join(public(str(value)).replace("|", "\\|").split()) or "none"


def _table(key: str, value: str, rows: Any) -> str:
    return "\n".join([f"| {key} | {value} |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows)])


def _call(of: Subject) -> str:
    """Lines that draw and keep a picture with `pipe`."""
    family, guidance = of.family or StableDiffusion, 1.0 if of.levels else float(of.card.get("guidance", 2.0))
    told = family.asked(of.levels, guidance, of.n, of.controlled, of.pixels)
    if "max_sequence_length" in of.card:
        told |= {"max_sequence_length": of.card["max_sequence_length"]}
    asked = ['"your prompt"', *[f"{family.CONTROL}=control"] * of.controlled, *(f"{k}={v}" for k, v in told.items())]
    height, width = height_width(of.pixels or 0)
    size = f".resize(({width}, {height}))" if of.pixels else ""
    shown = f'control = Image.open("control.png").convert("RGB"){size}\n' if of.controlled else ""
    return f'{shown}image = pipe({", ".join(asked)}).images[0]\nimage.save("picture.png")\n'


def _imports(of: Subject, *more: str) -> str:
    names = sorted({*more, of.kind or ""} - {""}, key=str.lower)
    return f"from diffusers import {', '.join(names)}\n" + "from PIL import Image\n" * of.controlled + "\n"


def _whole(of: Subject) -> str:
    if of.kind is None:
        return ""
    if "Pipeline" not in of.kind:  # one network
        return f'{_imports(of)}network = {of.kind}.from_pretrained(".")\n'
    return (f'{_imports(of)}pipe = {of.kind}.from_pretrained("."{_absent(of)})  # this folder, or its name on the hub\n'
            f"{_call(of)}")


def _single_file(of: Subject) -> str:
    file, net, given = CHECKPOINT_FILE.format(name=of.name), "", ""
    if of.controlled:
        net = (f'controlnet = ControlNetModel.from_single_file("{CONTROLNET_FILE.format(name=of.name)}", '
               'config="config", subfolder="controlnet")\n')
        given = ", controlnet=controlnet"
    return (f'{_imports(of, *["ControlNetModel"] * of.controlled)}{net}'
            f'pipe = {of.kind}.from_single_file("{file}", config="config"{given})\n{_call(of)}')


def _controlnet(of: Subject) -> str:
    base, load = _loading(of.partner)
    return (f'{_imports(of, _net(of))}'
            f'base = {json.dumps(base)}  # folder, file or hub id of the model it belongs to\n'
            f'controlnet = {_net(of)}.from_pretrained(".")\n'
            f'pipe = {of.kind}.{load}(base, controlnet=controlnet{_absent(of)})\n{_call(of)}')


def _lora_code(of: Subject) -> str:
    parts = {"scheduler": (of.stepper, bool(of.levels)), "controlnet": (_net(of), of.controlled)}
    used = {name: kind for name, (kind, there) in parts.items() if there}
    lines = "".join(f'{name} = {kind}.from_pretrained("{name}")\n' for name, kind in used.items())
    given = "".join(f", {name}={name}" for name in used) + _absent(of)
    base, load = _loading(public(of.base or "base"))
    return (f'{_imports(of, *used.values())}base = {json.dumps(base)}  # folder, file or hub id of the base model\n'
            f'{lines}pipe = {of.kind}.{load}(base{given})\npipe.load_lora_weights(".")\n{_call(of)}')


def _onnx_code(of: Subject) -> str:
    """Draws with onnxruntime and without PyTorch."""
    height, width = height_width(of.pixels or 0)
    second = ', ids_2=ids("tokenizer_2")' if issubclass(of.family or StableDiffusion, StableDiffusionXL) else ""
    shown = (f'control = Image.open("control.png").convert("RGB").resize(({width}, {height}))\n'
             'shown = np.array(control, np.float32).transpose(2, 0, 1)[None] / 255\n'
             'given |= {"map": shown, "strength": np.array(1, np.float32)}\n')
    steps = """x = 0
for k, step in enumerate(card["steps"]):
    noise = np.random.randn(1, *card["latents"])
    x_t = step["alpha"] * x + step["sigma"] * noise if k else noise
    x = draw("student", x_t=x_t.astype("float32"), step=np.array([k]), **given)["x"]
""" if len(of.levels or ()) > 1 else """noise = np.random.randn(1, *card["latents"]).astype("float32")
x = draw("student", x_t=noise, **given)["x"]
"""
    return f"""import json

import numpy as np
from onnxruntime import InferenceSession
from PIL import Image
from tokenizers import Tokenizer


def draw(graph, **given):
    session = InferenceSession(f"{{graph}}.onnx")
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, given)))


def ids(tokenizer):
    return np.array([Tokenizer.from_file(f"{{tokenizer}}/tokenizer.json").encode("your prompt").ids])


card = json.load(open("jdm.json"))["onnx"]
given = draw("text_encoder", ids=ids("tokenizer"){second})
{shown * of.controlled}{steps}image = draw("decoder", x=x)["images"][0].transpose(1, 2, 0)
Image.fromarray((255 * image).round().astype("uint8")).save("picture.png")
"""


def _absent(of: Subject) -> str:
    """Arguments that say which parts the pipeline is to do without."""
    return "".join(f", {name}=None" for name in of.absent)


def _net(of: Subject) -> str:
    """The class of its ControlNet."""
    return (of.family or StableDiffusion).PARTS["controlnet"].classes[0]


def _loading(base: str) -> tuple[str, str]:
    """A base model's name for stock diffusers, without jdm's #v_prediction, and the method that loads it."""
    file = base.partition("#")[0]
    return (file, "from_single_file") if file.lower().endswith(".safetensors") else (base, "from_pretrained")


def _lora(of: Subject) -> Iterator[str]:
    yield (f"Rank {of.rank} of the difference between the student's UNet and the base model's, layer by layer. Its "
           f"error, relative to that difference in weights, is {of.errors[of.rank]:.4f}; at other ranks:")
    yield _table("rank", "relative error", [(r, f"{e:.4f}") for r, e in of.errors.items()])
    yield (f"Biases and normalisations changed too, by {of.left_out:.4f} of the whole change; a LoRA does not hold "
           "them. These are errors of weights, not of pictures: compare pictures before you use a low rank.")


def _other_programs(of: Subject) -> Iterator[str]:
    """Says where the files belong, and with which settings a stock sampler computes the student."""
    if of.family and not issubclass(of.family, StableDiffusion):
        yield from _of_transformer(of)
        return
    files = {"single-file": [(CHECKPOINT_FILE, "models/checkpoints", "models/Stable-diffusion")],
             "lora": [(KOHYA_FILE, "models/loras", "models/Lora")]}.get(of.format, [])
    if of.controlled:
        files.append((CONTROLNET_FILE, "models/controlnet", "models/ControlNet"))
    yield "\n".join(["| file | ComfyUI | A1111 |", "|---|---|---|",
                     *(f"| {f.format(name=of.name)} | {a} | {b} |" for f, a, b in files)])
    if of.known_as is None:
        yield ("Both programs recognise UNets by the widths of SD1.5, SD2 and SDXL. This one has others: they will not "
               "recognise it, and the files are for software that reads this layout by a config.")
    else:
        yield f"Both take it for {of.known_as}."
    if of.levels and not of.one_step:
        yield (f"The student is run at levels {_value(of.levels)} of 1,000, with fresh noise between them. No settings "
               "of these programs were worked out for that; use diffusers.")
    elif of.levels and of.sigma is not None:
        yield from _settings_for_one_step(of, of.levels[0], of.sigma)


def _of_transformer(of: Subject) -> Iterator[str]:
    """Says where ComfyUI's files belong, and with which settings its samplers compute the student."""
    if not of.comfyui:
        yield (f"No layout of these programs is written for {of.family.NAME if of.family else 'it'}: nothing that is "
               "known of their names can be tested. Use diffusers.")
        return
    yield _table("file", "ComfyUI", of.comfyui.items())
    yield ("The names are those that diffusers' converters read, key by key; ComfyUI itself was not run. A1111 does "
           "not read this family.")
    if of.levels:
        yield (f"The student draws in {counted(len(of.levels))} at cfg 1, at sigmas "
               f"{_value([round((level + 1) / of.n, 4) for level in of.levels])} before the shift, with fresh noise "
               "between steps: sampler lcm, ModelSamplingAuraFlow with the shift of scheduler_config.json.")


def _settings_for_one_step(of: Subject, level: int, sigma: float) -> Iterator[str]:
    """x = z sqrt(1 + s^2) - s eps(z) with s = sigma / alpha: one Euler step from s to 0, on noise of that size."""
    start = math.sqrt(1 + sigma**2)
    yield (f"The student is run once, at level {level} of 1,000, on noise of unit variance. In these programs' units: "
           f"sigma = {sigma:.4f}, and a first sample of noise x {start:.4f} = sqrt(1 + sigma^2).")
    if not of.same_levels:
        yield ("That cannot be expressed there: both use Stable Diffusion's table of noise levels, but this model was "
               "trained with another, so its UNet would be given the wrong level. Use diffusers.")
        return
    yield ("The settings below come from the programs' sources. Their arithmetic is tested; the programs were not run.")
    yield (f"- ComfyUI, core nodes, exact: KarrasScheduler (steps 1, sigma_max {sigma:.4f}) for the sampler; a second "
           f"KarrasScheduler (steps 1, sigma_max {start:.4f}) into AddNoise with RandomNoise and an empty latent; "
           "SamplerCustomAdvanced with DisableNoise, CFGGuider at cfg 1, KSamplerSelect euler (lcm is the same in one "
           "step), the first sigmas, and the latent of AddNoise.\n"
           "- A1111, exact: sampler Euler, schedule type Karras, 1 step, CFG scale 1, and under Settings, Sampler "
           f"parameters: sigma max {sigma:.4f}, SGM noise multiplier on.")
    yield (f"Not exact: ComfyUI's plain KSampler, and A1111 without that multiplier, start from noise x {sigma:.4f}, "
           f"{sigma / start:.3f} of what the student was trained on, and by default at level 999; "
           "ModelSamplingDiscrete with lcm has only every 20th level. A single file carries no schedule, so set the "
           "level by hand each time.")
    if of.prediction == "v_prediction":
        yield ("It predicts v. If a program does not detect that: in ComfyUI put ModelSamplingDiscrete (v_prediction) "
               "behind the loader; in A1111 put a .yaml with `parameterization: v` beside the file.")
