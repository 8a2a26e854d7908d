"""The engine behind a server: one thread steps it, and each HTTP request awaits its own outputs.

    engine = AsyncEngine(Engine(config), max_queue=256)
    engine.start()
    with engine.generation(sequences=1) as generation:  # Overloaded when the queue is full
        await generation.start([prompt_ids], params)    # UsageError when the engine refuses it
        async for output in generation:
            ...
    await engine.close()

Leaving the `with` block, in whatever way, takes the request's sequences out of the engine: that is
how a client that left is forgotten. Two threads are at work. The event loop's owns everything that
is named here but the engine, to which it sends commands; the engine's thread obeys them between two
steps, and sends back what a step has brought.
"""

import asyncio
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from distlab.errors import UsageError
from paged_engine.engine import Engine, Output
from paged_engine.metrics import Metrics
from paged_engine.sampling_params import SamplingParams

CLOSE_SECONDS = 10.0
IDLE_SECONDS = 0.5  # how long an idle engine waits for a command before it looks again
log = logging.getLogger("paged_engine.server")


class Overloaded(Exception):
    """The queue is full; `retry_after` seconds from now there is probably room."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("The server has as many requests as it takes; try again later")
        self.retry_after = retry_after


class Unavailable(Exception):
    """No answer: the engine failed, the server is shutting down, or it took too long."""


class AsyncEngine:
    """At most `engine.config.max_sequences + max_queue` sequences are in the server at a time."""

    def __init__(
        self,
        engine: Engine,
        max_queue: int = 256,
        request_seconds: float = 600.0,
        metrics: Metrics | None = None,
    ) -> None:
        self.engine = engine
        self.request_seconds = request_seconds
        self.capacity = engine.config.max_sequences + max_queue
        self.metrics = metrics or Metrics("model")
        self.failure: Unavailable | None = None
        self.reserved = 0
        self.step_started: float | None = None
        self._live: dict[str, Live] = {}
        self._ends: deque[float] = deque(maxlen=64)  # when the latest sequences finished
        self._commands: queue.SimpleQueue[Add | Cancel | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop

    def start(self) -> None:
        """Call it in the event loop that will await the outputs."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def generation(self, sequences: int) -> "Generation":
        """Room for so many sequences. Raises UsageError, Overloaded or Unavailable."""
        if self.failure:
            raise self.failure
        if sequences > self.capacity:
            raise UsageError(
                f"prompts times n is {sequences}; this server takes at most {self.capacity}"
            )
        if self.reserved + sequences > self.capacity:
            self.metrics.rejected()
            raise Overloaded(self.retry_after(sequences))
        return Generation(self, sequences)

    def retry_after(self, sequences: int) -> int:
        """Seconds until so many places are free at the rate of the latest finishes; 1 to 60."""
        if len(self._ends) < 2:
            return 1
        elapsed = time.monotonic() - self._ends[0]
        missing = self.reserved + sequences - self.capacity
        return min(60, max(1, math.ceil(missing * elapsed / (len(self._ends) - 1))))

    def fail_all(self, failure: Unavailable) -> None:
        """Refuse new requests, and end those there are with `failure`."""
        self.failure = self.failure or failure
        for generation in {live.generation for live in self._live.values()}:
            generation.fail(failure)

    def problem(self) -> str | None:
        """Why this engine should be given up, if it should."""
        if self.failure:
            return str(self.failure)
        started = self.step_started
        if started is not None and time.monotonic() - started > self.request_seconds:
            return f"A step of the engine has lasted more than {self.request_seconds:g} s"
        return None

    async def close(self) -> None:
        self.fail_all(Unavailable("The server is shutting down"))
        await asyncio.to_thread(self.stop)

    def stop(self) -> None:
        """End the thread, which closes the engine; it gets `CLOSE_SECONDS` for its last step."""
        if self._thread.ident is None:
            self.engine.close()
        elif self._thread.is_alive():
            self._commands.put(None)
            self._thread.join(CLOSE_SECONDS)

    def submit(self, command: "Add") -> None:
        if self.failure:
            raise self.failure
        live = Live(command.generation, time.monotonic(), command.params.n)
        self._live[command.request_id] = live
        self._commands.put(command)

    def forget(self, request_id: str) -> None:
        """Take a request out of the engine, unless it has finished."""
        if live := self._live.pop(request_id, None):
            self._commands.put(Cancel(request_id))
            self.metrics.finished("cancelled", live.unfinished)

    def admitted(self, request_id: str, refusal: UsageError | None) -> None:
        """In the event loop: the engine has taken a request, or refused it."""
        live = self._live.get(request_id)
        if live and refusal:
            del self._live[request_id]
        if live:
            live.generation.admitted(request_id, refusal)

    def _deliver(self, outputs: Sequence[Output]) -> None:
        """In the event loop: hand each output to the request that waits for it."""
        for output in outputs:
            live = self._live.get(output.request_id)
            if live is None:
                continue  # its client left while the step was on its way
            self._time(live, output)
            if output.finish_reason:
                self._ends.append(output.time)
                live.unfinished -= 1
                self.metrics.finished(output.finish_reason)
            if not live.unfinished:
                del self._live[output.request_id]
                self.metrics.latency.observe(output.time - live.arrival)
            live.generation.items.put_nowait(output)

    def _time(self, live: "Live", output: Output) -> None:
        """Observe how long this token took since the arrival, or since its sequence's latest."""
        before = live.last.get(output.index)
        if not live.last:
            self.metrics.first_token.observe(output.time - live.arrival)
        elif before is not None:
            self.metrics.between.observe(output.time - before)
        live.last[output.index] = output.time

    def _run(self) -> None:
        """The engine's thread."""
        try:
            while self._obey():
                if self.engine.has_work:
                    self.step_started = time.monotonic()
                    outputs = self.engine.step()
                    self.step_started = None
                    self._call(self._deliver, outputs)
                self.metrics.stats = self.engine.stats()
        except Exception as error:  # whatever it is, nobody may wait for this engine any longer
            log.exception("the engine failed")
            self._call(self.fail_all, Unavailable(f"The engine failed: {type(error).__name__}"))
        finally:
            self.step_started = None
            self.engine.close()

    def _obey(self) -> bool:
        """Do all that was commanded, waiting for something to do if there is nothing."""
        wait = not self.engine.has_work
        while True:
            try:
                command = self._commands.get(block=wait, timeout=IDLE_SECONDS)
            except queue.Empty:
                return True
            wait = False
            if command is None:
                return False
            if isinstance(command, Cancel):
                self.engine.cancel(command.request_id)
            else:
                self._add(command)

    def _add(self, command: "Add") -> None:
        refusal: UsageError | None = None
        try:
            self.engine.add_request(command.prompt_ids, command.params, command.request_id)
        except UsageError as mistake:
            refusal = mistake
        self._call(self.admitted, command.request_id, refusal)

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        self._loop.call_soon_threadsafe(function, *args)


