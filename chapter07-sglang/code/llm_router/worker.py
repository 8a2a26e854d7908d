"""A worker as the router sees it: its connections, its load, and whether it may be used."""

import asyncio
import errno
from collections.abc import Callable
from typing import Any, Protocol
from urllib.parse import urlsplit

from distlab.errors import UsageError
from llm_router.continuation import is_whole
from llm_router.http import (
    HEAD_END,
    MOST_HEAD,
    ChunkedBody,
    HttpError,
    RequestHead,
    ResponseHead,
    ends_with_a_chunk,
)

CONNECT_S = 2.0
MOST_IDLE = 256  # connections kept to a worker
LACKS = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS)
MOST_WHOLE = 64 * 2**20  # bytes of an answer that is not streamed


class Asker(Protocol):
    """Whose request a connection has: an `Exchange`, which is told what comes."""

    upstream: Any
    streams: bool
    head: RequestHead

    @property
    def client(self) -> Any: ...

    @property
    def splice(self) -> object: ...
    @property
    def ended(self) -> bool: ...
    def stream_begins(self, head: ResponseHead) -> bool: ...
    def pass_on(self, data: bytes) -> None: ...
    def events(self, events: bytes) -> None: ...
    def stream_ends(self) -> None: ...
    def whole(self, head: ResponseHead, body: bytes) -> None: ...
    def again(self) -> None: ...
    def failed(self, why: str, died: bool = False) -> None: ...


class Worker:
    """`load` counts the requests that it has now; `reads` all that was ever heard from it."""

    def __init__(self, url: str, kv_events: str | None = None) -> None:
        self.url = url.rstrip("/")
        parts = urlsplit(self.url)
        try:
            port = parts.port
        except ValueError:
            port = None
        more = parts.path or parts.query or parts.fragment or "@" in parts.netloc
        if parts.scheme != "http" or not parts.hostname or not port or more:
            raise UsageError(f"worker {url!r} is no address; use one like http://127.0.0.1:8000")
        self.host, self.port, self.netloc = parts.hostname, port, parts.netloc
        self.kv_events = kv_events
        self.models: tuple[str, ...] = ()
        self.load = self.reads = self.requests = self.failures = 0
        self.faults = 0  # one after the other
        self.healthy = False  # until a probe has been answered
        self.hung = self.draining = False
        self.open_until = 0.0  # the breaker keeps requests away until then
        self.idle: list[Upstream] = []
        self.busy: set[Upstream] = set()

    @property
    def usable(self) -> bool:
        return self.healthy and not self.hung and not self.draining and not self.open_until

    @property
    def state(self) -> str:
        if self.draining:
            return "draining"
        if not self.healthy:
            return "down"
        if self.hung:
            return "hung"
        return "open" if self.open_until else "up"

    def close(self) -> None:
        for connection in [*self.idle]:
            connection.close()

    def __repr__(self) -> str:
        return f"Worker({self.url}, {self.state}, load {self.load})"


