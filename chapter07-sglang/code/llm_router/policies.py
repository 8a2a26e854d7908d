"""Which worker answers: the policies, from taking turns to knowing each worker's cache."""

import random
from bisect import bisect_left
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, Protocol

from distlab.errors import UsageError
from llm_router.worker import Worker


class Asked(Protocol):
    """What a policy looks at of a request."""

    keys: Any  # what it keeps there
    missed: int  # tokens that the worker has to compute, as it believes

    @property
    def parsed(self) -> dict[str, Any]: ...


class Policy(Protocol):
    """Chooses one of `workers`, of which there is at least one; all of them may be used."""

    @property
    def token_s(self) -> float:
        """The most seconds that a worker may take for a token of a prompt."""

    def choose(self, exchange: Asked, workers: Sequence[Worker]) -> Worker: ...

    def began(self, exchange: Asked, worker: Worker) -> None:
        """The first byte of the answer has come."""

    def left(self, exchange: Asked, worker: Worker) -> None:
        """The worker has nothing to do for it any more, in whatever way it ended."""

    def removed(self, worker: Worker) -> None:
        """Forget all about the worker."""


class Plain:
    """A policy that learns nothing from what becomes of its choices."""

    token_s = 5e-4  # of an 8B model on a GPU it is a tenth of that, or less

    def began(self, exchange: Asked, worker: Worker) -> None: ...

    def left(self, exchange: Asked, worker: Worker) -> None: ...

    def removed(self, worker: Worker) -> None: ...


class RoundRobin(Plain):
    """In turns."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, exchange: Asked, workers: Sequence[Worker]) -> Worker:
        self._turn += 1
        return workers[self._turn % len(workers)]


class LeastLoaded(Plain):
    """The one with the fewest requests; among equals, in turns."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, exchange: Asked, workers: Sequence[Worker]) -> Worker:
        self._turn += 1
        count = len(workers)
        best = workers[self._turn % count]
        for i in range(1, count):
            worker = workers[(self._turn + i) % count]
            if worker.load < best.load:
                best = worker
        return best


class PowerOfTwo(Plain):
    """The less loaded of two drawn at random: nearly as even as the least loaded of all, and no
    herd where several routers see the same loads late (Mitzenmacher, IEEE TPDS 12(10), 2001)."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed).random

    def choose(self, exchange: Asked, workers: Sequence[Worker]) -> Worker:
        count = len(workers)
        one = workers[int(self._random() * count)]
        if count == 1:
            return one
        at = int(self._random() * (count - 1))
        other = workers[at] if workers[at] is not one else workers[count - 1]
        return one if one.load <= other.load else other


class ConsistentHash(Plain):
    """The same user, session or prompt's beginning to the same worker; when one leaves, only its
    own move (Karger et al., STOC 1997)."""

    POINTS = 160  # on the ring for each worker: shares differ by some 8 %

    def __init__(self) -> None:
        self._ring: list[tuple[int, str]] = []
        self._urls: tuple[str, ...] = ()

    def choose(self, exchange: Asked, workers: Sequence[Worker]) -> Worker:
        by_url = {worker.url: worker for worker in workers}
        if tuple(by_url) != self._urls:
            self._urls = tuple(by_url)
            points = [(f"{url}#{i}", url) for url in by_url for i in range(self.POINTS)]
            self._ring = sorted((_place(name), url) for name, url in points)
        at = bisect_left(self._ring, (_place(routing_key(exchange)), ""))
        return by_url[self._ring[at % len(self._ring)][1]]


def _place(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def routing_key(exchange: Asked) -> str:
    """Who asks: the user or session that the request names, else how its prompt begins."""
    body = exchange.parsed
    for name in ("session_id", "user", "prompt_cache_key"):
        if isinstance(value := body.get(name), str) and value:
            return value
    first = body.get("messages") or body.get("prompt") or body.get("text") or ""
    return str(first)[:1024]


def make_policy(name: str, cache_aware: Callable[[], Policy]) -> Policy:
    """The policy called `name`. Raises `UsageError` for another name."""
    if name not in POLICIES:
        raise UsageError(f"--policy {name} is unknown; use {', '.join(POLICIES)}")
    return cache_aware() if name == "cache_aware" else PLAIN[name]()


PLAIN: dict[str, Callable[[], Policy]] = {
    "round_robin": RoundRobin, "least_loaded": LeastLoaded, "power_of_two": PowerOfTwo,
    "consistent_hash": ConsistentHash,
}  # fmt: skip
POLICIES = [*PLAIN, "cache_aware"]
