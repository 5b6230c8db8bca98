"""Noise Consistency Training (arXiv 2506.19741): an adapter on a frozen generator; no teacher, no pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from jdm.controls import Control
from jdm.data.noise import Noise, rows_at
from jdm.errors import UsageError
from jdm.loading import Loaded
from jdm.methods.networks import Branch, Networks, Student, controlnet_need
from jdm.ranges import Count, NotNegative, Positive, Whole
from jdm.run import Needs, Phase, Product, Run, Task
from jdm.sharing import batch_mean
from jdm.space import unit


class Multiplier(nn.Module):
    """lambda of the primal-dual method: a module, so that a checkpoint carries it."""

    def __init__(self, start: float):
        super().__init__()
        self.value: Tensor
        self.register_buffer("value", torch.tensor(float(start)))

    @torch.no_grad()
    def ascend(self, rate: float, excess: Tensor) -> None:
        """lambda <- max(0, lambda + rate * excess)."""
        self.value.add_(rate * excess.to(self.value)).clamp_(min=0)


@dataclass(frozen=True)
class NCT:
    """min L_con subject to L_bound < xi; L_con = d(f_phi(z_k+1, c), sg f_phi(z_k, c)), L_bound = d(f_phi(z, c), f(z)).

    x = f(z) is the frozen generator's own sample and c = h(x) its control, which need not be differentiable. The noise
    is what diffuses: z_s = sqrt(1 - s^2) z + s eps, at both levels with the SAME z and eps. Paper: one step; here: on a
    generator of several the noise is z and every fresh eps_k together, all diffused to the one s, so that nothing of
    x's own noise is left at s = 1; the gradient goes through every step.

    Attributes:
        control: a control by name, or an import path, "my_controls.py:Posterize".
        base: the frozen generator, by name or folder.
        base_levels: level indices at which the base denoises.
        controlnet: the ControlNet that is trained.
        levels: K, the number of noise levels; s_k = k / K.
        consistency: keep L_con; False is one of the paper's ablations.
        boundary: keep L_bound; False is another.
        xi: bound on L_bound, in units of d.
        multiplier: lambda at the start.
        dual_rate: how fast lambda moves; 0 keeps it where it is, the third ablation.
        huber: c of d(a, b) = sqrt(mean |a - b|^2 + c^2) - c, the mean over a sample's components.
        clip: bound on the norm of the ControlNet's gradient.
    """

    control: str = "canny"
    base: str = "nano-diff-instruct"
    base_levels: tuple[Whole, ...] = (625,)
    controlnet: Branch = field(default_factory=Branch)
    levels: Count = 18
    consistency: bool = True
    boundary: bool = True
    xi: NotNegative = 0.05
    multiplier: NotNegative = 1.0
    dual_rate: NotNegative = 0.05
    huber: Positive = 0.03
    clip: Positive = 1.0

    def needs(self, run: Run) -> Needs:
        if not self.consistency and not self.boundary:
            raise UsageError("NCT without both of its losses learns nothing; keep --consistency or --boundary")
        if run.data.controls:
            raise UsageError(f"--data.controls {run.data.controls} gives control maps, and NCT measures the control on "
                             "its own samples; leave it out, or train with another method, such as nano-canny")
        return Needs({"teacher": run.model, "start": self.base} | controlnet_need(self.controlnet), self.control,
                     whole="NCT trains on the generator's own pictures, and reads captions alone")

    def product(self, loaded: Loaded) -> Product:
        return self._networks(loaded).product("nct", self.control, base=self.base)

    def task(self, loaded: Loaded) -> Task:
        control = loaded.control
        assert control is not None
        networks, multiplier = self._networks(loaded), Multiplier(self.multiplier)

        def begin(step: int) -> Noises:
            return Noises.of(networks, control, step)

        def loss(noises: Noises, _: int) -> tuple[Tensor, dict]:
            return self.loss(networks, multiplier, noises)

        phase = Phase("controlnet", networks.student_groups(self.controlnet), loss, clip=self.clip,
                      after=lambda logs: self.dual_step(multiplier, logs))
        return Task([phase], begin, networks.modules | {"multiplier": multiplier},
                    networks.product("nct", self.control, base=self.base),
                    networks.probe(), networks.running, networks.preview())

    def _networks(self, loaded: Loaded) -> Networks:
        return Networks(loaded, Student(self.base_levels, self.base, optimiser=None), self.controlnet)

    def loss(self, networks: Networks, multiplier: Multiplier, noises: Noises) -> tuple[Tensor, dict]:
        """L_con + lambda L_bound; the dual step follows each update."""
        k = (noises.uniform.double() * self.levels).floor()
        generator = networks.generator

        def at(level: Tensor) -> Tensor:
            (z, *fresh), s = noises.all, level / self.levels
            return generator(diffused(*z, s), noises.y, noises.shown, lambda step: diffused(*fresh[step - 1], s))

        with torch.no_grad():
            before = at(k)
        consistency = self.distance(at(k + 1), before)
        bound = self.distance(generator(noises.z, noises.y, noises.shown, noises.renoise), noises.x)
        kept = [consistency] * self.consistency + [multiplier.value * bound] * self.boundary
        return torch.stack(kept).sum(), {"consistency_loss": consistency.detach(), "boundary_loss": bound.detach()}

    def dual_step(self, multiplier: Multiplier, logs: dict[str, Any]) -> dict[str, Any]:
        """lambda <- max(0, lambda + eta (L_bound - xi)), once an update whatever the batch's parts."""
        multiplier.ascend(self.dual_rate, batch_mean(logs["boundary_loss"]) - self.xi)
        return {"multiplier": multiplier.value.clone()}

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Mean over the batch of the pseudo-Huber d(a, b); scalar."""
        square = (a - b).flatten(1).square().mean(1)
        return ((square + self.huber**2).sqrt() - self.huber).mean()


@dataclass(frozen=True)
class Noises:
    """One step of NCT: prompts, noise, the frozen generator's samples x and their control.

    Attributes:
        fresh: (eps_k, the noise that diffuses it) of each further step of the generator.
    """

    y: list[str]
    z: Tensor
    eps: Tensor
    uniform: Tensor
    x: Tensor
    shown: Tensor
    fresh: tuple[tuple[Tensor, Tensor], ...] = ()

    @property
    def all(self) -> list[tuple[Tensor, Tensor]]:
        """(noise, what diffuses it): of z, then of every further step."""
        return [(self.z, self.eps), *self.fresh]

    def renoise(self, k: int) -> Tensor:
        """eps_k, the generator's fresh noise before step k."""
        return self.fresh[k - 1][0]

    @classmethod
    @torch.no_grad()
    def of(cls, networks: Networks, control: Control, step: int) -> Noises:
        run, prompts = networks.loaded.run, networks.loaded.pictures
        noise = Noise(run.seed, step, run.device)
        rows = rows_at(len(prompts), run.batch, run.seed, step)
        y = prompts.prompts(rows, noise.uniform("caption", len(rows)).cpu())
        shape = networks.teacher.latent_shape(len(rows), run.data.size)
        z = noise.normal("z", shape)
        generator = networks.generator
        fresh = tuple((noise.normal(f"eps/level/{k}", shape), noise.normal(f"eps/level/{k}/diffused", shape))
                      for k in range(1, len(generator.levels)))
        x = generator(z, y, renoise=lambda k: fresh[k - 1][0])
        shown = control.image(control.h(unit(networks.space.decode(x)).clamp(0, 1)))
        return cls(y, z, noise.normal("eps", shape), noise.uniform("k", len(rows)), x, shown, fresh)


def diffused(z: Tensor, eps: Tensor, s: Tensor) -> Tensor:
    """z_s = sqrt(1 - s^2) z + s eps: noise stays standard normal at every s [B] in [0, 1]."""
    s = s.to(z.device).view(-1, *[1] * (z.ndim - 1))
    return ((1 - s**2).sqrt() * z + s * eps).to(z.dtype)
