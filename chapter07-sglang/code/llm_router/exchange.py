"""One request on its way: to a worker, to another one where that fails, and back to the client."""

from collections.abc import Callable
from typing import Any, Protocol

import orjson

from llm_router import continuation
from llm_router.continuation import FOREIGN, Splice, Transcript
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
MOST_DEATHS = 2


class Owner(Protocol):
    """The router, as a request and its client see it."""

    retries: int
    cuts: int
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
    def others(self, exchange: Any) -> list[Worker]: ...
    def over(self, exchange: Any, status: int) -> None: ...


class Asking(Protocol):
    """The client's connection."""

    transport: Any
    keeps_alive: bool
    paused: bool

    @property
    def connection(self) -> bytes: ...
    def write(self, data: bytes) -> None: ...
    def reply(self, reply: Reply, request_id: bytes, head_only: bool = False) -> None: ...
    def done(self, exchange: Any) -> None: ...


class Exchange:
    """A client's request and all that happens to it.

    Until the first byte of the answer has gone to the client, a failure is repaired by asking
    another worker; after it, by continuing the stream there (see `continuation`).
    """

    __slots__ = (
        "_again", "_deaths", "_erred", "_had", "_parsed", "_transcript", "began", "body", "client",
        "head", "keys", "last_reply", "missed", "moved", "over", "queued", "request_id", "router",
        "splice", "started", "streams", "tried", "upstream", "worker",
    )  # fmt: skip

    def __init__(self, router: "Owner", client: "Asking", head: RequestHead, body: bytes) -> None:
        self.router, self.client, self.head, self.body = router, client, head, body
        self.request_id = head.fields.request_id or router.new_id()
        self.started = self.began = 0.0  # began: when this worker was asked
        self.worker: Worker | None = None
        self.upstream: Upstream | None = None
        self.tried: list[Worker] = []
        self.moved: list[Worker] = []  # away from these, which may have been busy only
        self._deaths = self._had = 0  # connections lost, and what the client had at the last
        self._again = self._erred = False
        self.streams = False  # the client has the head of a stream
        self.over = self.queued = False
        self.splice: Splice | None = None
        self.last_reply: tuple[ResponseHead, bytes] | None = None
        self.keys: Any = None  # what a policy found out about the prompt
        self.missed = 0  # tokens of it that the worker has not, as a policy believes
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
            self._again = False
            self._use(connection)

    def again(self) -> None:
        """A kept connection was closed before one byte came: no fault, if a new one is taken."""
        self.upstream = None
        self._again = True
        if self.worker is not None:
            self.router.connect(self, self.worker)

    def _use(self, connection: Upstream) -> None:
        self.upstream = connection
        if self.client.paused:
            connection.transport.pause_reading()
        body = self.body if self.splice is None else self.splice.body
        connection.start(
            self,
            b"%b\r\naccept-encoding: identity\r\nx-request-id: %b\r\n"
            b"content-length: %d\r\n\r\n%b"
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
        """Away from a worker that hangs, or is busy: no try, and not where all others have been."""
        if self.worker is None or self.over or not self.router.others(self):
            return
        self.moved.append(self.worker)
        self._again = False
        self._leave()
        self._elsewhere()

    def failed(self, why: str, died: bool = False) -> None:
        """The worker did not answer, or not to the end: let another one."""
        worker = self.worker
        if worker is None or self.over:
            return
        self._leave()
        self.tried.append(worker)
        self.router.fault(worker, why)
        if died or self._again:
            self._again = False
            self._died()
        if not self.over:
            self._elsewhere()

    def _died(self) -> None:
        """A request that kills its worker must not kill all: two is the end, if it got no farther
        between them."""
        had = 0
        if self._transcript is not None:
            self._transcript.fold()
            had = self._transcript.tokens
        self._deaths = 1 if had > self._had else self._deaths + 1
        self._had = had
        if self._deaths >= MOST_DEATHS:
            self.refuse(502, f"{self._deaths} workers broke off at this request")

    def _elsewhere(self) -> None:
        if not self.streams:
            self.router.retries += 1
            self.router.dispatch(self)
            return
        self.router.cuts += 1
        self._continue()

    def _continue(self) -> None:
        """A stream broke off: another worker goes on from what the client has."""
        assert self._transcript is not None
        if self._transcript.done:
            self.stream_ends()
            return
        try:
            self.splice = continuation.plan(self.path, self.parsed, self._transcript, self.splice)
        except FOREIGN:
            self.splice = None
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
            if not self._erred:  # where all answer so, it is more likely the request's fault
                self.router.fault(worker, f"status {head.status}")
            self._erred = True
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
            % (head.forward, self.request_id, length, self.client.connection, body)
        )
        self._over(head.status)

    def stream_begins(self, head: ResponseHead) -> bool:
        """The head of a stream: the client gets it now, unless it has one."""
        if not self.streams:
            self.streams = True
            self._transcript = Transcript()
            coding = b"transfer-encoding: chunked\r\n"
            if not self.head.http11:  # the stream's end is the connection's
                coding, self.client.keeps_alive = b"", False
            self.client.write(
                b"%b\r\nx-request-id: %b\r\n%b%b\r\n"
                % (head.forward, self.request_id, coding, self.client.connection)
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
            try:
                events = self.splice.feed(events)
            except FOREIGN:
                self.splice.diverged = True
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
