"""What every HTTP request meets before the application sees it.

It gets an id; it needs the API key where there is one; its body is refused when it is too large or
too slow. The application works on it only while its client is there: when the client leaves, or
takes nothing for too long, the work is cancelled and the request's sequences leave the engine.
Afterwards one line is logged, which never holds anything of a prompt.
"""

import asyncio
import hmac
import logging
import re
import time
import uuid
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paged_engine.async_engine import AsyncEngine, Generation
from paged_engine.responses import error_response
from paged_engine.streaming import Tally

LINGER_SECONDS = 5.0  # how long a refused body is read and thrown away
CLIENT_LEFT = 499  # nginx's status for the log; nobody receives it
QUIET_PATHS = ("/health", "/metrics")
REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
log = logging.getLogger("paged_engine.server")


@dataclass(frozen=True)
class Limits:
    """Bytes and seconds; `write_seconds`: how long a client may leave its answer untaken."""

    body_bytes: int = 2**20
    body_seconds: float = 30.0
    write_seconds: float = 60.0


class Refused(Exception):
    """The request ends here."""

    def __init__(
        self, status: int, message: str, code: str, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.response = error_response(status, message, code=code, headers=headers)


class ClientLeft(Exception):
    """Nobody waits for the answer."""


class Call:
    """One HTTP request on its way: `request.state.call` in the routes."""

    def __init__(self, scope: Scope) -> None:
        given = header(scope, b"x-request-id")
        self.id = given.decode() if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self.method: str = scope["method"]
        path = scope.get("raw_path") or scope["path"].encode()
        self.path = path.decode("ascii", "backslashreplace")[:200]
        self.started = time.monotonic()
        self.status = CLIENT_LEFT
        self.answered = False  # to the last byte
        self.generation: Generation | None = None
        self.tally: Tally | None = None

    def close(self) -> None:
        """Forget its sequences, and log it."""
        if self.generation:
            self.generation.close()
        level = logging.DEBUG if self.path in QUIET_PATHS else logging.INFO
        seconds = time.monotonic() - self.started
        status = self.status if self.answered else CLIENT_LEFT
        counts = f" {self.tally}" if self.tally else ""
        line = "%s %s %s %d %.3f s%s"
        log.log(level, line, self.id, self.method, self.path, status, seconds, counts)


class Gate:
    """The ASGI application around the application."""

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        engine: AsyncEngine,
        api_key: str | None = None,
    ) -> None:
        self.app = app
        self.limits = limits
        self.engine = engine
        self.api_key = api_key
        self._entry: ASGIApp = self._guarded

    def allow_origins(self, origins: Sequence[str]) -> None:
        """Let pages of these origins ask: browsers want CORS headers, and ask for them first, which
        they do without the API key."""
        if origins:
            self._entry = CORSMiddleware(
                self._guarded,
                allow_origins=origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._entry(scope, receive, send)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the application's start and end
            return await self.app(scope, receive, send)
        call = Call(scope)
        scope.setdefault("state", {})["call"] = call
        send = _Sender(send, call, self.limits.write_seconds)
        try:
            self._check_headers(scope)
            body = await self._read(receive)
            await _while_connected(self.app, scope, body, receive, send)
        except Refused as refusal:
            await _refuse(refusal, scope, receive, send)
        except ClientLeft:
            pass
        finally:
            call.close()

    def _check_headers(self, scope: Scope) -> None:
        if self.api_key and scope["path"].startswith("/v1"):
            scheme, _, key = header(scope, b"authorization").partition(b" ")
            right = hmac.compare_digest(key.strip(), self.api_key.encode())
            if scheme.lower() != b"bearer" or not right:
                message = "Wrong or missing API key; send it as `Authorization: Bearer KEY`"
                raise Refused(401, message, "invalid_api_key", {"www-authenticate": "Bearer"})
        length = header(scope, b"content-length")
        if length.isdigit() and int(length[:20]) > self.limits.body_bytes:
            raise self._too_large()

    async def _read(self, receive: Receive) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientLeft
                    body += message.get("body", b"")
                    if len(body) > self.limits.body_bytes:
                        raise self._too_large()
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            seconds = self.limits.body_seconds
            late = f"The request's body did not come within {seconds:g} s"
            raise Refused(408, late, "request_timeout") from None

    def _too_large(self) -> Refused:
        message = f"The request's body is larger than {self.limits.body_bytes} bytes"
        return Refused(413, message, "request_too_large")


class _Sender:
    """Sends with a limit, adds the request's id, and notes what became of the answer."""

    def __init__(self, send: Send, call: Call, seconds: float) -> None:
        self.send = send
        self.call = call
        self.seconds = seconds

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.call.status = message["status"]
            named = [*message.get("headers", []), (b"x-request-id", self.call.id.encode())]
            message = {**message, "headers": named}
        try:
            async with asyncio.timeout(self.seconds):
                await self.send(message)
        except TimeoutError:
            raise ClientLeft from None
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.call.answered = True


async def _while_connected(
    app: ASGIApp, scope: Scope, body: bytes, receive: Receive, send: _Sender
) -> None:
    """Run the application until it has answered, or its client has left."""
    left = asyncio.Event()
    to_read = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        if to_read:
            return to_read.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    work = asyncio.ensure_future(app(scope, replay, send))
    watcher = asyncio.ensure_future(watch())
    try:
        await asyncio.wait({work, watcher}, return_when=asyncio.FIRST_COMPLETED)
        left.set()
        if not work.done() and not send.call.answered:
            raise ClientLeft
        await work
    finally:
        work.cancel()
        watcher.cancel()
        await asyncio.gather(work, watcher, return_exceptions=True)


async def _refuse(refusal: Refused, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer at once, then throw away what the client still sends, for a while.

    Closing a connection with unread data resets it, and the client may never see the answer.
    """
    start = {"type": "http.response.start", "status": refusal.response.status_code}
    headers = [*refusal.response.raw_headers, (b"connection", b"close")]
    await send({**start, "headers": headers})
    body = refusal.response.body
    await send({"type": "http.response.body", "body": body, "more_body": True})
    try:
        async with asyncio.timeout(LINGER_SECONDS):
            while (await receive()).get("more_body"):
                pass
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def header(scope: Scope, name: bytes) -> bytes:
    """The first header of that name; empty if there is none."""
    return next((value for key, value in scope["headers"] if key == name), b"")