class Generation:
    """What one HTTP request wants: an engine request for each of its prompts.

    Iterating gives the engine's outputs as they come, one item for each token at most, so that
    what waits here for a slow client is bounded by max_tokens. Raises Unavailable, also when the
    request has lasted longer than it may.
    """

    def __init__(self, engine: AsyncEngine, sequences: int) -> None:
        self.engine = engine
        self.sequences = sequences  # that this request has room for; 0 once it is closed
        self.items: asyncio.Queue[Output | Unavailable] = asyncio.Queue()
        self.prompt_of: dict[str, int] = {}  # engine request -> index of its prompt
        loop = asyncio.get_running_loop()
        self._deadline = loop.time() + engine.request_seconds
        self._to_admit: set[str] = set()
        self._admission: asyncio.Future[None] = loop.create_future()
        self._unfinished = sequences
        engine.reserved += sequences

    def __enter__(self) -> "Generation":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    async def start(
        self, prompts: Sequence[list[int]], params: SamplingParams, name: str = "request"
    ) -> None:
        """Hand the prompts to the engine; returns when it has taken all. Raises UsageError."""
        ids = [f"{name}-{index}" for index in range(len(prompts))]
        self.prompt_of = {request_id: index for index, request_id in enumerate(ids)}
        self._to_admit = set(ids)
        for request_id, prompt in zip(ids, prompts, strict=True):
            self.engine.submit(Add(self, request_id, prompt, params))
        await self._within_limit(self._admission)

    def admitted(self, request_id: str, refusal: UsageError | None) -> None:
        self._to_admit.discard(request_id)
        if self._admission.done():
            return
        if refusal:
            self._admission.set_exception(refusal)
        elif not self._to_admit:
            self._admission.set_result(None)

    def fail(self, failure: Unavailable) -> None:
        """Let whoever waits for the admission, or for the next output, get `failure`."""
        if not self._admission.done():
            self._admission.set_exception(failure)
        self.items.put_nowait(failure)

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> Output:
        if not self._unfinished:
            raise StopAsyncIteration
        item = await self._within_limit(self.items.get())
        if isinstance(item, Unavailable):
            raise item
        self._unfinished -= item.finish_reason is not None
        return item

    async def _within_limit(self, awaited: Awaitable[Any]) -> Any:
        """Not by asyncio.wait_for: before Python 3.12 it may swallow a cancellation."""
        try:
            async with asyncio.timeout_at(self._deadline):
                return await awaited
        except TimeoutError:
            limit = self.engine.request_seconds
            raise Unavailable(f"The request has taken longer than {limit:g} s") from None

    def close(self) -> None:
        """Forget the request, finished or not; may be called twice."""
        for request_id in self.prompt_of:
            self.engine.forget(request_id)
        self.engine.reserved -= self.sequences
        self.sequences = 0
        self._admission.cancel()


@dataclass(frozen=True)
class Add:
    generation: Generation
    request_id: str
    prompt_ids: list[int]
    params: SamplingParams


@dataclass(frozen=True)
class Cancel:
    request_id: str


@dataclass
class Live:
    """An engine request that has not finished: who waits for it, and when it brought something."""

    generation: Generation
    arrival: float
    unfinished: int  # sequences
    last: dict[int, float] = field(default_factory=dict)  # sequence -> time of its latest token
