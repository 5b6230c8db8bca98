"""A ControlNet on a one-step generator by denoising (JDM Eq. 11); its pictures obey the control and are blurred."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from jdm.controls.base import control_of
from jdm.data.noise import Noise
from jdm.loading import Loaded
from jdm.methods.networks import Branch, Networks, Student, controlnet_need
from jdm.ranges import Positive, Whole
from jdm.run import Needs, Phase, Product, Run, Task
from jdm.space import from_bytes, unit


@dataclass(frozen=True)
class Pair:
    """A picture's latent, its prompt and control image, and the noise that hides it."""

    x: Tensor
    y: list[str]
    shown: Tensor
    eps: Tensor


@dataclass(frozen=True)
class DSMControlNet:
    """E || G(x_T, y, c) - x ||^2 with x_T = alpha_T x + sigma_T eps, the NOISED picture; the ControlNet alone trains.

    Attributes:
        control: a control by name, or an import path, "my_controls.py:Posterize".
        base: the frozen one-step generator; the multi-step teacher's own backbone where empty. Paper: its text says the
            former, its subscript phi the latter; here: both can be had.
        level: level index at which the base denoises.
        controlnet: the ControlNet that is trained.
        clip: bound on the norm of the ControlNet's gradient.
    """

    control: str = "canny"
    base: str = ""
    level: Whole = 625
    controlnet: Branch = field(default_factory=Branch)
    clip: Positive = 1.0

    def needs(self, run: Run) -> Needs:
        start = {"start": self.base} if self.base else {}
        return Needs({"teacher": run.model} | start | controlnet_need(self.controlnet), self.control, latents=True)

    def product(self, loaded: Loaded) -> Product:
        return self._product(self._networks(loaded))

    def task(self, loaded: Loaded) -> Task:
        run, control, pictures = loaded.run, loaded.control, loaded.pictures
        assert control is not None
        networks = self._networks(loaded)
        latents, batches = loaded.latents(), loaded.batches()

        def begin(step: int) -> Pair:
            (rows, images, maps), noise = batches(step), Noise(run.seed, step, run.device)
            shown = control.image(control_of(
                control, unit(from_bytes(images)).to(run.device), maps, noise.uniform("control", len(rows)).cpu()))
            y = pictures.prompts(rows, noise.uniform("caption", len(rows)).cpu())
            x = latents[rows].to(run.device)
            return Pair(x, y, shown, noise.normal("eps", x.shape))

        def loss(pair: Pair, _: int) -> tuple[Tensor, dict]:
            return self.loss(networks, pair), {}

        phase = Phase("controlnet", networks.student_groups(self.controlnet), loss, clip=self.clip)
        return Task([phase], begin, networks.modules, self._product(networks),
                    networks.probe(), networks.running, networks.preview())

    def _networks(self, loaded: Loaded) -> Networks:
        return Networks(loaded, Student((self.level,), self.base, optimiser=None), self.controlnet,
                        teacher_may_start=True)

    def _product(self, networks: Networks) -> Product:
        return networks.product("dsm-controlnet", self.control, base=self.base or "teacher")

    def loss(self, networks: Networks, pair: Pair) -> Tensor:
        """|| G(x_T, y, c) - x ||^2, the mean over components; scalar."""
        t = networks.schedule.t(self.level).to(pair.x.device).expand(len(pair.x))
        x_T = networks.schedule.noised(pair.x, t, pair.eps)
        return (networks.generator(x_T, pair.y, pair.shown) - pair.x).square().mean()
