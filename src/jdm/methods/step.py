"""One step of a distillation, as its terms read it: the batch, the student's sample, and estimates of that sample.

(y, c) come from one picture; x = G(z, y, c) is drawn once; a `View` is x at one term's noise levels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jdm.controls import Control
from jdm.controls.base import control_of
from jdm.data.batches import Batches, drawn_captions
from jdm.data.noise import Noise
from jdm.directions import condition_alignment
from jdm.levels import Levels
from jdm.methods.material import Material
from jdm.methods.networks import Fake, Networks
from jdm.schedule import NoiseSchedule
from jdm.score import Estimate
from jdm.size import size_of
from jdm.space import from_bytes, unit
from jdm.terms import AnyPosterior, CFGAugmentation

if TYPE_CHECKING:
    from jdm.methods.engine import Distillation


class Step:
    """One step's batch. (y, c) come from ONE picture; x = G(z, y, c) is computed once, with its graph.

    Attributes:
        y: prompts.
        c: control [B, k, H, W] or None.
        shown: the control as the ControlNet takes it, [B, 3, H, W] in [0, 1], or None.
        images: the pictures c came from, [B, 3, H, W] in [0, 1].
        z: generator noise.
        noise: every other random number of the step, by stream name.
        progress: share of the run that is done, in [0, 1).
    """

    def __init__(self, networks: Networks, batches: Batches, control: Control | None, step: int):
        run = networks.loaded.run
        self.noise, self.progress = Noise(run.seed, step, run.device), step / run.steps
        rows, images, maps = batches(step)
        self.images = unit(from_bytes(images)).to(run.device)
        self.y = drawn_captions(batches.pictures, rows, self.noise)
        luck = self.noise.uniform("control", len(rows)).cpu()
        self.c = None if control is None else control_of(control, self.images, maps, luck)
        self.shown = None if control is None or self.c is None else control.image(self.c)
        self.z = self.noise.normal("z", networks.teacher.latent_shape(len(rows), size_of(images)))
        self._networks = networks
        self._x: Tensor | None = None
        self._has_graph, self._known = False, {}

    @cached_property
    def last(self) -> int:
        """Index of the denoising step whose output is x, drawn at random."""
        return self.noise.choice("level", len(self._networks.settings.levels))

    @property
    def content(self) -> float:
        """Noise level t of the drawn step's input; 1 for the first step, whose input is pure noise."""
        return float(self._networks.schedule.t(self._networks.settings.levels[self.last])) if self.last else 1.0

    @property
    def x(self) -> Tensor:
        """The student's sample, differentiable in the student's parameters: the output of step `last`.

        The denoising steps before that one run without gradient (backward simulation), and that one does too where
        gradients are off.
        """
        graph = torch.is_grad_enabled()
        if self._x is None or (graph and not self._has_graph):
            self._has_graph = graph
            self._x = self._networks.generator.rollout(self.z, self.y, self.shown, self.last,
                                                       lambda k: self.noise.normal(f"eps/level/{k}", self.z.shape))
        return self._x

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """A value of this step, computed where it is first asked for."""
        if name not in self._known:
            self._known[name] = compute()
        return self._known[name]

    def noised(self, stream: str, schedule: NoiseSchedule, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
        """(x_t, t, eps) of the detached sample, t uniform on the grid points in [low, high]."""
        x = self.x.detach()
        t = schedule.grid(self.noise.uniform(f"t/{stream}", len(x)), low, high)
        eps = self.noise.normal(f"eps/{stream}", x.shape)
        return schedule.noised(x, t, eps), t, eps


class View(Material):
    """The `jdm.terms.View` of one term's levels: the step's sample there; each estimate of it is computed once."""

    def __init__(self, step: Step, networks: Networks, distillation: Distillation, levels: Levels | None):
        super().__init__(step, networks, distillation)
        self.x, self.logs = step.x.detach(), {}
        if levels is not None:
            self.x_t, self.t, _ = step.noised(levels.stream, networks.schedule, levels.low,
                                              levels.highest(step.content))
            self.alpha, self.sigma = networks.schedule.alpha(self.t, self.x), networks.schedule.sigma(self.t, self.x)
            # Where a term at these levels asks for both halves of guidance, one pass serves all terms.
            self._paired = any(isinstance(t, CFGAugmentation) and t.levels == levels and not t.teacher
                               for t in distillation.terms.values())

    def log(self, **values: Tensor) -> None:
        self.logs |= values

    def real(self, guidance: float | None = None, teacher: str = "") -> Estimate:
        w = self.of.guidance if guidance is None else guidance
        return self.once(("real", w, teacher), lambda: self._other(w, teacher) if teacher else self._real(w))

    def fake(self) -> Estimate:
        return self.once("fake", self._fake)

    def guidance_pair(self, teacher: str) -> tuple[Estimate, Estimate]:
        return self.once(("pair", teacher), lambda: self._pair(teacher))

    def likelihood(self, reference: bool) -> Callable[[Tensor], Tensor]:
        step, networks, control = self.step, self.networks, self.networks.control
        assert control is not None
        assert step.c is not None
        c, pictures = step.c, step.images if reference else None

        def log_prob(x: Tensor, rows: slice) -> Tensor:
            near = None if pictures is None else pictures[rows]
            return control.log_prob(unit(networks.space.decode(x)), c[rows], near)

        return networks.of_pictures(log_prob)

    def reward(self) -> Callable[[Tensor], Tensor]:
        networks, reward = self.networks, self.networks.reward
        assert reward is not None

        def rewards(x: Tensor, rows: slice) -> Tensor:
            return reward(unit(networks.space.decode(x)), self.y[rows])

        with torch.no_grad():
            self.log(reward=rewards(self.x, slice(None)).mean())
        return networks.of_pictures(rewards)

    def through_posterior(self, value: Callable[[Tensor], Tensor], posterior: AnyPosterior, draws: int = 0) -> Tensor:
        f = self.networks.posteriors[posterior] or (lambda x_t, t, y: self._fake_at(x_t, t).x0)
        noises = [self.step.noise.normal(f"eps/draw/{k}", self.x_t.shape) for k in range(draws)]
        return condition_alignment(value, f, self.x_t, self.t, self.y, self.networks.schedule, noises)

    def _real(self, guidance: float) -> Estimate:
        score, blind = self.networks.real_score(guidance), self.of.fake is not None and not self.of.fake.prompt
        if self._paired and (blind or guidance == 1):
            return self.guidance_pair("")[1 if blind else 0]
        if blind:
            return score(self.x_t, self.t, [""] * len(self.x))
        return score.guided(self.x_t, self.t, self.y, self._shown)

    def _other(self, guidance: float, teacher: str) -> Estimate:
        """Another teacher's estimate, told what the fake score is told."""
        cond, uncond = self.guidance_pair(teacher)
        w = guidance if self.of.fake is None or self.of.fake.prompt else 0.0
        return Estimate(cond.x_t, uncond.eps + w * (cond.eps - uncond.eps), cond.alpha, cond.sigma)

    def _fake(self) -> Estimate:
        return self._fake_at(self.x_t, self.t)

    def _fake_at(self, x_t: Tensor, t: Tensor) -> Estimate:
        assert self.of.fake is not None
        return fake_estimate(self.networks, self.of.fake, self.step, x_t, t)

    def _pair(self, teacher: str) -> tuple[Estimate, Estimate]:
        if not teacher:
            score = self.networks.real_score(1.0)
            return score.conditional_and_unconditional(self.x_t, self.t, self.y, self._shown)
        guide = self.networks.guides[f"guide {teacher}"]
        return guide.guidance_on(self.networks.schedule, self.x_t, self.t, self.y)

    @property
    def _shown(self) -> Tensor | None:
        """The control, for a teacher that sees it."""
        return self.step.shown if self.networks.real_sees_control else None


def fake_estimate(networks: Networks, fake: Fake, step: Step, x_t: Tensor, t: Tensor) -> Estimate:
    """The fake score's estimate of x_t, given what it is trained with: the prompt, the control, or neither."""
    y = step.y if fake.prompt else [""] * len(x_t)
    return networks.fake(x_t, t, y, step.shown if networks.fake_sees_control else None)
