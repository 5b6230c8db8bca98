"""The models of the page: loaded, grouped by the UNet that they share, each beside its slow yardstick."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from jdm.app.limits import Limits
from jdm.app.messages import Settings
from jdm.app.worker import stopped_at
from jdm.controls import Control, checked, load_control
from jdm.errors import UsageError
from jdm.evaluation.sampling import Drawing, control_named, default_steps, warn_of_misfit
from jdm.files import ASSETS, read_json
from jdm.library import SHIPPED, load_controlnet, load_model
from jdm.models.configs import CARD
from jdm.models.family import Family, placed


@dataclass(frozen=True)
class Named:
    """A control of a student.

    Attributes:
        model: the name by which `jdm sample` loads its ControlNet.
        spec: the control's own name, for `jdm sample --control`; None where the model's card has it.
    """

    model: str
    control: Control
    net: nn.Module
    spec: str | None = None


@dataclass
class Drawn:
    """The answer to a request.

    Attributes:
        images: uint8 [n, 3, H, W].
        maps: (name of the control, uint8 [3, H, W]) of each that was used, the own first.
        seconds: time that the model computed, controls included.
    """

    images: Tensor
    maps: list[tuple[str, Tensor]]
    seconds: float
    steps: int
    notes: list[str]


@dataclass
class Student:
    """A model that draws, with the controls that can be added to its own.

    Attributes:
        controls: its own first; empty where it takes no drawing.
        yardstick: the slow model with the same control; None where there is none.
    """

    name: str
    model: Family
    controls: list[Named] = field(default_factory=list)
    yardstick: Student | None = None
    _drawings: dict[tuple[str, ...], Drawing] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return default_steps(self.model)

    def draw(self, asked: Settings, image: Tensor | None, deadline: float, limits: Limits) -> Drawn:
        """Pictures for a drawing, uint8 [3, H, W] of the model's size.

        Raises:
            UsageError: the settings and the model do not go together.
        """
        image = image if self.controls else None
        used = self._used(asked, image)
        draw = self._drawing(tuple(named.model for named in used))
        draw.sampler.net.strengths[:] = [asked.strengths.get(named.model, 1.0) for named in used] or [1.0]
        start = time.perf_counter()
        shown = None if image is None else image[None].float() / 255 if asked.as_map else draw.shown(image)
        with stopped_at(deadline, draw.sampler.net, limits):
            images = draw(asked.prompt, shown, asked.n, asked.seed, asked.to_seed, asked.blend)
        seconds = time.perf_counter() - start
        seen = [] if shown is None else (torch.cat(shown.split(3, dim=1)) * 255).round().clamp(0, 255).byte().cpu()
        maps = [(named.control.name, one) for named, one in zip(used, seen, strict=True)]
        return Drawn(images, maps, seconds, draw.sampler.steps, self._notes(asked, image))

    def _used(self, asked: Settings, image: Tensor | None) -> list[Named]:
        """The controls of a request: the own, and those whose strength is above 0."""
        known = {named.model for named in self.controls}
        if unknown := sorted(asked.strengths.keys() - known):
            raise UsageError(f"{self.name} has no control {unknown[0]!r:.60}; it has {', '.join(known) or 'none'}")
        if self.controls and image is None:
            raise UsageError(f"{self.name} draws to a control; send a picture to measure it on")
        used = [named for i, named in enumerate(self.controls) if not i or asked.strengths.get(named.model, 0) > 0]
        return used[:1] if asked.as_map else used

    def _drawing(self, used: tuple[str, ...]) -> Drawing:
        if used not in self._drawings:
            own, *also = [named for named in self.controls if named.model in used] or [None]
            self._drawings[used] = Drawing(self.model, own and own.control, None, None,
                                           [(named.net, named.control) for named in also if named])
        return self._drawings[used]

    def _notes(self, asked: Settings, image: Tensor | None) -> list[str]:
        notes = []
        if image is not None and bool((image == image[:, :1, :1]).all()):
            notes.append("The drawing is empty, so it says nothing: the picture follows the prompt alone.")
        if cut := self.model.text().overlong([asked.prompt]):
            notes.append(f"The prompt is long: the model does not read {cut[asked.prompt][:100]!r}, its end.")
        return notes


def load_students(names: Sequence[str], also: Sequence[str], control: str | None, compare: str | None,
                  device: str) -> list[Student]:
    """`sharing_students`, each beside its yardstick, the first slow model that fits it.

    Args:
        compare: the slow model; by default one of the models given, or a shipped one.

    Raises:
        UsageError: a model cannot be loaded, or does not go together with these.
    """
    students = sharing_students(names, also, control, device)
    given = [other for other in students if not other.model.levels]
    asked = [] if compare is None else [_loaded(compare, None, device)]
    loaded: dict[str, Student] = {}
    for student in (s for s in students if s.model.levels and s.controls):
        shipped = [] if compare else _shipped("many-step", student.controls[0].control.name)
        loaded |= {name: _loaded(name, None, device) for name in shipped if name not in loaded}
        fitting = [other for other in asked or [*given, *map(loaded.__getitem__, shipped)] if _fits(other, student)]
        student.yardstick = fitting[0] if fitting else None
    if compare and not any(student.yardstick for student in students):
        raise UsageError(f"{compare} cannot be compared with any of {', '.join(s.name for s in students)}: it needs "
                         "the same control, autoencoder and picture size as a student")
    return students


def sharing_students(names: Sequence[str], also: Sequence[str], control: str | None, device: str) -> list[Student]:
    """The students of the page; models of one UNet share it, and each can add the controls of the others.

    Args:
        names: models; the shipped students that draw to a control where there are none.
        also: further ControlNets for every model.
        control: control of the models whose card names none.

    Raises:
        UsageError: a model cannot be loaded, or does not go together with these.
    """
    students = [_loaded(name, control, device) for name in dict.fromkeys(names or _shipped("one-step", None))]
    for i, student in enumerate(students):
        for other in students[:i]:
            if _share(student.model, other.model):
                student.model = other.model.with_networks(controlnet=student.model.controlnet).with_parts(
                    card=student.model.card)
                break
    own = {student.name: student.controls[:] for student in students}
    for student in students:
        if not student.controls:
            continue
        student.controls += [_further(name, student.model, device) for name in also]
        student.controls += [named for other in students for named in own[other.name]
                             if other is not student and other.model.backbone is student.model.backbone]
    return students


def _loaded(name: str, control: str | None, device: str) -> Student:
    model = load_model(name).to(device)
    warn_of_misfit(name, model)
    if model.controlnet is None:
        return Student(name, model)
    named = (model.card or {}).get("control")
    own = Named(name, control_named(model, named or control), model.controlnet, None if named else control)
    return Student(name, model, [own])


def _further(name: str, model: Family, device: str) -> Named:
    net, spec = load_controlnet(name, model)
    if not spec:
        raise UsageError(f"{name} does not say which control it draws to; it needs a jdm.json with one")
    return Named(name, checked(load_control(spec), model.size, likelihood=False), placed(net, device))


def _shipped(kind: str, control: str | None) -> list[str]:
    """The shipped models of a kind that draw to this control, or to any where None."""
    found = []
    for name, (folder, controlnet) in SHIPPED.items():
        card = read_json(ASSETS / (controlnet or folder) / CARD)
        if card.get("kind") == kind and card.get("control") and control in (None, card["control"]):
            found.append(name)
    return found


def _share(a: Family, b: Family) -> bool:
    """Whether two models are the same but for their ControlNets."""
    parts = [{k: v for k, v in model.modules().items() if k != "controlnet"} for model in (a, b)]
    return a.scheduler == b.scheduler and a.levels == b.levels and parts[0].keys() == parts[1].keys() and all(
        _same(net, parts[1][key]) for key, net in parts[0].items())


def _same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two networks have equal weights."""
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


def _fits(slow: Student, student: Student) -> bool:
    """Whether both draw to the same control, in the same latents, at the same size."""
    names = [[named.control.name for named in one.controls[:1]] for one in (slow, student)]
    return names[0] == names[1] and slow.model.size == student.model.size and _same(slow.model.vae, student.model.vae)
