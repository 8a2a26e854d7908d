"""Workers without sockets: the router's own policies before simulated caches, on simulated time.

A second of traffic takes milliseconds, and the state of every cache can be looked into. What a
policy sees is what the real router shows it: loads, and the caches' own KV events.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llm_router.cache_aware import CacheAware
from llm_router.fake_model import BlockCache
from llm_router.policies import Policy
from llm_router.prefix_index import block_keys

PREFILL_S, DECODE_S = 50e-6, 16e-3  # a missed token, an answer


@dataclass(eq=False)
class SimWorker:
    """What a policy looks at of a `Worker`, and the worker itself."""

    url: str
    cache: BlockCache
    load: int = 0
    requests: int = 0
    missed: int = 0
    free_at: float = 0.0


@dataclass(eq=False)
class SimRequest:
    """What a policy looks at of an `Exchange`."""

    user: str
    tokens: Sequence[int]
    answer: Sequence[int] = ()
    keys: Any = None

    @property
    def parsed(self) -> dict[str, Any]:
        return {"user": self.user}


@dataclass
class Result:
    """`copies` and `distinct` count the caches' blocks, at the moments looked at."""

    hit_rate: float
    requests: list[int]
    missed: list[int]
    rate: float
    latencies: list[float]
    copies: list[int] = field(default_factory=list)
    distinct: list[int] = field(default_factory=list)

    @property
    def duplication(self) -> float:
        """Copies of a block, on average."""
        return sum(self.copies) / max(1, sum(self.distinct))

    @property
    def imbalance(self) -> float:
        return max(self.requests) / float(np.mean(self.requests))


class Clock:
    """Simulated seconds; a policy is given it for `now`."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def keys_of(request: Any, block_size: int = 16) -> tuple[Sequence[int], int, int]:
    return block_keys(request.tokens, block_size), len(request.tokens), block_size


class Simulation:
    """A closed loop of `at_once` clients before FIFO workers with LRU caches of `blocks` blocks."""

    def __init__(self, policy: Policy, clock: Clock, workers: int, blocks: int) -> None:
        self.policy, self.clock = policy, clock
        self.workers = [SimWorker(f"http://w{i}", BlockCache(blocks, 16)) for i in range(workers)]
        self._queue: list[tuple[float, int, SimRequest, SimWorker, float]] = []
        self._count = 0

    def run(
        self, requests: Sequence[SimRequest], at_once: int, warmup: int = 0, look_every: int = 50
    ) -> Result:
        """The first `warmup` requests are not counted: the caches are empty when they come."""
        result = Result(0.0, [], [], 0.0, [])
        todo, tokens, since = iter(requests), 0, 0.0
        for _ in range(at_once):
            self._begin(todo)
        ended = 0
        while self._queue:
            at, _, request, worker, began = heapq.heappop(self._queue)
            self.clock.seconds = at
            worker.load -= 1
            self.policy.began(request, worker)  # type: ignore[arg-type]
            self.policy.left(request, worker)  # type: ignore[arg-type]
            ended += 1
            if ended == warmup:
                since = at
                for each in self.workers:
                    each.requests = each.missed = 0
            if ended > warmup:
                tokens += len(request.tokens)
                result.latencies.append(at - began)
                if ended % look_every == 0:
                    self._look(result)
            self._begin(todo)
        result.requests = [worker.requests for worker in self.workers]
        result.missed = [worker.missed for worker in self.workers]
        result.hit_rate = 1 - sum(result.missed) / tokens
        result.rate = (ended - warmup) / (self.clock.seconds - since)
        return result

    def warm(self, prompts: Sequence[Sequence[int]]) -> None:
        """Have every worker compute them before the first request comes."""
        for worker in self.workers:
            for tokens in prompts:
                worker.cache.use([*tokens], counted=False)
            self._publish(worker)

    def _begin(self, todo: Iterator[SimRequest]) -> None:
        if (request := next(todo, None)) is None:
            return
        now = self.clock.seconds
        worker: Any = self.policy.choose(request, self.workers)  # type: ignore[arg-type]
        worker.load += 1
        worker.requests += 1
        missed = worker.cache.use([*request.tokens])
        if request.answer:
            worker.cache.use([*request.tokens, *request.answer], counted=False)
        worker.missed += missed
        worker.free_at = max(now, worker.free_at) + missed * PREFILL_S
        self._publish(worker)
        self._count += 1
        end = worker.free_at + DECODE_S
        heapq.heappush(self._queue, (end, self._count, request, worker, now))

    def _publish(self, worker: Any) -> None:
        events, worker.cache.events = worker.cache.events, []
        if not isinstance(self.policy, CacheAware):
            return
        index = self.policy.index
        for event in events:
            if event["type"] == "BlockRemoved":
                index.removed(worker, event["block_hashes"])
            else:
                index.stored(
                    worker, event["block_hashes"], event["parent_block_hash"],
                    event["token_ids"], event["block_size"],
                )  # fmt: skip

    def _look(self, result: Result) -> None:
        held = [worker.cache.held for worker in self.workers]
        result.copies.append(sum(map(len, held)))
        result.distinct.append(len(set().union(*held)))
