"""Who may be used: probes of each worker's health and of its data path.

/health of many engines says only that their front end lives: it answers before they can serve, and
while the engine behind it hangs. So a worker is first used when it has answered a request for one
token; and when it is silent though it has requests, it is asked for one token more. A busy engine
answers that, or lets another stream be heard; one that does neither hangs. While it may still
compute long prompts it is not asked: the question would wait behind them.
"""

import asyncio
import contextlib

import orjson

from llm_router.balancer import Router, cancelled
from llm_router.http import ChunkedBody, HttpError
from llm_router.prompts import BYTES_PER_TOKEN
from llm_router.worker import Worker, lacks

TICK_S = 0.1
MOST_MISSED = 2  # probes of /health that may fail before a worker is down
MOST_ANSWER = 2**20
MOST_PREFILL_S = 60.0  # bytes say little of the tokens where a prompt has images
FIRST_TOKEN_S = 30.0  # how long the first answer of a worker that comes back may take


async def ask(
    worker: Worker, method: str, path: str, body: bytes, limit_s: float
) -> tuple[int, bytes]:
    """Status and body of one small request on a connection of its own.

    Raises OSError, TimeoutError, or ValueError where the answer is none.
    """
    async with asyncio.timeout(limit_s):
        reader, writer = await asyncio.open_connection(worker.host, worker.port, limit=MOST_ANSWER)
        try:
            head = (
                f"{method} {path} HTTP/1.1\r\nhost: {worker.netloc}\r\n"
                f"connection: close\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\n\r\n"
            )
            writer.write(head.encode() + body)
            try:
                top = await reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
                raise ValueError("no HTTP answer") from error
            if not top.startswith(b"HTTP/1.") or not top[9:12].isdigit():
                raise ValueError("no HTTP answer")
            lower = top.lower()
            if b"\r\ntransfer-encoding: chunked" in lower:
                chunks, answer = ChunkedBody(), b""
                while not chunks.done:
                    if not (data := await reader.read(MOST_ANSWER)):
                        raise ValueError("half an answer")
                    answer += chunks.feed(data)
            elif (at := lower.find(b"\r\ncontent-length:")) >= 0:
                answer = await reader.readexactly(int(lower[at + 17 :].split(b"\r\n")[0]))
            else:
                answer = await reader.read(MOST_ANSWER)
            return int(top[9:12]), answer
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, HttpError) as error:
            raise ValueError("half an answer") from error
        finally:
            writer.transport.abort()


async def answers(worker: Worker, limit_s: float) -> bool:
    """Whether its data path answers: one token, or a reason why not that is no failure."""
    body = {"prompt": "a", "max_tokens": 1, "temperature": 0}
    if worker.models:
        body["model"] = worker.models[0]
    try:
        status, _ = await ask(worker, "POST", "/v1/completions", orjson.dumps(body), limit_s)
    except (OSError, TimeoutError, ValueError) as error:
        return lacks(error)  # then nothing is known of the worker
    return status < 500 or status == 503


async def is_healthy(worker: Worker, limit_s: float) -> bool:
    try:
        return (await ask(worker, "GET", "/health", b"", limit_s))[0] == 200
    except (OSError, TimeoutError, ValueError) as error:
        return lacks(error)


async def models_of(worker: Worker, limit_s: float) -> tuple[str, ...]:
    """The models that it names; none where it names none."""
    with contextlib.suppress(OSError, TimeoutError, ValueError, KeyError, TypeError):
        status, body = await ask(worker, "GET", "/v1/models", b"", limit_s)
        if status == 200:
            return tuple(str(card["id"]) for card in orjson.loads(body)["data"])
    return ()


class Watch:
    """Looks after the workers of a router, each in a task of its own."""

    def __init__(self, router: Router) -> None:
        self.router, self.settings = router, router.settings
        self._tasks: dict[Worker, list[asyncio.Task[None]]] = {}
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep())

    async def close(self) -> None:
        await cancelled([self._sweeper, *(task for each in self._tasks.values() for task in each)])

    async def _sweep(self) -> None:
        """Keep one watcher for each worker there is, and end what has waited too long."""
        while True:
            current = set(self.router.workers.values())
            for worker in current - self._tasks.keys():
                create = asyncio.get_running_loop().create_task
                self._tasks[worker] = [
                    create(self._watch_health(worker)), create(self._watch_silence(worker))
                ]  # fmt: skip
            for worker in self._tasks.keys() - current:
                await cancelled(self._tasks.pop(worker))
            self.router.expire()
            await asyncio.sleep(TICK_S)

    async def _watch_health(self, worker: Worker) -> None:
        missed = 0
        while True:
            if not worker.healthy:
                await self._try_to_return(worker)
                missed = 0
            elif worker.open_until and self.router.now() >= worker.open_until:
                await self._half_open(worker)
            elif await is_healthy(worker, self.settings.probe_timeout):
                missed = 0
            else:
                missed += 1
                if missed >= MOST_MISSED:
                    self.router.unreachable(worker)
                    self.router.move_away(worker, "its health is not well")
            await asyncio.sleep(self.settings.probe_interval)

    async def _try_to_return(self, worker: Worker) -> None:
        if not await is_healthy(worker, self.settings.probe_timeout):
            return
        worker.models = await models_of(worker, self.settings.probe_timeout)
        if await answers(worker, FIRST_TOKEN_S):
            worker.healthy, worker.hung, worker.faults, worker.open_until = True, False, 0, 0.0
            self.router.policy.removed(worker)  # what it had cached went with its process
            self.router.refresh()

    async def _half_open(self, worker: Worker) -> None:
        """A request of ours, not a client's, finds out whether the breaker may close."""
        if await answers(worker, self.settings.probe_timeout):
            worker.faults, worker.open_until = 0, 0.0
        else:
            worker.open_until = self.router.now() + self.settings.breaker_open
        self.router.refresh()

    def _computes_until(self, worker: Worker, since: float) -> float:
        """When it must have been heard: it takes one prompt after the other, and a stream begins
        when its prompt is computed. What came after it fell silent does not delay that."""
        until, late = since, since + self.settings.hang_after
        for exchange in self.router.active:
            if exchange.worker is worker and exchange.began <= late:
                if exchange.streams and exchange.splice is None:  # it has begun
                    continue
                tokens = exchange.missed or len(exchange.body) / BYTES_PER_TOKEN
                until = max(until, exchange.began) + tokens * self.router.policy.token_s
                if exchange.parsed.get("stream"):
                    break
        return min(until, since + MOST_PREFILL_S)

    async def _watch_silence(self, worker: Worker) -> None:
        heard, since = worker.reads, self.router.now()
        while True:
            await asyncio.sleep(TICK_S)
            now = self.router.now()
            if worker.hung:
                if await answers(worker, self.settings.probe_timeout):
                    worker.hung = False
                    self.router.refresh()
                heard, since = worker.reads, self.router.now()
            elif worker.reads != heard or not worker.load or not worker.healthy:
                heard, since = worker.reads, now
            elif now - since > self.settings.hang_after and now > self._computes_until(
                worker, since
            ):
                alive = await answers(worker, self.settings.probe_timeout)
                if not alive and worker.reads == heard and worker.load:
                    worker.hung = True
                    worker.failures += 1
                    self.router.refresh()
                    self.router.move_away(worker, "the worker hangs")
                since = self.router.now()
