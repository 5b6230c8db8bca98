"""Checks before every request: who may ask, from which page, and how much may be sent."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

from jdm.app.limits import BusyError, Limits
from jdm.errors import UsageError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

AT_ONCE = 128  # requests that are read or answered at the same time; further ones are told to come back
# The page loads nothing from elsewhere and stands in no other page's frame. Swagger's page has a script in its HTML.
POLICY = ("default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; object-src 'none'; base-uri 'none'; "
          "form-action 'none'; frame-ancestors 'none'; script-src 'self'{more}; style-src 'self'{more}")
HEADERS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer",
           "cross-origin-resource-policy": "same-origin", "permissions-policy": "camera=(self), microphone=()"}


class Guard:
    """ASGI middleware: refuses a foreign Host or Origin, a wrong token and a body that is too large.

    Without the Host check a page elsewhere could give its own name this machine's address (DNS rebinding) and then
    read and drive the server; without the Origin check it could drive it blindly.

    Args:
        host: the address the server listens on. On this machine's own, Host must be a name of this machine.
        token: token that requests to /api must carry; None for none.
    """

    def __init__(self, app: Any, host: str, token: str | None, limits: Limits):
        self.app, self.token, self.limits = app, token, limits
        self.local = is_local(host)
        self._now = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if scope["type"] == "websocket":
            if refusal is None:
                return await self.app(scope, receive, send)
            return await send({"type": "websocket.close", "code": 1008, "reason": refusal[1][:120]})
        if self._now >= AT_ONCE:
            busy = BusyError("many requests are being read or answered already", 1)
            return await answer(send, 503, str(busy), busy.seconds)
        self._now += 1
        try:
            if refusal:
                return await answer(send, *refusal)
            await self.app(scope, await self._whole(receive), _with_headers(scope, send))
        except _RefusedError as refused:
            await answer(send, *refused.args)
        finally:
            self._now -= 1
        return None

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        """(status, sentence) where the request may not be answered."""
        host = headers.get("host", "")
        if self.local and not is_local(urlsplit(f"//{host}").hostname or "" if _is_netloc(host) else ""):
            return 403, (f"this server answers to localhost alone, not to {host[:60]!r}; start it with --host to serve "
                         "other names")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return 403, f"pages of {origin[:60]!r} may not drive this server; open its own page"
        if self.token and scope["path"].startswith("/api/") and not self._has_token(scope, headers):
            return 401, "the token is missing or wrong; open the address that jdm app printed, or send it as a Bearer"
        return None

    def _has_token(self, scope: Scope, headers: dict[str, str]) -> bool:
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        query = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [""])[0]
        given = bearer.strip() if scheme.lower() == "bearer" else query
        return hmac.compare_digest(given.encode(), (self.token or "").encode())

    async def _whole(self, receive: Receive) -> Receive:
        """The request with its whole body, read before anything of it is parsed."""
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.seconds):
                while True:
                    message = await receive()
                    body += message.get("body", b"")
                    if len(body) > self.limits.bytes:
                        raise _RefusedError(413, f"a request may have {self.limits.bytes:,} bytes; send a smaller "
                                                 "picture")
                    if message["type"] != "http.request" or not message.get("more_body"):
                        break
        except TimeoutError:
            raise _RefusedError(408, f"the request did not arrive within {self.limits.seconds} seconds") from None
        parts = iter([{**message, "body": bytes(body)}])

        async def again() -> MutableMapping[str, Any]:
            return next(parts, None) or await receive()

        return again


class _RefusedError(Exception):
    """(status, sentence)."""


def is_local(host: str) -> bool:
    """Whether a name or address is this machine's own, as seen from itself."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _is_netloc(host: str) -> bool:
    try:
        return urlsplit(f"//{host}").netloc == host and bool(urlsplit(f"//{host}").port or True)
    except ValueError:  # a port or a bracket that makes no sense
        return False


def _with_headers(scope: Scope, send: Send) -> Send:
    """`send` with the headers that bound what the page may do."""
    policy = POLICY.format(more=" 'unsafe-inline'" if scope["path"] == "/docs" else "")
    more = [(key.encode(), value.encode()) for key, value in {**HEADERS, "content-security-policy": policy}.items()]

    async def sent(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *more]}
        await send(message)

    return sent


def status_of(error: UsageError) -> int:
    """The HTTP status of an error: 503 where a later try may succeed."""
    return 503 if isinstance(error, BusyError) else 422


async def answer(send: Send, status: int, sentence: str, retry_after: int = 0) -> None:
    """Sends {"error": sentence}, and when to try again where that is above 0."""
    body = json.dumps({"error": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"retry-after", str(retry_after).encode())] if retry_after else []
    headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
