"""A server with a queue: the requests arrive at given times, and each answer is really computed."""

from collections.abc import Callable

import numpy as np

from distlab.queueing import mean_wait


class Server:
    """Answers requests in order of arrival, up to `max_batch` of those that wait together.

    Every answer is really computed and timed; only idle time is skipped rather than slept through.
    """

    def __init__(self, arrivals: np.ndarray, max_batch: int) -> None:
        self.arrivals = arrivals  # seconds, ascending
        self.max_batch = max_batch
        self.wait, self.latency = np.zeros_like(arrivals), np.zeros_like(arrivals)
        self.services: list[float] = []
        self.clock, self.served = 0.0, 0

    @property
    def done(self) -> bool:
        return self.served == len(self.arrivals)

    def serve_next(self, answer: Callable[[int], float]) -> None:
        self.clock = max(self.clock, self.arrivals[self.served])
        arrived = int(np.searchsorted(self.arrivals, self.clock, side="right"))
        batch = slice(self.served, min(arrived, self.served + self.max_batch))
        self.wait[batch] = self.clock - self.arrivals[batch]
        self.services.append(answer(batch.stop - batch.start))
        self.clock += self.services[-1]
        self.latency[batch] = self.clock - self.arrivals[batch]
        self.served = batch.stop

    @property
    def waited(self) -> float:
        """The fraction of requests that had to wait."""
        return float(np.mean(self.wait > 0))

    def summary(self, endless: float | None) -> list[float | None]:
        """Requests/s, % that waited; in ms the mean wait, that of an endless queue if it is known,
        and the median and 99th percentile of the latency."""
        p50, p99 = 1e3 * np.percentile(self.latency, [50, 99])
        rate = len(self.arrivals) / self.clock
        expected = None if endless is None else 1e3 * endless
        return [rate, 100 * self.waited, 1e3 * self.wait.mean(), expected, p50, p99]


def endless_wait(server: Server, load: float) -> float:
    services = np.array(server.services)
    return mean_wait(load / services.mean(), services)
