"""Limits of one request to the app, and the errors that report them."""

from __future__ import annotations

from dataclasses import dataclass

from jdm.errors import UsageError


@dataclass(frozen=True)
class Limits:
    """The bounds of the page and its API.

    Attributes:
        bytes: most bytes of a request's body or message.
        pixels: most pixels of a picture, before it is made smaller.
        prompt: characters of a prompt.
        pictures: most pictures of one request.
        waiting: requests that wait for their turn.
        pages: live connections at the same time.
        seconds: longest time of one request, waiting included.
    """

    bytes: int = 8_000_000
    pixels: int = 16_000_000
    prompt: int = 1000
    pictures: int = 16
    waiting: int = 8
    pages: int = 16
    seconds: int = 60


class BusyError(UsageError):
    """There is no room now. `seconds` says when to try again."""

    def __init__(self, message: str, seconds: int):
        super().__init__(f"{message}; try again in {seconds} second{'s' * (seconds != 1)}")
        self.seconds = seconds