class Upstream(asyncio.Protocol):
    """A connection to a worker, for one exchange at a time.

    Whole answers are kept until they are complete, so that one which breaks off can be asked for
    again elsewhere. Streams go on event by event: a client never holds half of one.
    """

    __slots__ = (
        "_body", "_buffer", "_events", "_head", "_pieces", "_reused", "_size", "exchange",
        "transport", "worker",
    )  # fmt: skip

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.exchange: Asker | None = None
        self.transport: Any = None
        self._reused = False
        self._reset()

    def _reset(self) -> None:
        self._buffer = b""
        self._head: ResponseHead | None = None
        self._body: ChunkedBody | None = None
        self._events = b""  # half of one
        self._pieces: list[bytes] = []  # of a whole answer
        self._size = 0  # of its body

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def start(self, exchange: Asker, wire: bytes) -> None:
        self.exchange = exchange
        self.worker.busy.add(self)
        self.transport.write(wire)

    def close(self) -> None:
        """Leave: the worker sees that nobody waits any more."""
        self.exchange = None
        self.worker.busy.discard(self)
        if self in self.worker.idle:
            self.worker.idle.remove(self)
        if self.transport is not None:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        self.worker.reads += 1
        exchange = self.exchange
        if exchange is None:  # nobody asked
            self.close()
            return
        try:
            head = self._head
            if head is None:
                self._head_received(exchange, data)
            elif not exchange.streams:
                self._whole_received(exchange, head, data)
            elif (
                data[-4:] == b"\n\n\r\n"  # the end of an event and of its chunk
                and not self._events
                and exchange.splice is None
                and head.fields.chunked
                and not self._body.rest  # type: ignore[union-attr]
                and ends_with_a_chunk(data)
            ):
                exchange.pass_on(data)
            else:
                self._stream_received(exchange, data)
        except HttpError as error:
            self._broken(exchange, f"nonsense: {error}")

    def _head_received(self, exchange: Asker, data: bytes) -> None:
        data = self._buffer + data if self._buffer else data
        end = data.find(HEAD_END)
        if end < 0:
            if len(data) > MOST_HEAD or not b"HTTP/1.".startswith(data[:7]):
                raise HttpError(502, "no head of an answer")
            self._buffer = data
            return
        head = ResponseHead(data[: end + 4])
        if head.status < 200:  # 100 Continue
            self._buffer = b""
            if rest := data[end + 4 :]:
                self._head_received(exchange, rest)
            return
        self._head = head
        self._buffer = b""
        data = data[end + 4 :]
        if head.fields.chunked:
            self._body = ChunkedBody()
        if head.status == 200 and head.fields.content_type.startswith(b"text/event-stream"):
            if exchange.stream_begins(head) and data:
                self._stream_received(exchange, data)
        else:
            self._whole_received(exchange, head, data)

    def _whole_received(self, exchange: Asker, head: ResponseHead, data: bytes) -> None:
        length, rest = head.fields.length, b""
        if self._body is not None:
            data = self._body.feed(data)
            complete, rest = self._body.done, self._body.rest
        elif length is not None:
            missing = length - self._size
            complete = len(data) >= missing
            if len(data) > missing:
                data, rest = data[:missing], data[missing:]
        else:
            complete = False  # it ends with the connection
        if not head.has_body or exchange.head.method == b"HEAD":
            complete, rest, data = True, b"", b""
        self._pieces.append(data)
        self._size += len(data)
        if self._size > MOST_WHOLE:
            raise HttpError(502, "an answer too long")
        if complete:
            body = b"".join(self._pieces)
            self._done(exchange, rest)
            exchange.whole(head, body)

    def _stream_received(self, exchange: Asker, data: bytes) -> None:
        if self._body is not None:
            payload = self._body.feed(data)
            complete, rest = self._body.done, self._body.rest
        elif (length := self._head.fields.length) is not None:  # type: ignore[union-attr]
            missing = length - self._size
            payload, rest = data[:missing], data[missing:]
            self._size += len(payload)
            complete = self._size == length
        else:
            payload, rest, complete = data, b"", False
        events = (self._events + payload).replace(b"\r\n", b"\n")
        end = events.rfind(b"\n\n") + 2
        if end < 2:
            end = 0
        self._events = events[end:]
        if end:
            exchange.events(events[:end])
        if complete and self.exchange is exchange:
            if not self._all_came(exchange):
                raise HttpError(502, "the stream ended in half an event")
            self._done(exchange, rest)
            exchange.stream_ends()

    def _all_came(self, exchange: Asker) -> bool:
        """At the end of a stream. The empty line after its last event may be missing."""
        half, self._events = self._events, b""
        if half and is_whole(half):
            exchange.events(half.rstrip() + b"\n\n")
        return not half.strip() or is_whole(half) or exchange.ended

    def _done(self, exchange: Asker, rest: bytes = b"") -> None:
        """The exchange is over; the connection waits for the next one, if it may."""
        head, self.exchange = self._head, None
        self.worker.busy.discard(self)
        exchange.upstream = None
        reusable = head is not None and not head.fields.close and not rest
        self._reset()
        self._reused = True
        if exchange.client.paused:  # that was for this client only
            self.transport.resume_reading()
        if reusable and not self.transport.is_closing() and len(self.worker.idle) < MOST_IDLE:
            self.worker.idle.append(self)
        else:
            self.transport.abort()

    def _broken(self, exchange: Asker, why: str) -> None:
        self.close()
        exchange.upstream = None
        exchange.failed(why)

    def connection_lost(self, error: Exception | None) -> None:
        exchange, head = self.exchange, self._head
        self.close()
        if exchange is None:
            return
        exchange.upstream = None
        if head is not None and head.fields.length is None and not head.fields.chunked:
            if exchange.streams and self._all_came(exchange) and exchange.ended:
                exchange.stream_ends()
                return
            if not exchange.streams and error is None:
                exchange.whole(head, b"".join(self._pieces))
                return
        if self._reused and head is None and not self._buffer:  # it was closing already
            exchange.again()
        else:
            exchange.failed("the connection broke off" if head else "no answer came", died=True)

    def pause_writing(self) -> None:
        """A body that the worker takes slowly is in memory already: nothing to hold back."""


def lacks(error: Exception) -> bool:
    """Whether it is this process, and not the worker, that has nothing left to connect with."""
    return isinstance(error, OSError) and error.errno in LACKS


async def connect(worker: Worker, made: Callable[[Upstream], None]) -> None:
    """Hand a new connection to `made`. Raises OSError or TimeoutError."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(CONNECT_S):
        _, upstream = await loop.create_connection(
            lambda: Upstream(worker), worker.host, worker.port
        )
    made(upstream)
