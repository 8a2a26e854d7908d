"""One request on its way: to a worker, to another one where that fails, and back to the client."""

from collections.abc import Callable
from typing import Any, Protocol

import orjson

from llm_router import continuation
from llm_router.continuation import Splice, Transcript
from llm_router.http import (
    LAST_CHUNK,
    ChunkedBody,
    Reply,
    RequestHead,
    ResponseHead,
    chunk,
    error,
)
from llm_router.worker import Upstream, Worker

RETRIED = {429, 500, 502, 503, 504}  # another worker may do better
FAULTS = {500, 502, 504}  # of the worker; 429 and 503 say that it is busy, or leaves


class Owner(Protocol):
    """The router, as a request and its client see it."""

    retries: int
    lost: int
    now: Callable[[], float]
    stopping: bool

    @property
    def policy(self) -> Any: ...
    @property
    def settings(self) -> Any: ...
    @property
    def clients(self) -> set[Any]: ...
    @property
    def loop(self) -> Any: ...
    def new_id(self) -> bytes: ...
    def handle(self, exchange: Any) -> None: ...
    def dispatch(self, exchange: Any) -> None: ...
    def connect(self, exchange: Any, worker: Worker) -> None: ...
    def answered(self, exchange: Any, worker: Worker) -> None: ...
    def fault(self, worker: Worker, why: str) -> None: ...
    def cut(self, exchange: Any, worker: Worker) -> None: ...
    def over(self, exchange: Any, status: int) -> None: ...


class Asking(Protocol):
    """The client's connection."""

    transport: Any
    keeps_alive: bool

    def write(self, data: bytes) -> None: ...
    def reply(self, reply: Reply, request_id: bytes, head_only: bool = False) -> None: ...
    def done(self, exchange: Any) -> None: ...


