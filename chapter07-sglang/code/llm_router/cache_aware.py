"""The policy cache_aware: the worker where a request costs least, now and for those to come."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llm_router.policies import Asked, Plain
from llm_router.prefix_index import PrefixIndex
from llm_router.worker import Worker


@dataclass(frozen=True)
class Costs:
    """What weighs how much, in seconds or as a factor."""

    prefill: float = 1e-4  # seconds a token, until it is learned
    copy: float = 3.0  # a missed token also takes another's place: as a part of its prefill
    decode: float = 1e-3  # for each request that a worker has
    share: float = 0.2  # for a worker that has had all of the latest requests
    window: int = 100  # the latest requests


class Prefill:
    """Seconds a token and a request, by least squares over what is seen; older counts less.

    The time to the first byte of a request which met an idle worker: base + tokens · slope.
    """

    KEEP = 0.99

    def __init__(self, slope: float) -> None:
        self.slope, self.learned = slope, False
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def learn(self, tokens: float, seconds: float) -> None:
        keep = self.KEEP
        self._n = self._n * keep + 1
        self._x = self._x * keep + tokens
        self._y = self._y * keep + seconds
        self._xx = self._xx * keep + tokens * tokens
        self._xy = self._xy * keep + tokens * seconds
        spread = self._n * self._xx - self._x**2
        self.learned = self._n > 8
        if self.learned and spread > 1e-3 * self._n * self._xx:
            slope = (self._n * self._xy - self._x * self._y) / spread
            self.slope = min(max(slope, 1e-7), 1e-2)


@dataclass
class Load:
    """What the policy knows of one worker's work."""

    free_at: float = 0.0  # when it will have computed all prompts that were sent to it
    share: float = 0.0  # of the latest requests


@dataclass
class Sent:
    """What was believed when a request was sent."""

    keys: Sequence[int]
    missed: int
    alone: bool
    at: float
    began: bool = False


class CacheAware:
    """cost = seconds in the queue + missed tokens · (seconds to compute them + what they displace)
    + its requests' decode + its share of the latest requests.

    Routing by prefix alone sends all of a popular prefix to one worker, however long its queue;
    routing by load alone computes every prefix everywhere, and the caches hold copies of the same.
    Both are seconds here, and so can be added.
    """

    def __init__(
        self,
        keys_of: Callable[[Asked], tuple[Sequence[int], int, int]],
        costs: Costs | None = None,
        guess_blocks: int = 4096,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`keys_of` tells a request's block keys, its tokens, and the tokens of a block."""
        self.keys_of, self.now = keys_of, now
        self.costs = costs or Costs()
        self.index: PrefixIndex[Worker] = PrefixIndex(guess_blocks)
        self.prefill = Prefill(self.costs.prefill)
        self._loads: dict[Worker, Load] = {}

    @property
    def token_s(self) -> float:
        """Four times what is learned: a batch of other requests may slow a prompt down."""
        return 4 * self.prefill.slope if self.prefill.learned else Plain.token_s

    def choose(self, exchange: Asked, workers: Sequence[Worker]) -> Worker:
        now, costs = self.now(), self.costs
        self.index.settle(now)
        keys, tokens, size = self.keys_of(exchange)
        depths = self.index.match(keys, workers)
        best, least, best_missed, best_wait = workers[0], float("inf"), 0, 0.0
        slope = self.prefill.slope
        mean = 1 / len(workers)
        for worker, depth in zip(workers, depths, strict=True):
            load = self._loads.get(worker)
            if load is None:
                load = self._loads[worker] = Load(share=mean)
            missed = max(1, tokens - depth * size)
            wait = max(0.0, load.free_at - now)
            cost = (
                wait
                + missed * slope * (1 + costs.copy)
                + worker.load * costs.decode
                + load.share * costs.share
            )
            if cost < least:
                best, least, best_missed, best_wait = worker, cost, missed, wait
        keep = 1 - 1 / costs.window
        for load in self._loads.values():
            load.share *= keep
        load = self._loads[best]
        load.share += 1 - keep
        load.free_at = now + best_wait + best_missed * slope
        exchange.missed = best_missed
        exchange.keys = Sent(keys, best_missed, best_wait == 0.0, now)
        self.index.expect(best, keys)
        return best

    def began(self, exchange: Asked, worker: Worker) -> None:
        sent: Any = exchange.keys
        if isinstance(sent, Sent) and not sent.began:
            sent.began = True
            if sent.alone:
                self.prefill.learn(sent.missed, self.now() - sent.at)

    def left(self, exchange: Asked, worker: Worker) -> None:
        if isinstance(sent := exchange.keys, Sent):
            self.index.arrived(worker, sent.keys, self.now())
            exchange.keys = None

    def removed(self, worker: Worker) -> None:
        self.index.forget(worker)
        self._loads.pop(worker, None)
