"""The inputs of a run, loaded: models, control, reward, pictures; each is read when it is first asked for."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jdm.controls import Control, checked, load_control
from jdm.controls.base import NAMED
from jdm.data.batches import Batches
from jdm.data.buckets import bucket_sizes
from jdm.data.cache import Cache, distinct
from jdm.data.latents import encoded
from jdm.data.sources import Pictures, load_pictures
from jdm.errors import UsageError
from jdm.evaluation.sampling import warn_of_misfit
from jdm.files import read_json
from jdm.library import load_controlnet, load_model, tiny_decoder
from jdm.models import nano
from jdm.models.execution import choose_attention
from jdm.models.family import Family, placed
from jdm.models.text import TextEncoder
from jdm.rewards import Reward, checked_reward, load_reward
from jdm.run import Needs, Record, Run
from jdm.size import Size, height_width
from jdm.space import Space

MOST_PROMPTS = 20_000  # captions whose length is looked at


class Loaded:
    """The needs of a run, on its device and at its picture size.

    Subclasses change how things are read: those of `jdm.cost.shapes.Shapes` have tensors with shapes but no contents.

    Args:
        needs: what may be asked for; anything else is an error of the method.
    """

    strict = True  # raises what is refused of the pictures, rather than setting it aside (`load_pictures`)

    def __init__(self, run: Run, needs: Needs | None = None):
        self.run, self.needs = run, needs or run.method.needs(run)
        self.sizes = bucket_sizes(run.data.size, run.data.buckets)
        self._refuse_cuts()
        choose_attention(run)
        self._models: dict[str, Family] = {}
        self.texts: dict[str, TextEncoder] = {}

    def model(self, role: str) -> Family:
        """The model of a role, at the run's picture size and on its device."""
        if role not in self._models:
            model = self._model(role, self.needs.models[role]).at(self.run.data.size)
            self._refuse_buckets(model)
            if role == "teacher" or role in self.needs.prompts:
                model.to(self.run.device, texts=not self.prepared)
            else:  # nothing else of it runs
                placed(model.backbone, self.run.device)
            self._models[role] = model
        return self._models[role]

    def has(self, role: str) -> bool:
        """Whether a model of that role is among the needs."""
        return role in self.needs.models

    @property
    def teacher(self) -> Family:
        return self.model("teacher")

    def text(self, role: str = "teacher") -> TextEncoder:
        """The text encoder of a role's model; its states come from the prepared folder where the run names one."""
        if role not in self.texts:
            encoder = self.model(role).text(one_by_one=True)
            if self.cache is not None:
                encoder.stored, encoder.device = self.cache.text(encoder), self.run.device
            self.texts[role] = encoder
        return self.texts[role]

    def student(self, role: str, levels: tuple[int, ...]) -> Family:
        """The trained student of a role, which must share the teacher's latents and run at these levels.

        Raises:
            UsageError: it is a multi-step model, runs at other levels, or works on other latents.
        """
        model, name = self.model(role), self.needs.models[role]
        if why := model.begins(levels, self.teacher.schedule):
            raise UsageError(f"{name} {why}")
        if not self.same_latents(model):
            raise UsageError(f"{name} works on other latents than the teacher; both must share one autoencoder")
        return model

    def controlnet(self, role: str) -> nn.Module:
        """The ControlNet of a role: of a model or of a folder that is one; it must fit the teacher."""
        return self._controlnet(self.needs.models[role])

    @property
    def prepared(self) -> bool:
        """Whether the prompts' states are on disk, so that no text encoder takes room beside the training."""
        return bool(self.run.data.prepared)

    @cached_property
    def cache(self) -> Cache | None:
        """The prepared folder; None where the run names none."""
        return Cache.read(Path(self.run.data.prepared)) if self.run.data.prepared else None

    @cached_property
    def pictures(self) -> Pictures:
        """The training split, from the prepared folder where the run names one."""
        loaded = self.split(self.run.data.split)
        return loaded if self.cache is None else self.cache.pictures(self.run.data, loaded)

    @cached_property
    def held_out(self) -> Pictures:
        """The validation split."""
        return self.split(self.run.data.validation)

    def batches(self) -> Batches:
        """The batches of the training split."""
        return Batches(self.pictures, self.run.batch, self.run.seed, self.run.data)

    def latents(self) -> Tensor:
        """The latents of the whole training split, [N, C, h, w] on the CPU."""
        return encoded(self.space, self.pictures)

    @cached_property
    def space(self) -> Space:
        """The space of those latents: of the needs' own autoencoder, or the teacher's."""
        own = self.needs.autoencoder
        return Space(placed(nano.load_vae(own), self.run.device)) if own else self.teacher.space

    @cached_property
    def control(self) -> Control | None:
        """The control, tried at the size it will see; None where the run needs none."""
        if not self.needs.control:
            return None
        found, data = self._control(self.needs.control, self.run.data.size), self.run.data
        if data.buckets:
            for size in (self.sizes[0], self.sizes[-1]):
                checked(found, size)
        if data.flip and data.controls and found.handed:
            raise UsageError(f"--data.flip {data.flip:g} would mirror the maps of --data.controls, and a mirrored "
                             f"{found.name} map is not the map of the mirrored picture; leave --data.flip out")
        return found

    @property
    def preprocessor(self) -> dict | None:
        """How another program makes the control's map, for the model's card.

        None for a run without control. A user's control is not run for this: where it was not loaded yet, it is what
        the run's own record says of it, or its name.
        """
        spec, found = self.needs.control, self.__dict__.get("control")
        if not spec:
            return None
        if found is None and spec.partition(":")[0] in NAMED:
            found = load_control(spec)
        if found is None:
            source, _, name = spec.rpartition(":")
            return read_json(self.run.out / "run.json", Record).get("preprocessor",
                                                                    {"function": f"{Path(source).name}:{name}"})
        return found.preprocessor

    @cached_property
    def reward(self) -> Reward | None:
        """The reward, tried on two pictures; None where the run needs none."""
        return self._reward(self.needs.reward) if self.needs.reward else None

    @cached_property
    def decoder(self) -> nn.Module | None:
        """The tiny decoder of run.decoder; None for the teacher's own."""
        return placed(self._decoder(self.run.decoder), self.run.device) if self.run.decoder else None

    def warn_of_misfits(self) -> None:
        """Warns of teachers whose parts do not seem to belong together, by four training pictures."""
        for role in self.needs.prompts:
            if self.has(role):
                warn_of_misfit(self.needs.models[role], self.model(role), self.pictures)

    def found(self) -> list[str]:
        """Lines on the source of the pictures: what was found, what each rule left out, and which prompts are cut."""
        report = self.pictures.report
        for role in self.needs.prompts:
            if self.has(role) and (cut := self.text(role).overlong(distinct(self.pictures)[:MOST_PROMPTS])):
                prompt, lost = next(iter(cut.items()))
                report.note(f"{len(cut):,} captions are too long for the text encoder of {self.needs.models[role]}, "
                            f"and their ends are cut: of {prompt[:40]!r}... it does not read {lost[:60]!r}")
        counted = ", ".join(f"{n:,} {split}" for split, n in report.splits.items())
        return [*([f"{report.source}: pictures: {counted}"] if counted else []), *report.lines()]

    def same_latents(self, model: Family) -> bool:
        """Whether a model's latents have the shape of the teacher's."""
        size = self.run.data.size
        return model.latent_shape(1, size) == self.teacher.latent_shape(1, size)

    def apart(self, role: str) -> float:
        """Mean distance between a role's and the teacher's latents of a probe picture, relative to their mean size."""
        size = height_width(self.run.data.size)
        probe = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(self.run.device) * 2 - 1
        a, b = self.teacher.space.encode(probe), self.model(role).space.encode(probe)
        return float((a - b).abs().mean() / a.abs().mean().clamp(min=1e-6))

    def _refuse_cuts(self) -> None:
        """UsageError where pictures are cut or mirrored anew in each step, and the method needs them as they are."""
        data, needs = self.run.data, self.needs
        flags = {f"--data.buckets {data.buckets}": data.buckets, f"--data.flip {data.flip:g}": data.flip,
                 f"--data.crop {data.crop}": data.crop != "centre"}
        why = needs.whole or ("this recipe encodes every picture once, and keeps its latents" if needs.latents else "")
        if why and (given := [flag for flag, on in flags.items() if on]):
            raise UsageError(f"{given[0]} shows pictures in another way from step to step, and {why}; leave it out")

    def _refuse_buckets(self, model: Family) -> None:
        """UsageError where a model cannot draw pictures of every bucket."""
        for size in self.sizes if self.run.data.buckets else ():
            try:
                model.latent_shape(1, size)
            except UsageError as error:
                raise UsageError(f"--data.buckets {self.run.data.buckets}: {error}; give other multiples") from None

    # How each is read

    def making(self) -> AbstractContextManager[Any]:
        """A context in which new networks are made."""
        return nullcontext()

    def split(self, split: str) -> Pictures:
        """A split of the run's pictures; one that is not trained on may be empty, and nothing is measured on it."""
        data = self.run.data
        if data.controls and not self.needs.control:
            raise UsageError(f"--data.controls {data.controls} gives control maps, and this run has no control; leave "
                             "it out, or name a recipe with one, such as nano-canny")
        return load_pictures(data.source, split, data.size, data, self.strict and split == data.split, self.strict)

    def _model(self, role: str, name: str) -> Family:
        return load_model(name)

    def _controlnet(self, name: str) -> nn.Module:
        return load_controlnet(name, self.teacher)[0]

    def _control(self, spec: str, size: Size) -> Control:
        return checked(load_control(spec), size)

    def _reward(self, spec: str) -> Reward:
        prompts = self.pictures.prompts(torch.zeros(1).long(), torch.zeros(1))
        return checked_reward(load_reward(spec, self.run.device), self.run.data.size, prompts)

    def _decoder(self, name: str) -> nn.Module:
        return tiny_decoder(name, self.teacher)
