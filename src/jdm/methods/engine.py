"""A distillation: student + fake score + terms become the phases that the training loop runs.

One step: a batch of pictures gives (y, c); the student draws x = G(z, y, c) once. Phase "fake" follows x with the fake
score, phase "posterior" trains p(x | x_t) on x, and phase "generator" moves x along the sum of the terms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from jdm.controls import Control
from jdm.data.batches import Batches
from jdm.data.noise import Noise
from jdm.errors import UsageError
from jdm.generator import checked_levels
from jdm.levels import Levels
from jdm.loading import Loaded
from jdm.methods.networks import Branch, Fake, Networks, Student
from jdm.posterior import ConsistencyPosterior, FrozenPosterior
from jdm.run import Needs, Phase, Product, Run, Task
from jdm.schedule import NoiseSchedule, matched
from jdm.score import Estimate, ScoreModel
from jdm.sharing import batch_mean
from jdm.space import from_bytes, unit
from jdm.terms import AnyPosterior, Term, ascend, condition_alignment, cosine, sum_of, together


@dataclass(frozen=True)
class Distillation:
    """The declaration of a paper.

    Attributes:
        name: of the method, for the model's card.
        terms: by name; the student moves along their sum.
        control: by name or import path; empty for a student without control.
        branch: the student's ControlNet; None for a student without one.
        teacher: a model in place of the run's, from which real, fake and student start; empty for the run's.
    """

    name: str
    student: Student
    fake: Fake
    terms: Mapping[str, Term]
    control: str = ""
    branch: Branch | None = None
    teacher: str = ""

    @property
    def guidance(self) -> float:
        """Guidance of the real score in the first term that has one; 1 where none has."""
        return next((t.guidance for t in self.terms.values() if hasattr(t, "guidance")), 1.0)  # type: ignore[attr-defined]

    @property
    def posteriors(self) -> list[AnyPosterior]:
        """The different posteriors of the terms."""
        return list(dict.fromkeys(t.posterior for t in self.terms.values() if hasattr(t, "posterior")))  # type: ignore[attr-defined]

    @property
    def guides(self) -> list[str]:
        """Names of further teachers."""
        return list(dict.fromkeys(name for t in self.terms.values() for name in _models(t)))

    @property
    def rewards(self) -> list[str]:
        return list(dict.fromkeys(t.model for t in self.terms.values() if hasattr(t, "model")))  # type: ignore[attr-defined]

    def needs(self, run: Run) -> Needs:
        if len(self.rewards) > 1:
            raise UsageError(f"a run climbs one reward, got {' and '.join(self.rewards)}; add them in a function of "
                             "your own")
        models = {"teacher": self.teacher or run.model, "start": self.student.start,
                  "controlnet": self.branch.start if self.branch else "",
                  **{f"guide {name}": name for name in self.guides},
                  "posterior": next((p.model for p in self.posteriors if isinstance(p, FrozenPosterior)), "")}
        return Needs({role: name for role, name in models.items() if name}, self.control,
                     next(iter(self.rewards), ""), ("teacher", *(f"guide {name}" for name in self.guides)))

    def product(self, loaded: Loaded) -> Product:
        return self._product(Networks(loaded, self.student, self.branch, controlled=bool(self.teacher)))

    def task(self, loaded: Loaded) -> Task:
        self._check(loaded.teacher.schedule, loaded.run.steps)
        control, _ = loaded.control, loaded.reward  # a control or reward that cannot be used is found out first
        networks = Networks(loaded, self.student, self.branch, self.fake, controlled=bool(self.teacher))
        for posterior in self.posteriors:
            networks.add_posterior(posterior)
        for name in self.guides:
            networks.add_guide(f"guide {name}")
        phases = [fake_phase(networks, self.fake)]
        phases += [posterior_phase(networks, p) for p in self.posteriors if isinstance(p, ConsistencyPosterior)]
        phases.append(self._generator_phase(networks))
        for phase in phases[1:]:
            phase.start = self.fake.warm_up
        return Task(phases, steps_of(networks, control), networks.modules, self._product(networks),
                    networks.probe(), networks.running)

    def direction(self, networks: Networks, step: Step) -> tuple[Tensor, dict[str, Any]]:
        """The sum of the terms on x [B, ...], detached, and what to log."""
        views: dict[Levels | None, View] = {}
        parts: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            if term.levels not in views:
                views[term.levels] = View(step, networks, self, term.levels)
            parts[name] = term.direction(views[term.levels])
        bounds = {name: t.bound.at(step.progress) for name, t in self.terms.items() if hasattr(t, "bound")}  # type: ignore[attr-defined]
        bounded = together(parts, bounds, batch_mean)
        logs = {k: v for view in views.values() for k, v in view.logs.items()} | {
            name: rms(part) for name, part in bounded.items()}
        logs |= {f"{name}_raw": rms(parts[name]) for name in bounds}
        first, *others = bounded
        logs |= {f"cos_{first}_{name}": cosine(bounded[first], bounded[name]) for name in others}
        return sum_of(list(bounded.values())), logs

    def _generator_phase(self, networks: Networks) -> Phase:
        def loss(step: Step, _: int) -> tuple[Tensor, dict[str, Any]]:
            along, logs = self.direction(networks, step)
            return ascend(step.x, along), logs | {"std_x": step.x.detach().std()}

        return Phase("generator", networks.student_groups(self.branch), loss, clip=self.student.clip)

    def _product(self, networks: Networks) -> Product:
        extra = {"reward": next(iter(self.rewards), None), "guide": next(iter(self.guides), None)}
        return networks.product(self.name, self.control, **({} if self.control else extra))

    def _check(self, schedule: NoiseSchedule, steps_of_run: int) -> None:
        """UsageError where the declaration asks for what cannot be computed."""
        steps = checked_levels(self.student.levels, schedule.n)
        if not 0 <= self.fake.warm_up < steps_of_run:
            raise UsageError(f"the fake score's warm-up must be at least 0 and shorter than the run's {steps_of_run} "
                             f"steps, got {self.fake.warm_up}; lower --fake.warm-up or raise --steps")
        bounded = [name for name, t in self.terms.items() if hasattr(t, "bound")]
        if not self.terms or len(bounded) == len(self.terms):
            raise UsageError("the terms need one without a bound, such as fidelity: bounds are in units of its length")
        for name, term in self.terms.items():
            if term.levels is None:
                continue
            high = torch.tensor([float(term.levels.high)], dtype=torch.float64)
            if float(schedule.alpha(high)) == 0:
                raise UsageError(f"the levels of term {name} reach {term.levels.high:g}, where no signal is left; "
                                 f"lower --{name}.levels.high")
            cleanest = 1.0 if len(steps) == 1 else float(schedule.t(min(steps)))
            if term.levels.low > term.levels.highest(cleanest):
                raise UsageError(f"the levels of term {name} begin at {term.levels.low:g}, above the student's "
                                 f"cleanest input, {cleanest:g} (level {min(steps)}); lower --{name}.levels.low, or "
                                 f"set --{name}.levels.within all")


class Declared:
    """A method whose `distillation` declares all of it; its class is a frozen dataclass of nested settings."""

    def distillation(self) -> Distillation:
        """The declaration of these settings."""
        raise UsageError(f"{type(self).__name__} does not declare a distillation")

    def needs(self, run: Run) -> Needs:
        return self.distillation().needs(run)

    def product(self, loaded: Loaded) -> Product:
        return self.distillation().product(loaded)

    def task(self, loaded: Loaded) -> Task:
        return self.distillation().task(loaded)


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
        rows, images = batches(step)
        self.images = unit(from_bytes(images)).to(run.device)
        self.y = batches.pictures.prompts(rows, self.noise.uniform("caption", len(rows)).cpu())
        self.c = None if control is None else control.h(self.images)
        self.shown = None if control is None or self.c is None else control.image(self.c)
        self.z = self.noise.normal("z", networks.teacher.latent_shape(len(rows), run.data.size))
        self._networks = networks

    @cached_property
    def last(self) -> int:
        """The denoising step that is drawn: the one whose output is x."""
        return self.noise.choice("level", len(self._networks.settings.levels))

    @property
    def content(self) -> float:
        """t of what the drawn denoising step is given; 1 for the first, whose input is pure noise."""
        return float(self._networks.schedule.t(self._networks.settings.levels[self.last])) if self.last else 1.0

    @cached_property
    def x(self) -> Tensor:
        """The student's sample, differentiable in its parameters; of several levels, at one that is drawn each step.

        The denoising steps before the drawn one run without gradient (backward simulation).
        """
        return self._networks.generator.rollout(self.z, self.y, self.shown, self.last,
                                                lambda k: self.noise.normal(f"eps/level/{k}", self.z.shape))

    def noised(self, stream: str, schedule: NoiseSchedule, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
        """(x_t, t, eps) of the detached sample, t uniform on the grid points in [low, high]."""
        x = self.x.detach()
        t = schedule.grid(self.noise.uniform(f"t/{stream}", len(x)), low, high)
        eps = self.noise.normal(f"eps/{stream}", x.shape)
        return schedule.noised(x, t, eps), t, eps


def steps_of(networks: Networks, control: Control | None) -> Callable[[int], Step]:
    """step number -> its Step."""
    run = networks.loaded.run
    batches = Batches(networks.loaded.pictures, run.batch, run.seed)
    return lambda step: Step(networks, batches, control, step)


class View:
    """A step's sample at one term's levels, with every estimate of it computed once; a `jdm.terms.View`."""

    def __init__(self, step: Step, networks: Networks, distillation: Distillation, levels: Levels | None):
        self.step, self.networks, self.of = step, networks, distillation
        self.x, self.y, self.logs = step.x.detach(), step.y, {}
        self._estimates: dict[Any, Any] = {}
        if levels is not None:
            self.x_t, self.t, _ = step.noised(levels.stream, networks.schedule, levels.low,
                                              levels.highest(step.content))
            self.alpha, self.sigma = networks.schedule.alpha(self.t, self.x), networks.schedule.sigma(self.t, self.x)
            # Where a term at these levels asks for both halves of guidance, one pass serves all terms.
            self._paired = any(t.levels == levels and getattr(t, "teacher", None) == ""
                               for t in distillation.terms.values())

    def log(self, **values: Tensor) -> None:
        self.logs |= values

    def real(self, guidance: float | None = None) -> Estimate:
        w = self.of.guidance if guidance is None else guidance
        return self._once(("real", w), lambda: self._real(w))

    def fake(self) -> Estimate:
        return self._once("fake", self._fake)

    def guidance_pair(self, teacher: str) -> tuple[Estimate, Estimate]:
        return self._once(("pair", teacher), lambda: self._pair(teacher))

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

    def _once(self, key: Any, compute: Callable[[], Any]) -> Any:
        if key not in self._estimates:
            with torch.no_grad():
                self._estimates[key] = compute()
        return self._estimates[key]

    def _real(self, guidance: float) -> Estimate:
        score, blind = self.networks.real_score(guidance), not self.of.fake.prompt
        if self._paired and (blind or guidance == 1):
            return self.guidance_pair("")[1 if blind else 0]
        if blind:
            return score(self.x_t, self.t, [""] * len(self.x))
        return score.guided(self.x_t, self.t, self.y, self._shown)

    def _fake(self) -> Estimate:
        return self._fake_at(self.x_t, self.t)

    def _fake_at(self, x_t: Tensor, t: Tensor) -> Estimate:
        return fake_estimate(self.networks, self.of.fake, self.step, x_t, t)

    def _pair(self, teacher: str) -> tuple[Estimate, Estimate]:
        if not teacher:
            score = self.networks.real_score(1.0)
            return score.conditional_and_unconditional(self.x_t, self.t, self.y, self._shown)
        return guidance_of(self.networks.guides[f"guide {teacher}"], self.networks.schedule, self.x_t, self.t, self.y)

    @property
    def _shown(self) -> Tensor | None:
        """The control, for a teacher that sees it."""
        return self.step.shown if self.networks.real_sees_control else None


def fake_estimate(networks: Networks, fake: Fake, step: Step, x_t: Tensor, t: Tensor) -> Estimate:
    """The fake score's estimate of x_t, given what it is trained with: the prompt, the control, or neither."""
    y = step.y if fake.prompt else [""] * len(x_t)
    return networks.fake(x_t, t, y, step.shown if networks.fake_sees_control else None)


