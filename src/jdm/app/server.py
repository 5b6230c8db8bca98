"""The server of `jdm app`: the page, the API under /api, and the API's own page under /docs."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from jdm import __version__
from jdm.app.guard import Guard, status_of
from jdm.app.limits import BusyError, Limits
from jdm.app.live import Session
from jdm.app.messages import Answer, Asked, Models, Problem, complaint
from jdm.app.studio import Studio
from jdm.errors import RunError, UsageError, in_short

PAGE = Path(__file__).parent / "page"
PROBLEMS: dict[int | str, dict[str, Any]] = {
    401: {"model": Problem, "description": "The token is missing or wrong."},
    403: {"model": Problem, "description": "The Host or Origin is not this server's."},
    413: {"model": Problem, "description": "The request is too large."},
    422: {"model": Problem, "description": "A setting or the picture makes no sense; the sentence says which."},
    503: {"model": Problem, "description": "Busy; Retry-After says in how many seconds to try again."},
}


def application(studio: Studio, host: str = "127.0.0.1", token: str | None = None) -> FastAPI:
    """The ASGI application over these models.

    Args:
        host: the address that it will be served on; see `Guard`.
        token: token that requests to /api must carry.
    """
    app = FastAPIOffline(redoc_url=None, title="JDM", version=__version__, openapi_url="/api/openapi.json"
                         if token is None else "/openapi.json", description=__doc__)
    app.add_middleware(Guard, host=host, token=token, limits=studio.limits)
    _explain_errors(app)
    pages = 0

    @app.get("/api/models", summary="The models, and the limits of a request")
    async def models() -> Models:
        return studio.described()

    @app.post("/api/draw", summary="Draw pictures for a prompt and a drawing", responses=PROBLEMS)
    async def draw(asked: Asked) -> Answer:
        return await studio.answer(asked, compare=False)

    @app.post("/api/compare", summary="Draw the same with the slow model beside it", responses=PROBLEMS)
    async def compare(asked: Asked) -> Answer:
        return await studio.answer(asked, compare=True)

    @app.websocket("/api/live")
    async def live(page: WebSocket) -> None:
        nonlocal pages
        await page.accept()
        if pages >= studio.limits.pages:
            busy = BusyError(f"{pages} pages are drawing already", 5)
            await page.send_json({"id": None, "error": str(busy), "seconds": busy.seconds})
            return await page.close(1013)
        pages += 1
        try:
            await Session(page, studio).serve()
        finally:
            pages -= 1
        return None

    app.mount("/", StaticFiles(directory=PAGE, html=True), "page")
    return app


def _explain_errors(app: FastAPI) -> None:
    """Every error is {"error": one sentence}."""

    def said(status: int, sentence: str, seconds: int = 0) -> JSONResponse:
        return JSONResponse({"error": sentence}, status, {"retry-after": str(seconds)} if seconds else None)

    @app.exception_handler(UsageError)
    async def usage(_: Request, error: UsageError) -> JSONResponse:
        return said(status_of(error), str(error), error.seconds if isinstance(error, BusyError) else 0)

    @app.exception_handler(RunError)
    async def run(_: Request, error: RunError) -> JSONResponse:
        return said(422, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return said(422, complaint(error.errors()))

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> JSONResponse:
        return said(error.status_code, f"{error.detail}; the API is described at /docs")

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return said(500, f"the request failed ({in_short(error)}); the server's output says where")


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens on this address.

    Raises:
        UsageError: the port is in use, or the address is not this machine's.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(128)
    except (OSError, UnicodeError) as error:
        why, taken = getattr(error, "strerror", None) or in_short(error), getattr(error, "errno", None)
        remedy = ("choose another --port, or --port 0 for any that is free" if taken else
                  "give an address of this machine, such as 127.0.0.1")
        raise UsageError(f"--host {host} --port {port} cannot be listened on ({why}); "
                         f"{remedy}") from None
    return found


def server(app: FastAPI, limits: Limits) -> uvicorn.Server:
    """Returns the server of an application; `server(...).run([listening(...)])` serves on sockets."""
    settings = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, lifespan="off",
                              ws="websockets-sansio", ws_max_size=limits.bytes, ws_per_message_deflate=False,
                              timeout_graceful_shutdown=2)
    return uvicorn.Server(settings)


def address(found: socket.socket, token: str | None) -> str:
    """The page's address, for a browser on this machine."""
    host, port = found.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}/" + (f"?token={token}" if token else "")
