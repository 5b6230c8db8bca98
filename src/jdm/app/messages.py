"""Messages on the wire: the types of the HTTP API, and the binary messages of a live page."""

from __future__ import annotations

import json
import struct
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from jdm.errors import UsageError


def _written(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be text in UTF-8, without half a surrogate pair") from None
    return text


Text = Annotated[str, AfterValidator(_written)]
Strength = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**40)]
Name = Annotated[Text, Field(max_length=1000)]


class Settings(BaseModel):
    """How to draw. Every entry may be left out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Name = Field("", description="One of the models of /api/models; the first where empty.")
    prompt: Text = Field("", description="Text to draw pictures for.", examples=["ankle boot"])
    seed: Seed = Field(0, description="Seed of the starting noise; picture i starts from row i of it.")
    to_seed: Seed = Field(0, description="Seed whose noise is blended into the first.")
    blend: float = Field(0, ge=0, le=1, allow_inf_nan=False, description="Way from seed to to_seed.")
    n: int = Field(1, ge=1, le=1000, description="Number of pictures.")
    strengths: dict[Name, Strength] = Field(
        {}, description="Factor on each control, by the name of its model. The model's own is 1 and others are left "
                        "out where they are not named.")
    as_map: bool = Field(False, description="The picture is the control map itself and is not measured.")


class Asked(Settings):
    """A request to draw."""

    image: str | None = Field(None, description="Picture to measure the control on, a file in base64: PNG, JPEG, WebP "
                                                "or another common format. It is resized to cover the model's size, "
                                                "and its middle is kept.")


class Live(Settings):
    """The head of a live page's message; the pixels follow it."""

    id: int = Field(ge=0, le=2**53)
    compare: bool = False


class Map(BaseModel):
    """A control map."""

    control: str
    image: str = Field(description="A PNG in base64.")


class Answer(BaseModel):
    """The pictures of a request."""

    images: list[str] = Field(description="PNGs in base64.")
    maps: list[Map] = Field(description="The control maps that were drawn to, the model's own first.")
    milliseconds: float = Field(description="Time that the model computed.")
    steps: int = Field(description="Sampling steps.")
    notes: list[str] = Field(description="Sentences about the request, such as that the drawing is empty.")


class Problem(BaseModel):
    """Why there are no pictures."""

    error: str = Field(description="One sentence: what, the bound, the remedy.")


class Control(BaseModel):
    """A control of a model."""

    model: str = Field(description="The key of its strength.")
    label: str
    spec: str | None = Field(description="Its name for `jdm sample --control`, where the model does not say it.")
    hand: bool = Field(description="People draw its map itself, on black; the page starts so.")


class Compare(BaseModel):
    """The slow model beside a student."""

    name: str
    steps: int


class Model(BaseModel):
    """A model that can be drawn with."""

    name: str
    width: int
    height: int
    steps: int
    controls: list[Control] = Field(description="The model's own first; none for one that takes no drawing.")
    compare: Compare | None
    page: dict[str, Any] = Field(description="What its card says of the page: paper, ink, styles, prompts.")


class Bounds(BaseModel):
    """Bounds of a request, as the page reads them."""

    prompt: int = Field(description="Characters of a prompt.")
    pictures: int
    bytes: int
    pixels: int


class Models(BaseModel):
    """The models, the first one shown at the start, and the bounds of a request."""

    models: list[Model]
    limits: Bounds
    device: str = Field(description="Where they compute, as `jdm sample --device` takes it.")


def packed(head: dict[str, Any], body: bytes = b"") -> bytes:
    """A binary message: the length of the head in 4 bytes, little-endian; the head in JSON; the body."""
    text = json.dumps(head).encode()
    return struct.pack("<I", len(text)) + text + body


def unpacked(message: bytes) -> tuple[Live, bytes]:
    """(head, body) of `packed`'s message.

    Raises:
        UsageError: it is not one, or a value of the head is out of its range.
    """
    length = struct.unpack("<I", message[:4])[0] if len(message) >= 4 else 0
    head = message[4 : 4 + length]
    if not head or len(head) < length:
        raise UsageError("a message must be the length of its head in 4 bytes, the head in JSON, then pixels")
    try:
        return Live.model_validate_json(head), message[4 + length :]
    except ValidationError as error:
        raise UsageError(complaint(error.errors())) from None


def complaint(errors: Any) -> str:
    """Pydantic's first complaint in one line, without the value, which may be long."""
    first = errors[0]
    place = ".".join(str(part)[:40] for part in first["loc"] if part != "body") or "the request"
    return f"{place}: {str(first['msg'])[:1].lower()}{str(first['msg'])[1:200]}"
