"""A distillation: student + fake score + terms become the phases that the training loop runs.

One step: a batch of pictures gives (y, c); the student draws x = G(z, y, c) once. Phase "fake" follows x with the fake
score, phase "posterior" trains p(x | x_t) on x, and phase "generator" moves x along the sum of the terms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from jdm.directions import ascend, cosine, health, rms, sum_of, together
from jdm.levels import Levels
from jdm.loading import Loaded
from jdm.methods.networks import Branch, Fake, Networks, Student
from jdm.methods.refusals import refuse_distilled, refuse_impossible, refuse_several
from jdm.methods.step import Step, View, fake_estimate
from jdm.posterior import ConsistencyPosterior, FrozenPosterior
from jdm.run import Needs, Phase, Product, Run, Task
from jdm.sharing import batch_mean
from jdm.terms import (
    AnyPosterior,
    Bounded,
    CFGAugmentation,
    Fidelity,
    Guided,
    OfTeachers,
    Rewarded,
    Term,
    ThroughPosterior,
    WithModule,
)


@dataclass(frozen=True)
class Distillation:
    """The declaration of a paper.

    Attributes:
        name: name of the method, for the model's card.
        fake: the score of the student's samples; None where no term reads it.
        terms: by name; the student moves along their sum.
        control: by name or import path; empty for a student without control.
        branch: the student's ControlNet; None for a student without one.
        teacher: a model in place of the run's, from which real, fake and student start; empty for the run's.
    """

    name: str
    student: Student
    fake: Fake | None
    terms: Mapping[str, Term]
    control: str = ""
    branch: Branch | None = None
    teacher: str = ""

    @property
    def guidance(self) -> float:
        """Guidance of the real score in the first term that has one; 1 where none has."""
        return next((t.guidance for t in self.terms.values() if isinstance(t, Guided)), 1.0)

    @property
    def posteriors(self) -> list[AnyPosterior]:
        """The posteriors of the terms, each once."""
        return list(dict.fromkeys(t.posterior for t in self.terms.values() if isinstance(t, ThroughPosterior)))

    @property
    def guides(self) -> list[str]:
        """Names of the further teachers that terms read, each once."""
        return list(dict.fromkeys(name for t in self.terms.values() if isinstance(t, OfTeachers) for name in t.others))

    @property
    def rewards(self) -> list[str]:
        return list(dict.fromkeys(t.model for t in self.terms.values() if isinstance(t, Rewarded)))

    def needs(self, run: Run) -> Needs:
        refuse_several(self.rewards)
        models = {"teacher": self.teacher or run.model, "start": self.student.start,
                  "controlnet": self.branch.start if self.branch else "",
                  **{f"guide {name}": name for name in self.guides},
                  "posterior": next((p.model for p in self.posteriors if isinstance(p, FrozenPosterior)), "")}
        return Needs({role: name for role, name in models.items() if name}, self.control,
                     next(iter(self.rewards), ""), ("teacher", *(f"guide {name}" for name in self.guides)))

    def product(self, loaded: Loaded) -> Product:
        return self._product(Networks(loaded, self.student, self.branch, controlled=bool(self.teacher)))

    def task(self, loaded: Loaded) -> Task:
        refuse_impossible(self, loaded.teacher.schedule, loaded.run.steps)
        refuse_distilled(loaded, self.terms)
        control, _ = loaded.control, loaded.reward  # a control or reward that cannot be used is found out first
        networks = Networks(loaded, self.student, self.branch, self.fake, controlled=bool(self.teacher))
        for posterior in self.posteriors:
            networks.add_posterior(posterior)
        for name in self.guides:
            networks.add_guide(f"guide {name}")
        phases = [fake_phase(networks, self.fake)] if self.fake else []
        phases += [posterior_phase(networks, p) for p in self.posteriors if isinstance(p, ConsistencyPosterior)]
        for name, term in self.terms.items():
            if isinstance(term, WithModule):
                networks.add_part(name, term)
                phases.append(self._term_phase(networks, name, term))
        phases.append(self._generator_phase(networks))
        for phase in phases[1:]:
            phase.start = self.fake.warm_up if self.fake else 0
        scores = [] if self.fake else [networks.real, *(guide.net for guide in networks.guides.values())]
        batches = loaded.batches()
        return Task(phases, lambda step: Step(networks, batches, control, step), networks.modules,
                    self._product(networks), networks.probe(), [*networks.running, *scores],
                    networks.preview(self.guidance))

    def direction(self, networks: Networks, step: Step) -> tuple[Tensor, dict[str, Any]]:
        """The sum of the terms on x [B, ...], detached, and what to log."""
        parts, logs = step.once("terms", lambda: self._terms(networks, step))
        bounds = {name: t.bound.at(step.progress) for name, t in self.terms.items() if isinstance(t, Bounded)}
        bounded = together(parts, bounds, batch_mean)
        logs = logs | {name: rms(part) for name, part in bounded.items()}
        logs |= {f"{name}_raw": rms(parts[name]) for name in bounds}
        matching, augmentation = (next((n for n, t in self.terms.items() if isinstance(t, kind)), "")
                                  for kind in (Fidelity, CFGAugmentation))
        if matching and augmentation:
            logs["dm_over_ca"] = logs[matching] / logs[augmentation].clamp(min=1e-12)
        first, *others = bounded
        logs |= {f"cos_{first}_{name}": cosine(bounded[first], bounded[name]) for name in others}
        return sum_of(list(bounded.values())), logs

    def _terms(self, networks: Networks, step: Step) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Each term's direction by name, before any bound, and what the terms log."""
        views: dict[Levels | None, View] = {}
        parts: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            if term.levels not in views:
                views[term.levels] = View(step, networks, self, term.levels)
            parts[name] = term.direction(views[term.levels])
        return parts, {k: v for view in views.values() for k, v in view.logs.items()}

    def _generator_phase(self, networks: Networks) -> Phase:
        def loss(step: Step, _: int) -> tuple[Tensor, dict[str, Any]]:
            along, logs = self.direction(networks, step)
            return ascend(step.x, along), logs | health(step.x.detach())

        return Phase("generator", networks.student_groups(self.branch), loss, clip=self.student.clip, asks_batch=True)

    def _term_phase(self, networks: Networks, name: str, term: WithModule) -> Phase:
        """Trains the module of a term by the term's own loss."""
        def loss(step: Step, _: int) -> tuple[Tensor, dict[str, Any]]:
            at = View(step, networks, self, self.terms[name].levels)
            return term.loss(at), at.logs

        return Phase(name, [(list(networks.parts[name].parameters()), term.optimiser)], loss, clip=term.clip)

    def _product(self, networks: Networks) -> Product:
        extra = {"reward": next(iter(self.rewards), None), "guide": next(iter(self.guides), None)}
        return networks.product(self.name, self.control, **({} if self.control else extra))


def fake_phase(networks: Networks, fake: Fake) -> Phase:
    """Trains the fake score on the student's samples: E || eps_psi(x_t, t, y) - eps ||^2 (JDM Eq. 6), or its `loss`."""
    def loss(step: Step, repeat: int) -> tuple[Tensor, dict]:
        x_t, t, eps = step.noised(f"fake/{repeat}", networks.schedule, fake.low, fake.high)
        found = fake_estimate(networks, fake, step, x_t, t)
        return found.error(step.x.detach(), eps, fake.loss).square().mean(), {}

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
