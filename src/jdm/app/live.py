"""The WebSocket of a page: the newest drawing is answered, and older ones that still wait are dropped."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, MutableMapping
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect

from jdm.app.limits import BusyError
from jdm.app.messages import Live, unpacked
from jdm.app.studio import Studio
from jdm.errors import RunError, UsageError, in_short

log = logging.getLogger("jdm.app")


class Session:
    """One page. Its drawings wait in a slot for one; a comparison runs beside them, one at a time."""

    def __init__(self, socket: WebSocket, studio: Studio):
        self.socket, self.studio = socket, studio
        self.newest: tuple[Live, bytes] | None = None
        self._there = asyncio.Event()
        self._sending = asyncio.Lock()
        self._comparison: asyncio.Task | None = None

    async def serve(self) -> None:
        """Reads and draws until the page closes."""
        drawing = asyncio.create_task(self._draw())
        try:
            while True:
                await self._read(await self.socket.receive())
        except WebSocketDisconnect:
            pass
        finally:
            drawing.cancel()
            if self._comparison:
                self._comparison.cancel()

    async def _read(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005))
        try:
            found = unpacked(message.get("bytes") or b"")
        except UsageError as error:
            return await self._say(None, error)
        if not found[0].compare:
            if stale := self.newest:
                await self._tell({"id": stale[0].id, "stale": True})
            self.newest = found
            self._there.set()
        elif self._comparison and not self._comparison.done():
            await self._say(found[0].id, BusyError("a comparison is being drawn already", 2))
        else:
            self._comparison = asyncio.create_task(self._answer(lambda: found, compare=True))
        return None

    async def _draw(self) -> None:
        while True:
            await self._there.wait()
            self._there.clear()
            if self.newest is not None:  # else it was drawn in place of an older one
                await self._answer(self._take)

    def _take(self) -> tuple[Live, bytes]:
        """The newest drawing; the slot is empty then. Called in the thread that draws."""
        found, self.newest = self.newest, None
        assert found is not None
        return found

    async def _answer(self, newest: Callable[[], tuple[Live, bytes]], compare: bool = False) -> None:
        """Draws what `newest()` gives when its turn comes, and sends what comes of it."""
        taken: tuple[Live, bytes] | None = None

        def take() -> tuple[Live, bytes]:
            nonlocal taken
            taken = newest()
            return taken

        try:
            message = await self.studio.live(take, compare)
        except (UsageError, RunError) as error:
            return await self._say((taken or newest())[0].id, error)
        except Exception as error:
            log.exception("a drawing failed")
            return await self._say((taken or newest())[0].id, RunError(f"the drawing failed ({in_short(error)}); the "
                                                                       "server's output says where"))
        async with self._sending:
            await self.socket.send_bytes(message)
        return None

    async def _say(self, id: int | None, error: Exception) -> None:
        await self._tell({"id": id, "error": str(error), **({"seconds": error.seconds} if isinstance(error, BusyError)
                                                            else {})})

    async def _tell(self, message: dict[str, Any]) -> None:
        async with self._sending:
            await self.socket.send_text(json.dumps(message))
