"""A ControlNet on a one-step generator by denoising (JDM Eq. 11): obeys, and blurs."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from jdm.data import cache as prepared
from jdm.data.batches import Batches
from jdm.data.noise import Noise
from jdm.data.sources import load_pictures
from jdm.evaluation.evaluate import validation_probe
from jdm.methods.denoising import encoded
from jdm.methods.networks import Networks, loaded_control
from jdm.run import Optimiser, Phase, Run, Task
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
        base: the frozen one-step generator; the multi-step teacher's own UNet where empty. Paper: its text says the
            former, its subscript phi the latter; here: both can be had.
    """

    control: str = "canny"
    base: str = ""
    t_init: int = 625
    optimiser: Optimiser = field(default_factory=lambda: Optimiser(lr=1e-5, betas=(0.9, 0.95)))

    def task(self, run: Run) -> Task:
        control = loaded_control(self.control, run.data.size)
        networks = Networks.of(run, self.t_init, start=self.base, train_unet=False).with_controlnet()
        pictures = prepared.pictures(run, load_pictures(run.data.source, run.data.split, run.data.size))
        latents, batches = encoded(networks.space, pictures), Batches(pictures, run.batch, run.seed)
        net = networks.student.controlnet
        assert net is not None

        def begin(step: int) -> Pair:
            (rows, images), noise = batches(step), Noise(run.seed, step, run.device)
            shown = control.image(control.h(unit(from_bytes(images)).to(run.device)))
            y = pictures.prompts(rows, noise.uniform("caption", len(rows)).cpu())
            x = latents[rows].to(run.device)
            return Pair(x, y, shown, noise.normal("eps", x.shape))

        def loss(pair: Pair, _: int) -> tuple[Tensor, dict]:
            return self.loss(networks, pair), {}

        return Task([Phase("controlnet", [(list(net.parameters()), self.optimiser)], loss)], begin, {"controlnet": net},
                    networks.exporter("dsm-controlnet", self.control, base=self.base or "teacher"),
                    averaged=("controlnet",), probe=validation_probe(networks, run, control),
                    frozen=networks.running)

    def loss(self, networks: Networks, pair: Pair) -> Tensor:
        """|| G(x_T, y, c) - x ||^2, the mean over components; scalar."""
        t = networks.schedule.t(self.t_init).to(pair.x.device).expand(len(pair.x))
        x_T = networks.schedule.noised(pair.x, t, pair.eps)
        return (networks.generator(x_T, pair.y, pair.shown) - pair.x).square().mean()
