"""Estimates the cost of a run before any weight is loaded: memory by part, FLOPs by pass, seconds and GPU-hours.

The method's own code runs one training step, on networks whose tensors have shapes and no contents, and is measured
while it does: what it holds, copies or recomputes is counted because it does so, not because this page says so.

What is not measured here: the GPU allocator's rounding and fragmentation, cuDNN's and cuBLAS's workspaces and CUDA's
own context (`RESERVE` of the memory is kept free for them), the loading of pictures, and the probe. Prompts are encoded
once each and remembered; their encoding is a pass of its own, outside the step. Seconds are FLOPs over a data sheet's
peak times an ASSUMED utilisation: nothing here has run on such a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from jdm.cost.counting import Meter, converted, refuse_large
from jdm.cost.gpus import GPU, GPUS
from jdm.cost.shapes import Shapes
from jdm.data.sources import FASHION_CLASSES, TEMPLATES
from jdm.errors import UsageError
from jdm.models.adapters import base_parameters
from jdm.models.execution import choose_attention, settle
from jdm.models.family import Denoiser
from jdm.models.text import REMEMBERED
from jdm.run import Phase, Run, Task
from jdm.size import bytes_of
from jdm.training.checkpoint import trained
from jdm.training.optimiser import adamw

RESERVE = 0.05  # of a GPU's memory
UTILISATION = 0.4  # of a GPU's peak, assumed: eager mode, norms and activations bound by bandwidth
Labelled = tuple[str, bool, str]  # the network, whether backward, the arithmetic
REST, PROMPTS = "likelihood, losses and the rest", "prompts, each when first met"


@dataclass(frozen=True)
class Pass:
    """One network's part of a step. forward, backward: FLOPs, a multiplication and an addition being two."""

    name: str
    forward: float
    backward: float


@dataclass(frozen=True)
class Cost:
    """The cost of one step of a run.

    Attributes:
        memory: bytes by part, at the moment of the peak; their sum is what the run holds.
        peak_phase: the phase of the peak. gradients: bytes of each phase's gradients when all of them are there.
        saved: bytes that autograd holds for backward, at most, in each phase; those of the student's sample among
            them, which is drawn in the first phase and held to the last.
        passes: FLOPs of one step. once: FLOPs of encoding one new prompt.
        kinds: FLOPs of one step by arithmetic.
        notes: what could not be counted.
    """

    memory: dict[str, float]
    peak_phase: str
    gradients: dict[str, float]
    saved: dict[str, float]
    passes: list[Pass]
    once: float
    kinds: dict[str, float]
    steps: int
    notes: list[str]

    @property
    def total(self) -> float:
        return sum(self.memory.values())

    @property
    def flops(self) -> float:
        """FLOPs of one step."""
        return sum(p.forward + p.backward for p in self.passes)

    def seconds(self, gpu: GPU) -> float:
        """Seconds of one step, at UTILISATION of each kind's peak."""
        return sum(done / gpu.rate(kind) for kind, done in self.kinds.items()) / UTILISATION

    def fits(self, gpu: GPU) -> bool:
        return self.total <= (1 - RESERVE) * gpu.memory

    def on(self, gpu: GPU) -> dict[str, Any]:
        """Seconds per step, GPU-hours of the whole run and whether it fits."""
        seconds = self.seconds(gpu)
        return {"gpu": gpu.name, "seconds_per_step": seconds, "gpu_hours": seconds * self.steps / 3600,
                "memory": gpu.memory, "fits": self.fits(gpu)}

    def described(self, gpus: list[str]) -> dict[str, Any]:
        """The estimate as plain JSON."""
        return {**asdict(self), "total": self.total, "flops": self.flops, "utilisation": UTILISATION,
                "reserve": RESERVE, "gpus": [self.on(GPUS[name]) for name in gpus]}


@dataclass(frozen=True)
class Measured:
    """Bytes of one phase: at its peak, of gradients there, of its own gradients, and held for backward."""

    peak: float
    there: float
    gradients: float
    saved: float


def passes_of(flops: Mapping[Labelled, float]) -> list[Pass]:
    """The FLOPs of a step by network, forward and backward; prompts are encoded outside it."""
    names = dict.fromkeys(label for label, *_ in flops if label != PROMPTS)
    return [Pass(name, *(float(sum(n for (label, back, _), n in flops.items() if (label, back) == (name, side)))
                         for side in (False, True))) for name in names]


def kinds_of(flops: Mapping[Labelled, float]) -> dict[str, float]:
    """The FLOPs of a step by kind of arithmetic; prompts are encoded outside it."""
    kinds: Counter[str] = Counter()
    for (label, _, kind), n in flops.items():
        kinds[kind] += n if label != PROMPTS else 0  # type: ignore[assignment]
    return dict(kinds)


