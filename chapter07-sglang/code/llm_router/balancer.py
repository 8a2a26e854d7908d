"""The router: takes requests in, as many at once as it may, and finds a worker for each."""

import asyncio
import contextlib
import time
import uuid
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import orjson

from llm_router import http
from llm_router.client import Client
from llm_router.exchange import Exchange
from llm_router.metrics import Metrics
from llm_router.policies import Policy
from llm_router.worker import Worker, connect, lacks

FORWARDED = {b"/generate", b"/tokenize", b"/detokenize"}  # and all below /v1/
FAULTS_OPEN = 3  # one after the other open a worker's breaker


@dataclass(frozen=True)
class Settings:
    """Limits; times in seconds."""

    max_concurrent: int = 256
    queue_size: int = 256
    queue_timeout: float = 30.0
    request_timeout: float = 600.0
    max_tries: int = 4
    max_body_bytes: int = 32 * 2**20
    probe_interval: float = 0.5
    probe_timeout: float = 1.0
    hang_after: float = 0.5  # silent with requests so long, a worker is asked for one token
    breaker_open: float = 2.0
    head_timeout: float = 30.0  # of a client that sends its request slowly
    idle_timeout: float = 300.0  # of a client that sends none


class Router:
    """One process, one thread: whatever is counted here is exact, and a limit is a limit."""

    def __init__(self, policy: Policy, settings: Settings | None = None) -> None:
        self.policy, self.settings = policy, settings or Settings()
        self.loop = asyncio.get_running_loop()
        self.now = time.monotonic
        self.workers: dict[str, Worker] = {}
        self.usable: list[Worker] = []
        self.same_models = True
        self.clients: set[Client] = set()
        self.running = self.retries = self.cuts = self.lost = 0
        self.queue: deque[Exchange] = deque()
        self.metrics = Metrics()
        self.stopping = False
        self.active: dict[Exchange, None] = {}  # oldest first
        self._tasks: set[asyncio.Task[None]] = set()
        self._name, self._count = uuid.uuid4().hex[:12], 0

    def new_id(self) -> bytes:
        self._count += 1
        return b"%b-%x" % (self._name.encode(), self._count)

    # ---- workers

    def add(self, worker: Worker) -> Worker:
        """It is used when a probe of its health has been answered."""
        known = self.workers.setdefault(worker.url, worker)
        known.draining = False
        self.refresh()
        return known

    async def remove(self, worker: Worker, limit_s: float) -> None:
        """No new requests; gone when the last one is answered, or after `limit_s`."""
        worker.draining = True
        self.refresh()
        deadline = self.now() + limit_s
        while worker.load and self.now() < deadline and worker.draining:
            await asyncio.sleep(0.02)
        if worker.draining:
            self.workers.pop(worker.url, None)
            self.move_away(worker, "the worker was removed")
            worker.close()
            self.policy.removed(worker)

    def refresh(self) -> None:
        """Which workers may be used has changed."""
        self.usable = [worker for worker in self.workers.values() if worker.usable]
        self.same_models = len({worker.models for worker in self.workers.values()}) <= 1

    def fault(self, worker: Worker, why: str) -> None:
        """A failure of the worker's own: no client's mistake, no full queue."""
        worker.failures += 1
        worker.faults += 1
        others = any(other is not worker for other in self.usable)  # better a faulty one than none
        if worker.faults >= FAULTS_OPEN and not worker.open_until and others:
            worker.open_until = self.now() + self.settings.breaker_open
            self.refresh()

    def answered(self, exchange: Exchange, worker: Worker) -> None:
        """It answers: what failed before is forgiven."""
        worker.faults = 0
        if not exchange.splice:
            self.metrics.first_byte.observe(self.now() - exchange.started)
        self.policy.began(exchange, worker)

    def unreachable(self, worker: Worker) -> None:
        """Nobody listens there: wait for a probe to say that it is back."""
        if worker.healthy:
            worker.healthy = False
            self.refresh()

    def move_away(self, worker: Worker, why: str) -> None:
        """All that it has in hand goes to others, where there are any."""
        if any(other is not worker for other in self.usable):
            for exchange in [each for each in self.active if each.worker is worker]:
                exchange.move(why)

    # ---- requests

    def handle(self, exchange: Exchange) -> None:
        path = exchange.head.path
        if not path.startswith(b"/v1/") and path not in FORWARDED or path == b"/v1/models":
            self._own(exchange, path)
            return
        if self.stopping:
            exchange.refuse(503, "the router is stopping", retry_after=1)
            return
        exchange.started = self.now()
        if self.running >= self.settings.max_concurrent:
            if len(self.queue) >= self.settings.queue_size:
                self.metrics.refused += 1
                after = self.retry_after()
                exchange.over = True
                reply = http.error(429, "too many requests wait here; come again later", after)
                exchange.client.reply(reply, exchange.request_id)
                self.metrics.count(429)
                exchange.client.done(exchange)
                return
            exchange.queued = True
            self.queue.append(exchange)
            return
        self._begin(exchange)

    def _begin(self, exchange: Exchange) -> None:
        self.running += 1
        self.active[exchange] = None
        self.dispatch(exchange)

    def retry_after(self) -> int:
        """Seconds until about half of those who wait have been served, at the rate of late."""
        rate = self.metrics.rate(self.now())
        return max(1, min(60, round(len(self.queue) / 2 / rate))) if rate else 1

    def dispatch(self, exchange: Exchange) -> None:
        """Find a worker that has not been tried for it."""
        workers = self.usable if self.same_models else self._with_model(exchange)
        if tried := exchange.tried:
            if len(tried) >= self.settings.max_tries:
                exchange.refuse(502, f"{len(tried)} workers failed to answer this request")
                return
            workers = [worker for worker in workers if worker not in tried]
        if exchange.moved:  # back to one of these only where there is no other
            workers = [worker for worker in workers if worker not in exchange.moved] or workers
        if workers:
            exchange.send(self.policy.choose(exchange, workers))
        elif exchange.tried:
            exchange.refuse(502, "the workers failed to answer this request, and no other is left")
        elif not self.workers:
            exchange.refuse(503, "the router has no workers; add one with POST /workers", 5)
        elif not self.same_models and (why := self._no_model(exchange)):
            exchange.refuse(404, why)
        else:
            exchange.refuse(503, "no worker can be used now", retry_after=1)

    def _with_model(self, exchange: Exchange) -> list[Worker]:
        model = exchange.parsed.get("model")
        if model is None or not any(worker.models for worker in self.workers.values()):
            return self.usable
        return [worker for worker in self.usable if model in worker.models]

    def _no_model(self, exchange: Exchange) -> str:
        """Why no worker will ever have its model; empty where one may have it that is not up."""
        model, workers = exchange.parsed.get("model"), self.workers.values()
        names = sorted({name for worker in workers for name in worker.models})
        unknown = any(not worker.models and not worker.healthy for worker in workers)
        if model is None or not names or model in names or unknown:
            return ""
        return f"no worker has the model {model!r}; there are {names}"

    def others(self, exchange: Exchange) -> list[Worker]:
        """Where it may be moved to."""
        been = (*exchange.tried, *exchange.moved, exchange.worker)
        workers = self.usable if self.same_models else self._with_model(exchange)
        return [worker for worker in workers if worker not in been]

    def connect(self, exchange: Exchange, worker: Worker) -> None:
        task = self.loop.create_task(self._connect(exchange, worker))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, exchange: Exchange, worker: Worker) -> None:
        try:
            await connect(worker, exchange.connected)
        except (OSError, TimeoutError) as error:
            if lacks(error):
                exchange.refuse(503, f"the router cannot connect: {error}", retry_after=1)
                return
            self.unreachable(worker)
            if exchange.worker is worker and exchange.upstream is None:
                exchange.failed(f"no connection: {error}")

    def over(self, exchange: Exchange, status: int) -> None:
        """The exchange has ended, in whatever way: its place goes to who waits longest."""
        if exchange.queued:  # it never had a place
            if exchange in self.queue:
                self.queue.remove(exchange)
                self.metrics.count(status)
            exchange.queued = False
            return
        if self.active.pop(exchange, 0) is None:
            self.running -= 1
            now = self.now()
            self.metrics.done(status, now - exchange.started, now)
            while self.queue and self.running < self.settings.max_concurrent:
                following = self.queue.popleft()
                following.queued = False
                self._begin(following)

    def expire(self) -> None:
        """Called a few times a second: who has waited too long."""
        now = self.now()
        while self.queue and now - self.queue[0].started > self.settings.queue_timeout:
            late = self.queue[0]
            late.refuse(503, "no place became free in time", self.retry_after())
        limit = self.settings.request_timeout
        for exchange in [e for e in self.active if now - e.started > limit]:
            exchange.expire()
        for client in [*self.clients]:
            client.expire(now, self.settings.head_timeout, self.settings.idle_timeout)

    # ---- what the router answers by itself

    def _own(self, exchange: Exchange, path: bytes) -> None:
        reply = self._own_reply(exchange.head.method, path)
        exchange.over = True
        head_only = exchange.head.method == b"HEAD"
        exchange.client.reply(reply, exchange.request_id, head_only)
        exchange.client.done(exchange)

    def _own_reply(self, method: bytes, path: bytes) -> http.Reply:
        if path not in (b"/health", b"/metrics", b"/v1/models"):
            return http.error(404, f"the router has no {path.decode('latin-1')[:100]}")
        if method not in (b"GET", b"HEAD"):
            return http.error(405, "use GET")
        if path == b"/health":
            status = 200 if self.usable and not self.stopping else 503
            body = {"status": "ok" if status == 200 else "no worker can be used"}
            return http.Reply(status, orjson.dumps(body))
        if path == b"/metrics":
            return http.Reply(200, self.metrics.text(self), "text/plain; version=0.0.4")
        return http.Reply(200, orjson.dumps({"object": "list", "data": self.models()}))

    def models(self) -> list[dict[str, object]]:
        names = sorted({name for worker in self.usable for name in worker.models})
        kind = {"object": "model", "created": 0, "owned_by": "llm_router"}
        return [{"id": name, **kind} for name in names]

    # ---- the end

    async def stop(self, grace_s: float, hurry: asyncio.Event | None = None) -> None:
        """Nothing new; what runs may end within `grace_s`, and until `hurry` is set."""
        self.stopping = True
        deadline = self.now() + grace_s
        while (self.running or self.queue) and self.now() < deadline:
            if hurry is not None and hurry.is_set():
                break
            await asyncio.sleep(0.02)
        for exchange in [*self.queue, *self.active]:
            exchange.refuse(503, "the router has stopped", retry_after=1)
        for client in [*self.clients]:
            client.transport.close()
        for worker in self.workers.values():
            worker.close()
        await cancelled(self._tasks)


async def cancelled(tasks: Iterable[asyncio.Task[None]]) -> None:
    for task in (tasks := list(tasks)):
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task