def fake_phase(networks: Networks, fake: Fake) -> Phase:
    """The fake score follows the student's samples: E || eps_psi(x_t, t, y) - eps ||^2 (JDM Eq. 6), or of x0."""
    def loss(step: Step, repeat: int) -> tuple[Tensor, dict]:
        x_t, t, eps = step.noised(f"fake/{repeat}", networks.schedule, fake.low, fake.high)
        found = fake_estimate(networks, fake, step, x_t, t)
        apart = found.eps - eps if fake.loss == "eps" else found.x0 - step.x.detach()
        return apart.square().mean(), {}

    return Phase("fake", networks.fake_groups(fake), loss, fake.updates, clip=fake.clip)


def posterior_phase(networks: Networks, settings: ConsistencyPosterior) -> Phase:
    """Consistency training of the posterior's LoRA on the student's samples (JDM Eq. 8)."""
    posterior = networks.posteriors[settings]
    assert posterior is not None

    def loss(step: Step, _: int) -> tuple[Tensor, dict]:
        uniform = step.noise.uniform("k", len(step.z))
        eps = step.noise.normal("eps/posterior", step.z.shape)
        return posterior.consistency_loss(step.x, step.y, uniform, eps), {}

    lora = list(networks.adapters["posterior"].parameters())
    return Phase("posterior", [(lora, settings.optimiser)], loss, clip=settings.clip)


def guidance_of(guide: ScoreModel, schedule: NoiseSchedule, x_t: Tensor, t: Tensor,
                y: list[str]) -> tuple[Estimate, Estimate]:
    """A guide's conditional and unconditional estimates of x_t, read at this schedule's (alpha, sigma).

    Two schedules meet at equal signal-to-noise ratio: the guide sees x_t rescaled to its own alpha there. Its levels
    are discrete, so the ratios agree to half a level.
    """
    alpha, sigma = schedule.alpha(t, x_t), schedule.sigma(t, x_t)
    own = matched(guide.schedule, schedule, t)
    scale = guide.schedule.alpha(own, x_t) / alpha
    both = guide.conditional_and_unconditional(x_t * scale, own, y)
    cond, uncond = (Estimate(x_t.float(), e.eps, alpha, sigma) for e in both)
    return cond, uncond


def rms(direction: Tensor) -> Tensor:
    """Root mean square, over samples and components; for the log."""
    return direction.square().mean().sqrt()


def _models(term: Term) -> list[str]:
    """Names of the models a term reads beside the run's own."""
    return [name for key in getattr(term, "models", ()) if (name := getattr(term, key))]