def estimate(run: Run) -> Cost:
    """The cost of a run's steps.

    Raises:
        UsageError: the shapes of its models are not known, or its method does what only real tensors can.
    """
    refuse_large(run.batch, run.data.size)
    rehearsal = Rehearsal(replace(run, data=replace(run.data, prepared="")), bool(run.data.prepared))
    try:
        return rehearsal.estimate()
    except UsageError:
        raise
    except Exception as error:  # a method may look at values, which are not there
        raise UsageError(f"{type(run.method).__name__} cannot be estimated ({type(error).__name__}: "
                         f"{(str(error).splitlines() or [''])[0][:160]}); the recipes' JDM, DiffInstruct and "
                         "TextToImage can") from error


class Rehearsal:
    """One step of a run on tensors without contents.

    Args:
        prepared: the prompts' states come from disk: text encoders are no part of the memory.
    """

    def __init__(self, run: Run, prepared: bool = False):
        self.prepared = prepared
        self.run, self.meter, self.mode = run, Meter(), FakeTensorMode(allow_non_fake_inputs=True)
        self.shapes = Shapes(replace(run, device="cpu"), self.mode)
        choose_attention(run)  # that of its own device
        self.models, self.others = self.shapes.models, self.shapes.others
        self.phase, self.encoded = "", 0

    def estimate(self) -> Cost:
        with self.meter, overwriting():
            task: Task = self.run.method.task(self.shapes)
            settle(self.run, *task.frozen)
            averages = {name: [v.clone() for v in trained(module).values()]
                        for name, module in task.product.modules.items()}
            for role in self.shapes.needs.prompts if self.prepared else ():
                self.shapes.text(role)(["a picture", ""])
            parts = self._parts(task) | {f"average of the {k}": tensors for k, tensors in averages.items()}
            return self._step(task, parts)

    def _step(self, task: Task, parts: dict[str, list[Tensor]]) -> Cost:
        held: tuple[Tensor | None, ...] = ()
        seen: dict[str, Measured] = {}
        flops: Counter[Labelled] = Counter()
        with self._labels(task, parts):
            state = task.begin(0)
            for phase in task.phases:
                seen[phase.name], held = self._phase(phase, state, parts, held)
                for key, done in self.meter.flops.items():
                    # The sample is drawn once a step; whatever phase meets it first.
                    times = 1.0 if key[0].startswith("generator") else phase.repeats / phase.every
                    flops[key] += done * times  # type: ignore[assignment]
        weights = {name: bytes_of(tensors) for name, tensors in parts.items() if tensors}
        top = max(seen, key=lambda name: seen[name].peak)
        memory = {**weights, "gradients": seen[top].there, "optimiser": sum(map(state_bytes, task.phases)),
                  "activations": seen[top].peak - self._aside() - seen[top].there - sum(weights.values()),
                  "remembered prompts, at most": self._prompts()}
        once = sum(n for (label, *_), n in flops.items() if label == PROMPTS) / max(1, self.encoded)
        return Cost(memory, top, {name: one.gradients for name, one in seen.items()},
                        {name: one.saved for name, one in seen.items()}, passes_of(flops), once, kinds_of(flops),
                        self.run.steps, self.shapes.notes)

    def _phase(self, phase: Phase, state: Any, parts: dict[str, list[Tensor]],
               held: tuple[Tensor | None, ...]) -> tuple[Measured, tuple[Tensor | None, ...]]:
        """A phase's memory, and its gradients; the loop holds those of the phase before, `held`, until it has them."""
        meter = self.meter
        self.phase = phase.name
        meter.reset_peak()
        meter.label, meter.flops = REST, Counter()
        loss, _ = phase.loss(state, 0)
        gradients = torch.autograd.grad(loss, phase.parameters, allow_unused=True)
        still = sum(map(bytes_of, parts.values())) + bytes_of(g for g in held if g is not None) + self._aside()
        return Measured(meter.alive.peak, meter.alive.there_at_peak((*held, *gradients)),
                        bytes_of(g for g in gradients if g is not None), meter.held - still), gradients

    def _aside(self) -> float:
        """Bytes of the text encoders that a prepared run does not hold."""
        return sum(bytes_of(tensors_of(part)) for part in self._texts()) if self.prepared else 0

    def _parts(self, task: Task) -> dict[str, list[Tensor]]:
        """Every network's parameters and buffers, by what they are."""
        found: dict[str, list[Tensor]] = {}
        for name, model in self.models.items():
            found |= {f"{name}: {part}": [*base_parameters(module), *module.buffers()]
                      for part, module in model.modules().items() if not (self.prepared and "text" in part)}
        for name, module in (task.modules | self.others).items():
            base = {id(p) for p in base_parameters(module)} | {id(b) for b in module.buffers()}
            found[f"trained: {name}" if name in task.modules else name] = [
                p for p in tensors_of(module) if id(p) in base]
            if lora := [p for p in tensors_of(module) if id(p) not in base]:
                found["trained: the posterior's LoRA"] = lora
        return found

    def _texts(self) -> list[nn.Module]:
        """Every text encoder."""
        return [part for m in self.models.values() for name, part in m.modules().items() if "text" in name]

    def _prompts(self) -> float:
        """Bytes of the prompts that text encoders remember: at most one a picture, and no more than REMEMBERED each."""
        n = self.run.steps * self.run.batch
        if self.run.data.source == "fashion-mnist":
            n = min(n, sum(map(len, FASHION_CLASSES)) * len(TEMPLATES))
        return sum(min(float(REMEMBERED), n * encoder.each) for encoder in self.shapes.texts.values())

    # Labels: which pass the FLOPs belong to

    @contextmanager
    def _labels(self, task: Task, parts: dict[str, list[Tensor]]) -> Iterator[None]:
        """The meter's label follows the network that runs, forward and backward."""
        decoders = {id(m.vae.decoder): "decoder" for m in self.models.values()}
        decoders |= {id(net.decoder): "decoder" for k, net in self.others.items() if k == "tiny decoder"}
        texts = set(map(id, self._texts()))
        rewards = {id(self.others["reward"])} if "reward" in self.others else set()

        def label(module: nn.Module, args: tuple) -> str | None:
            if isinstance(module, Denoiser):
                role = self._role(module, task)
                name = self.models["teacher"].BACKBONE
                if role == "generator" and f"trained: {name}" not in parts:
                    parts[f"student's frozen {name}"] = tensors_of(module.backbone)
                return self._named(role, module, len(args[0]))
            if id(module) in texts:
                return PROMPTS
            return decoders.get(id(module)) or ("reward" if id(module) in rewards else None)

        def before(module: nn.Module, args: tuple) -> None:
            if found := label(module, args):
                self.meter.label = found
                self.encoded += module is getattr(self.models["teacher"], "text_encoder")  # noqa: B009

        def after(module: nn.Module, args: tuple, output: Any) -> None:
            if found := label(module, args):
                self.meter.label = REST
                if isinstance(output, Tensor) and output.requires_grad:
                    output.register_hook(lambda _: setattr(self.meter, "label", found))

        handles = register_module_forward_pre_hook(before), register_module_forward_hook(after)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _role(self, net: Denoiser, task: Task) -> str:
        fake = task.modules.get("fake")
        if any(adapter.name in ("fake", "posterior") for adapter in net.adapters) or net is fake:
            return "fake score"
        for name, model in self.models.items():
            if net.backbone is model.backbone and not net.adapters:
                return "real score" if name == "teacher" else name
        return "generator"

    def _named(self, role: str, net: Denoiser, rows: int) -> str:
        """A pass as benchmarks/step_time.py names it."""
        own = self.models["teacher"].NETWORK
        whole = f"{own} + ControlNet" if net.controlnet is not None else own
        if role == "generator":
            return f"generator: {whole}"
        if role != "fake score":
            return f"{role}: cond and uncond in one batch" if rows == 2 * self.run.batch else role
        lora = any(adapter.name == "posterior" for adapter in net.adapters)
        learns = torch.is_grad_enabled()
        if not learns:
            return "posterior's target" if lora else "fake score"
        if self.phase == "generator":
            return "posterior, to x_t"
        return "posterior's training" if lora else "fake score's training"


