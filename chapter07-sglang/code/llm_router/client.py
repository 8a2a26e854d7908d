"""A client's connection: requests come in, one at a time goes on, the answer's bytes go out."""

import asyncio
from typing import Any

from llm_router.exchange import Exchange, Owner
from llm_router.http import (
    HEAD_END,
    MOST_HEAD,
    ChunkedBody,
    HttpError,
    Reply,
    RequestHead,
    error,
)

READ_AHEAD = 2**20  # bytes of following requests that are taken before the answer is out


class Client(asyncio.Protocol):
    """Pipelined requests wait in the buffer until the one before is answered."""

    __slots__ = (
        "_body", "_buffer", "_chunks", "_deferred", "_head", "_size", "exchange", "http11",
        "keeps_alive", "paused", "router", "since", "transport",
    )  # fmt: skip

    def __init__(self, router: Owner) -> None:
        self.router = router
        self.transport: Any = None
        self.exchange: Exchange | None = None
        self.keeps_alive = self.http11 = True
        self.paused = False  # it reads slower than the worker writes
        self.since = 0.0  # the last answer's end, or when its head began, or more of a body came
        self._buffer = b""
        self._deferred = False  # what is in the buffer has its turn soon
        self._head: RequestHead | None = None  # of a request whose body is still to come
        self._chunks: ChunkedBody | None = None
        self._body: list[bytes] = []
        self._size = 0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.since = self.router.now()
        self.router.clients.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.router.clients.discard(self)
        if self.exchange is not None:
            self.exchange.abandon()

    def data_received(self, data: bytes) -> None:
        if self.exchange is not None or self._deferred:
            self._buffer += data
            if len(self._buffer) > READ_AHEAD:
                self.transport.pause_reading()
            return
        self._take(data)

    def _take(self, data: bytes) -> None:
        try:
            if self._head is None:
                self._head_received(data)
            else:
                self._body_received(self._head, data)
        except HttpError as problem:
            self.keeps_alive = False
            self._buffer = b""
            self.reply(error(problem.status, str(problem)), b"")
            self.transport.close()

    def _head_received(self, data: bytes) -> None:
        if self._buffer:
            data = self._buffer + data
        if data[:1] in (b"\r", b"\n"):  # empty lines before a request are left out
            data = data.lstrip(b"\r\n")
        end = data.find(HEAD_END)
        if end < 0:
            if data.startswith(b"PRI "):  # a client that asks whether this is HTTP/2
                self.transport.abort()
            elif len(data) > MOST_HEAD:
                raise HttpError(431, f"the head of a request is longer than {MOST_HEAD} bytes")
            elif data and not data[:1].isalpha():
                raise HttpError(400, "this is no HTTP/1.1 request")
            if data and not self._buffer:
                self.since = self.router.now()
            self._buffer = data
            return
        if data.startswith(b"PRI "):
            self.transport.abort()
            return
        head = RequestHead(data[: end + 4])
        self._buffer = b""
        self.keeps_alive, self.http11 = head.keeps_alive, head.http11
        fields, most = head.fields, self.router.settings.max_body_bytes
        if (fields.length or 0) > most:
            raise HttpError(413, f"the body is longer than {most} bytes")
        if fields.length is not None and len(data) == end + 4 + fields.length:  # as mostly
            self._complete(head, data[end + 4 :])
            return
        if fields.expect and head.http11:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._head = head
        self._chunks = ChunkedBody() if fields.chunked else None
        self._body, self._size = [], 0
        self._body_received(head, data[end + 4 :])

    def _body_received(self, head: RequestHead, data: bytes) -> None:
        self.since = self.router.now()
        if self._chunks is not None:
            data = self._chunks.feed(data)
            complete, rest = self._chunks.done, self._chunks.rest
            if self._size + len(data) + self._chunks.held > self.router.settings.max_body_bytes:
                raise HttpError(413, "the body is too long")
        else:
            missing = (head.fields.length or 0) - self._size
            complete = len(data) >= missing
            data, rest = data[:missing], data[missing:]
        self._body.append(data)
        self._size += len(data)
        if complete:
            self._buffer, self._head, self._chunks = rest, None, None
            body, self._body = b"".join(self._body), []
            self._complete(head, body)

    def _complete(self, head: RequestHead, body: bytes) -> None:
        exchange = self.exchange = Exchange(self.router, self, head, body)
        self.router.handle(exchange)

    def expire(self, now: float, limit_s: float, idle_s: float) -> None:
        """Close it if it takes too long to send a request that it has begun, or sends none."""
        sending = self._head is not None or bool(self._buffer)
        if self.exchange is None and now - self.since > (limit_s if sending else idle_s):
            self.keeps_alive = False
            if sending:
                self.reply(error(408, f"nothing more of the request came in {limit_s:g} s"), b"")
            self.transport.close()

    @property
    def connection(self) -> bytes:
        """The field of an answer that says whether another request may follow."""
        if not self.keeps_alive:
            return b"connection: close\r\n"
        return b"" if self.http11 else b"connection: keep-alive\r\n"

    def write(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(data)

    def reply(self, reply: Reply, request_id: bytes, head_only: bool = False) -> None:
        self.write(reply.wire(request_id, self.connection, head_only))

    def done(self, exchange: Exchange) -> None:
        """The answer is out: the next request, if there is one."""
        if self.exchange is not exchange:
            return
        self.exchange = None
        self.since = self.router.now()
        if not self.keeps_alive or self.router.stopping:
            self.transport.close()
            return
        if self._buffer:  # not at once: a client with many requests has turns like others
            self._deferred = True
            self.router.loop.call_soon(self._take_deferred)

    def _take_deferred(self) -> None:
        self._deferred = False
        if not self.transport.is_closing():
            self.transport.resume_reading()
            data, self._buffer = self._buffer, b""
            self._take(data)

    def pause_writing(self) -> None:
        """The client reads slower than the worker writes: let the worker wait."""
        self.paused = True
        if self.exchange is not None and self.exchange.upstream is not None:
            self.exchange.upstream.transport.pause_reading()

    def resume_writing(self) -> None:
        self.paused = False
        if self.exchange is not None and self.exchange.upstream is not None:
            self.exchange.upstream.transport.resume_reading()
