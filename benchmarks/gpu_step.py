"""One row of `gpu.py`: training steps at a recipe's real shapes on random weights, which cost what others do.

Model FLOPs are those of a step without recomputation, from `jdm estimate`.
"""

from __future__ import annotations

import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch._dynamo.utils import counters

from jdm import loading
from jdm.cost.estimate import estimate
from jdm.cost.gpus import GPUS
from jdm.cost.known_configs import without_weights
from jdm.models import execution, published
from jdm.recipes import entries, find
from jdm.run import Data, Run
from jdm.training.trainer import Trainer

ROWS = {"ours": "one frozen bf16 backbone with adapters", "plain": "three copies, float32 weights, bf16 autocast",
        "compiled": "one frozen bf16 backbone with adapters, compiled"}
Z_IMAGE = "z-image-canny"
TOY_UNET = {"sample_size": 8, "cross_attention_dim": 32, "attention_head_dim": 2, "block_out_channels": (16, 16),
            "layers_per_block": 1, "norm_num_groups": 8, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
TOY_TEXT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "projection_dim": 32}
TOY = {"unet": TOY_UNET, "vae": {**published.VAE, "block_out_channels": (8,) * 4, "layers_per_block": 1,
                                 "norm_num_groups": 8},
       "text_encoder": TOY_TEXT, "scheduler": published.SCHEDULER}
TOY_XL = {**TOY, "text_encoder_2": TOY_TEXT,
          "unet": {**TOY_UNET, "cross_attention_dim": 64, "use_linear_projection": True,
                   "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
                   "projection_class_embeddings_input_dim": 32 + 6 * 8}}


@dataclass(frozen=True)
class Step:
    """What is trained: a recipe as one of ROWS has it.

    Attributes:
        model: in place of the recipe's.
        size: side of the pictures in pixels.
        toy: narrow networks, for a CPU.
    """

    recipe: str
    row: str
    batch: int
    size: int
    device: str
    model: str = ""
    toy: bool = False
    warmup: int = 4
    rounds: int = 10

    def run(self, out: Path) -> Run:
        """The recipe's run on packaged pictures, endless and without a probe."""
        run = find(self.recipe)()
        run = replace(run, out=out, model=self.model or run.model, batch=self.batch, accumulate=1, shard=1,
                      data=Data(split="test[:256]", validation="test[:256]", size=self.size), device=self.device,
                      precision="bf16", steps=10**6, save_every=10**6, log_every=10**6, probe_every=0)
        if self.toy:  # a LoRA is no wider than its layer
            student, fake = run.method.student, run.method.fake
            run = replace(run, method=replace(run.method, student=replace(student, rank=min(4, student.rank)),
                                              fake=replace(fake, rank=min(4, fake.rank))))
        if self.row == "plain":
            method = replace(run.method, fake=replace(run.method.fake, rank=0))
            return replace(run, checkpointing=False, compile=False, method=method)
        return replace(run, compile=self.row == "compiled")

    @contextmanager
    def stand_ins(self) -> Iterator[None]:
        """Context in which models have random weights; frozen weights of the plain row stay in float32."""
        def at_random(name: str):
            with torch.device(self.device):
                return without_weights(name)

        kept = patch.object(execution, "_cast_frozen", lambda *_: None) if self.row == "plain" else nullcontext()
        toys = {name: TOY_XL if "text_encoder_2" in parts else TOY for name, parts in published.PUBLISHED.items()}
        with patch.dict(published.PUBLISHED, toys if self.toy else {}), kept, uncompiled(self.toy), \
                patch.object(loading, "load_model", at_random):
            yield


def uncompiled(toy: bool) -> AbstractContextManager[object]:
    """Context in which compiled networks run as they are where `toy`, because tracing them takes half a minute."""
    return torch.compiler.set_stance("force_eager" if toy else "default")


def unknown(folder: str, toy: bool) -> str:
    """Why no step of Z-Image can be taken here; empty where one can."""
    if Z_IMAGE not in entries():
        return f"this version of jdm has no recipe {Z_IMAGE}"
    return "at toy size Z-Image needs a small diffusers folder: --z-image" if toy and not folder else ""


def trained(step: Step) -> dict[str, float]:
    """Median seconds of a step, the first one's, peak memory after the warm-up, and how often it was compiled."""
    with tempfile.TemporaryDirectory() as folder, step.stand_ins():
        trainer = Trainer(step.run(Path(folder)))
        first = clocked(lambda: trainer.step(0), step.device)
        for n in range(1, step.warmup):
            trainer.step(n)
        graphs = counters["stats"]["unique_graphs"]
        if torch.device(step.device).type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # the peak of a step, not of making the networks
        times = [clocked(lambda n=n: trainer.step(step.warmup + n), step.device) for n in range(step.rounds)]
    seconds = statistics.median(times)
    return {"seconds": seconds, "least": min(times), "most": max(times), "samples_per_second": step.batch / seconds,
            "memory": peak_memory(step.device), "first_step": first, "graphs": graphs,
            "graphs_after_warmup": counters["stats"]["unique_graphs"] - graphs}


def estimated(step: Step) -> dict[str, Any]:
    """`jdm estimate`'s memory in bytes, seconds by GPU, and FLOPs of a step without recomputation. Needs no GPU."""
    cpu = replace(step, device="cpu")
    with tempfile.TemporaryDirectory() as folder, cpu.stand_ins():
        run = replace(cpu.run(Path(folder)), compile=False)
        found = estimate(run)
        model = estimate(replace(run, checkpointing=False)).flops if run.checkpointing else found.flops
    return {"memory": found.total, "model_flops": model, "seconds": {k: found.seconds(gpu) for k, gpu in GPUS.items()}}


def clocked(fn: Callable[[], object], device: str) -> float:
    """Seconds that fn() takes, to the end of its work on the device."""
    settled(device)
    start = time.perf_counter()
    fn()
    settled(device)
    return time.perf_counter() - start


def settled(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def peak_memory(device: str) -> float:
    """Peak memory in bytes: PyTorch's count on a GPU, the process's resident set on a CPU."""
    if torch.device(device).type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def matmul_rate(device: str, side: int) -> dict[str, float]:
    """FLOP/s of a bf16 product of two [side, side] matrices: the median of 20."""
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    times = [clocked(lambda: torch.mm(a, b), device) for _ in range(25)]
    return {"rate": 2 * side**3 / statistics.median(times[5:])}