class Exchange:
    """A client's request and all that happens to it.

    Until the first byte of the answer has gone to the client, a failure is repaired by asking
    another worker; after it, by continuing the stream there (see `continuation`).
    """

    __slots__ = (
        "_parsed", "_transcript", "began", "body", "client", "head", "keys", "last_reply", "missed",
        "over", "queued", "request_id", "router", "splice", "started", "streams", "tried",
        "upstream", "worker",
    )  # fmt: skip

    def __init__(self, router: "Owner", client: "Asking", head: RequestHead, body: bytes) -> None:
        self.router, self.client, self.head, self.body = router, client, head, body
        self.request_id = head.fields.request_id or router.new_id()
        self.started = self.began = 0.0  # began: when this worker was asked
        self.worker: Worker | None = None
        self.upstream: Upstream | None = None
        self.tried: list[Worker] = []
        self.streams = False  # the client has the head of a stream
        self.over = self.queued = False
        self.splice: Splice | None = None
        self.last_reply: tuple[ResponseHead, bytes] | None = None
        self.keys: Any = None  # what a policy found out about the prompt
        self.missed = 0  # tokens, as it believes
        self._parsed: Any = None
        self._transcript: Transcript | None = None

    @property
    def parsed(self) -> dict[str, Any]:
        """The body, where it is a JSON object, else an empty one; parsed when first asked for."""
        if self._parsed is None:
            try:
                self._parsed = orjson.loads(self.body)
            except orjson.JSONDecodeError:
                self._parsed = {}
            if not isinstance(self._parsed, dict):
                self._parsed = {}
        return self._parsed  # type: ignore[no-any-return]

    @property
    def path(self) -> str:
        return self.head.path.decode("ascii")

    @property
    def ended(self) -> bool:
        """Whether the client's stream has had its [DONE]."""
        return self._transcript is not None and self._transcript.done

    # ---- to a worker

    def send(self, worker: Worker) -> None:
        """Ask `worker`; its load counts this request until `_leave`."""
        self.worker = worker
        self.began = self.router.now()
        worker.load += 1
        worker.requests += 1
        while worker.idle:
            connection = worker.idle.pop()
            if not connection.transport.is_closing():
                self._use(connection)
                return
        self.router.connect(self, worker)

    def connected(self, connection: Upstream) -> None:
        """A new connection for this request; it may have gone elsewhere, or away, meanwhile."""
        if self.over or self.worker is not connection.worker or self.upstream is not None:
            connection.worker.idle.append(connection)
        else:
            self._use(connection)

    def _use(self, connection: Upstream) -> None:
        self.upstream = connection
        body = self.body if self.splice is None else self.splice.body
        connection.start(
            self,
            b"%b\r\nx-request-id: %b\r\ncontent-length: %d\r\n\r\n%b"
            % (self.head.forward, self.request_id, len(body), body)
        )  # fmt: skip

    def _leave(self) -> None:
        """The worker has nothing to do for this request any more."""
        worker, self.worker = self.worker, None
        if worker is not None:
            worker.load -= 1
            self.router.policy.left(self, worker)
        upstream, self.upstream = self.upstream, None
        if upstream is not None:
            upstream.close()

    def move(self, why: str) -> None:
        """Away from a worker that hangs."""
        self.failed(why, fault=False)

    def failed(self, why: str, fault: bool = True) -> None:
        """The worker did not answer, or not to the end: let another one."""
        worker = self.worker
        if worker is None or self.over:
            return
        self._leave()
        self.tried.append(worker)
        if fault:
            self.router.fault(worker, why)
        if not self.streams:
            self.router.retries += 1
            self.router.dispatch(self)
            return
        self.router.cut(self, worker)
        self._continue()

    def _continue(self) -> None:
        """A stream broke off: another worker goes on from what the client has."""
        assert self._transcript is not None
        if self._transcript.done:
            self.stream_ends()
            return
        self.splice = continuation.plan(self.path, self.parsed, self._transcript, self.splice)
        if self.splice is None:
            self._give_up("the worker broke off, and this stream cannot be continued")
        elif self.splice.finished:
            self._write_events(self.splice.closing())
            self.stream_ends()
        else:
            self.router.dispatch(self)

    # ---- back to the client

    def whole(self, head: ResponseHead, body: bytes) -> None:
        """A complete answer; an error of the worker's may be better elsewhere."""
        worker = self.worker
        assert worker is not None
        if head.status in RETRIED or self.streams:
            self._refused(head, body, worker)
            return
        self.router.answered(self, worker)
        self._finish(head, body)

    def _refused(self, head: ResponseHead, body: bytes, worker: Worker) -> None:
        if head.status in FAULTS:
            self.router.fault(worker, f"status {head.status}")
        elif head.status < 500:
            self.router.answered(self, worker)
        self._leave()
        self.tried.append(worker)
        if not self.streams:
            self.last_reply = (head, body)
            self.router.retries += 1
            self.router.dispatch(self)
            return
        assert self.splice is not None  # what was refused is a continuation
        if head.status not in RETRIED:
            self.splice.refused = True
            self.tried.remove(worker)
        self._continue()

    def _finish(self, head: ResponseHead, body: bytes) -> None:
        self._leave()
        length = b"content-length: %d\r\n" % len(body) if head.has_body else b""
        self.client.write(
            b"%b\r\nx-request-id: %b\r\n%b%b\r\n%b"
            % (head.forward, self.request_id, length, self._closing(), body)
        )
        self._over(head.status)

    def _closing(self) -> bytes:
        return b"" if self.client.keeps_alive else b"connection: close\r\n"

    def stream_begins(self, head: ResponseHead) -> bool:
        """The head of a stream: the client gets it now, unless it has one."""
        if not self.streams:
            self.streams = True
            self._transcript = Transcript()
            coding = b"transfer-encoding: chunked\r\n" if self.head.http11 else b""
            self.client.write(
                b"%b\r\nx-request-id: %b\r\n%b%b\r\n"
                % (head.forward, self.request_id, coding, self._closing())
            )
        return not self.over

    def pass_on(self, data: bytes) -> None:
        """Whole chunks of whole events, as they came."""
        transcript = self._transcript
        assert transcript is not None
        if not transcript.started:
            self._first_event()
        transcript.append(data)
        if self.head.http11:
            self.client.transport.write(data)
        else:
            self.client.write(ChunkedBody().feed(data))

    def events(self, events: bytes) -> None:
        """Whole events, to be spliced in or put into a chunk."""
        if self.splice is not None:
            events = self.splice.feed(events)
            if self.splice.diverged:
                self._give_up("another worker's answer is not the same")
                return
        if events:
            self._write_events(events)

    def _write_events(self, events: bytes) -> None:
        self.pass_on(chunk(events))

    def _first_event(self) -> None:
        assert self._transcript is not None
        self._transcript.started = True
        if self.worker is not None:
            self.router.answered(self, self.worker)

    def stream_ends(self) -> None:
        """The worker said its last; so do we, if the client has had all of it."""
        if self.over:
            return
        if self.splice is not None and not self.ended:
            self._write_events(b"data: [DONE]\n\n")
        self._leave()
        if self.head.http11:
            self.client.write(LAST_CHUNK)
        self._over(200)

    def _give_up(self, why: str) -> None:
        """The stream ends with an error that a client can see: its status went long ago."""
        self._leave()
        self.router.lost += 1
        self._write_events(b"data: " + error(502, why).body + b"\n\ndata: [DONE]\n\n")
        if self.head.http11:
            self.client.write(LAST_CHUNK)
        self._over(502)

    def refuse(self, status: int, message: str, retry_after: int | None = None) -> None:
        """No worker for it. What a worker said earlier is better than what we can say."""
        if self.over:
            return
        if self.streams:
            self._give_up(message)
        elif self.last_reply is not None:
            self._finish(*self.last_reply)
        else:
            self._leave()
            reply = error(status, message, retry_after)
            self.client.reply(reply, self.request_id)
            self._over(status)

    def expire(self) -> None:
        self.refuse(504, "the workers did not answer in time")

    def abandon(self) -> None:
        """The client has gone: so does the work."""
        if not self.over:
            self._leave()
            self.over = True
            self.router.over(self, 499)

    def _over(self, status: int) -> None:
        self.over = True
        self.router.over(self, status)
        self.client.done(self)
