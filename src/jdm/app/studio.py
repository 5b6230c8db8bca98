"""The models behind the API: they take settings and a picture, check both, and draw in the one thread."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from jdm.app.limits import Limits
from jdm.app.messages import Answer, Asked, Bounds, Compare, Control, Map, Model, Models, Settings, packed
from jdm.app.students import Drawn, Student
from jdm.app.worker import Worker
from jdm.data.pictures import read_picture
from jdm.errors import UsageError
from jdm.size import height_width


class Studio:
    """The students of one server, by name."""

    def __init__(self, students: Sequence[Student], worker: Worker, limits: Limits):
        self.students = {student.name: student for student in students}
        self.worker, self.limits = worker, limits

    def described(self) -> Models:
        """The models as the page sees them."""
        device = str(next(next(iter(self.students.values())).model.backbone.parameters()).device)
        return Models(device=device, models=[described(student) for student in self.students.values()],
                      limits=bounds(self.limits))

    def chosen(self, asked: Settings, compare: bool) -> tuple[Student, Settings]:
        """The model that draws a request, and its settings: the model asked for, or its slow yardstick to compare with.

        A yardstick has one control, which it gets at the strength of the student's own.

        Raises:
            UsageError: there is none, or a setting is beyond the limits.
        """
        if len(asked.prompt) > self.limits.prompt:
            raise UsageError(f"a prompt may have {self.limits.prompt:,} characters, got {len(asked.prompt):,}; "
                             "shorten it")
        if asked.n > self.limits.pictures:
            raise UsageError(f"n must be at most {self.limits.pictures}, got {asked.n}; ask for fewer pictures")
        student = self.students.get(asked.model or next(iter(self.students)))
        if student is None:
            raise UsageError(f"there is no model {asked.model!r:.80}; choose {' or '.join(self.students)}")
        if not compare:
            return student, asked
        if (slow := student.yardstick) is None:
            raise UsageError(f"there is no slow model to compare {student.name} with; name one with jdm app --compare")
        own = asked.strengths.get(student.controls[0].model, 1.0)
        return slow, asked.model_copy(update={"strengths": {slow.controls[0].model: own}})

    async def answer(self, asked: Asked, compare: bool) -> Answer:
        """The answer to a request over HTTP."""
        student, settings = self.chosen(asked, compare)

        def work(deadline: float) -> Answer:
            image = None if asked.image is None else _read(asked.image, student, self.limits)
            drawn = student.draw(settings, image, deadline, self.limits)
            return Answer(images=[_png(image) for image in drawn.images],
                          maps=[Map(control=name, image=_png(image)) for name, image in drawn.maps],
                          milliseconds=1000 * drawn.seconds, steps=drawn.steps, notes=drawn.notes)

        return await self.worker.run(work)

    async def live(self, take: Any, compare: bool = False) -> bytes:
        """The binary message that answers a live page's newest request, which `take()` gives when its turn comes."""

        def work(deadline: float) -> bytes:
            asked, pixels = take()
            student, settings = self.chosen(asked, compare)
            drawn = student.draw(settings, _pixels(pixels, student), deadline, self.limits)
            return _message(asked.id, drawn)

        return await self.worker.run(work, counted=False)


def bounds(limits: Limits) -> Bounds:
    """The limits that a page must know."""
    return Bounds(prompt=limits.prompt, pictures=limits.pictures, bytes=limits.bytes, pixels=limits.pixels)


def described(student: Student) -> Model:
    """A student as the page sees it."""
    height, width = height_width(student.model.size)
    slow = student.yardstick
    controls = [Control(model=c.model, label=c.control.name, spec=c.spec, hand=c.control.by_hand)
                for c in student.controls]
    return Model(name=student.name, width=width, height=height, steps=student.steps, controls=controls,
                 compare=None if slow is None else Compare(name=slow.name, steps=slow.steps),
                 page=(student.model.card or {}).get("page", {}))


def _read(text: str, student: Student, limits: Limits) -> Tensor:
    """The picture in a request, uint8 [3, H, W] of the model's size."""
    try:
        content = base64.b64decode(text.partition("base64,")[2] or text, validate=True)
    except (binascii.Error, ValueError):
        raise UsageError("image: it is not base64; send a picture file in base64, with or without data:...") from None
    return read_picture(io.BytesIO(content), "image", len(content), student.model.size, limits.pixels)


def _pixels(pixels: bytes, student: Student) -> Tensor | None:
    """The pixels of a live message, RGB, as uint8 [3, H, W]; None where there are none."""
    if not pixels:
        return None
    height, width = height_width(student.model.size)
    if len(pixels) != height * width * 3:
        raise UsageError(f"a drawing must have {height} x {width} pixels of 3 bytes, got {len(pixels)} bytes")
    return torch.from_numpy(np.frombuffer(pixels, np.uint8).reshape(height, width, 3).transpose(2, 0, 1).copy())


def _message(id: int, drawn: Drawn) -> bytes:
    head = {"id": id, "maps": [name for name, _ in drawn.maps], "n": len(drawn.images),
            "height": drawn.images.shape[2], "width": drawn.images.shape[3], "milliseconds": 1000 * drawn.seconds,
            "steps": drawn.steps, "notes": drawn.notes}
    pictures = torch.stack([*(image for _, image in drawn.maps), *drawn.images])
    return packed(head, pictures.permute(0, 2, 3, 1).contiguous().numpy().tobytes())


def _png(image: Tensor) -> str:
    content = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()
