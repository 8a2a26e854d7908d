"""What one HTTP request waits for: the outputs of its prompts, from the engine behind a server."""

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distlab.errors import UsageError
from paged_engine.engine import Output
from paged_engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from paged_engine.async_engine import AsyncEngine


class Overloaded(Exception):
    """The queue is full; `retry_after` seconds from now there is probably room."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("The server has as many requests as it takes; try again later")
        self.retry_after = retry_after


class Unavailable(Exception):
    """No answer: the engine failed, the server is shutting down, or it took too long."""


class Generation:
    """What one HTTP request wants: an engine request for each of its prompts.

    Iterating gives the engine's outputs as they come, one item for each token at most, so that
    what waits here for a slow client is bounded by max_tokens. Raises Unavailable, also when the
    request has lasted longer than it may.
    """

    def __init__(self, engine: "AsyncEngine", sequences: int) -> None:
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
    generation: "Generation"
    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