@contextmanager
def overwriting() -> Iterator[None]:
    """Module.to and Module.float replace parameters inside: torch's own cannot give a fake tensor other data."""
    before = nn.Module._apply
    nn.Module._apply = converted  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = before


def state_bytes(phase: Phase) -> float:
    """Bytes of a phase's optimiser states, measured by one step on each shape, so that any optimiser will do."""
    total = 0.0
    for parameters, optimiser in phase.groups:
        with FakeTensorMode(allow_non_fake_inputs=True):
            for (shape, dtype), n in Counter((p.shape, p.dtype) for p in parameters).items():
                one = nn.Parameter(torch.empty(shape, dtype=dtype))
                one.grad = torch.empty_like(one)
                optimizer = adamw(replace(phase, groups=[([one], optimiser)]))
                optimizer.step()
                total += n * bytes_of(v for v in optimizer.state[one].values() if isinstance(v, Tensor) and v.ndim)
    return total


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def tables(found: Cost, title: str, gpus: list[str]) -> list[Table]:
    """Tables for a terminal: memory by part, FLOPs by pass, cost by GPU."""
    memory = Table("memory", "GiB", title=title)
    for name, n in [*found.memory.items(), (f"at the peak, in phase {found.peak_phase}", found.total)]:
        memory.add_row(name, f"{n / 2**30:.2f}")
    passes = Table("pass", "forward, TFLOP", "backward, TFLOP")
    for one in [*found.passes, Pass("a step", sum(p.forward for p in found.passes),
                                    sum(p.backward for p in found.passes))]:
        passes.add_row(one.name, f"{one.forward / 1e12:.3f}", f"{one.backward / 1e12:.3f}")
    cost = Table(f"at {UTILISATION:.0%} of the peak, assumed", "s a step", f"GPU-hours, {found.steps} steps", "fits")
    for name in gpus:
        row = found.on(GPUS[name])
        cost.add_row(row["gpu"], f"{row['seconds_per_step']:.3g}", f"{row['gpu_hours']:.3g}",
                     "yes" if row["fits"] else f"no, of {row['memory'] / 2**30:.0f} GiB")
    return [memory, passes, cost]
