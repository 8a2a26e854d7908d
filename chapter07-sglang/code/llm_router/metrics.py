"""What /metrics tells Prometheus: plain numbers, since the data path counts each request."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sized
from typing import Protocol

from llm_router.worker import Worker

PREFIX = "llm_router"
BOUNDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
)  # fmt: skip
STATES = ("up", "down", "hung", "open", "draining")


class Counted(Protocol):
    """The router, as far as it is counted."""

    running: int
    retries: int
    cuts: int
    lost: int

    @property
    def queue(self) -> Sized: ...
    @property
    def workers(self) -> Mapping[str, Worker]: ...


class Histogram:
    """Seconds, in buckets with the upper ends `BOUNDS`."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds

    def lines(self, name: str, help: str) -> list[str]:
        lines, below = [f"# HELP {name} {help}", f"# TYPE {name} histogram"], 0
        for bound, count in zip([*map(str, BOUNDS), "+Inf"], self.counts, strict=True):
            below += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {below}')
        return [*lines, f"{name}_sum {self.total:.9g}", f"{name}_count {below}"]


class Metrics:
    """Counted while it runs; the rest is read off the router when it is asked."""

    def __init__(self) -> None:
        self.by_status: Counter[int] = Counter()
        self.refused = 0
        self.seconds, self.first_byte = Histogram(), Histogram()
        self._window = (0.0, 0)  # when the latest rate began, and how many had ended then
        self._ended, self._rate = 0, 0.0

    def count(self, status: int) -> None:
        self.by_status[status] += 1

    def done(self, status: int, seconds: float, now: float) -> None:
        self.by_status[status] += 1
        self.seconds.observe(seconds)
        self._ended += 1
        if now - self._window[0] > 1.0:
            self.rate(now)

    def rate(self, now: float) -> float:
        """Requests ended per second, in a window of the last second or so."""
        since, ended = self._window
        if now - since > 1.0:
            self._rate = (self._ended - ended) / (now - since) if since else 0.0
            self._window = (now, self._ended)
        return self._rate

    def text(self, router: Counted) -> bytes:
        lines: list[str] = []

        def family(name: str, kind: str, help: str, values: dict[str, float]) -> None:
            full = f"{PREFIX}_{name}"
            lines.extend([f"# HELP {full} {help}", f"# TYPE {full} {kind}"])
            lines.extend(f"{full}{labels} {value:.9g}" for labels, value in values.items())

        statuses = {f'{{status="{s}"}}': float(n) for s, n in sorted(self.by_status.items())}
        family("requests_total", "counter", "Requests by the status that they got", statuses)
        for name, value, help in (
            ("rejections_total", self.refused, "Requests refused: the queue was full"),
            ("retries_total", router.retries, "Requests asked again before they began to answer"),
            ("streams_cut_total", router.cuts, "Streams that a worker broke off"),
            ("streams_lost_total", router.lost, "Streams that could not be continued"),
        ):
            family(name, "counter", help, {"": value})
        family("requests_running", "gauge", "Requests at the workers", {"": router.running})
        family("requests_waiting", "gauge", "Requests in the queue", {"": len(router.queue)})
        workers = {worker: f'worker="{worker.url}"' for worker in router.workers.values()}
        for name, attribute, kind, help in (
            ("worker_load", "load", "gauge", "Requests that a worker has now"),
            ("worker_requests_total", "requests", "counter", "Requests sent to a worker"),
            ("worker_failures_total", "failures", "counter", "Failures of a worker's own"),
        ):
            values = {f"{{{label}}}": getattr(w, attribute) for w, label in workers.items()}
            family(name, kind, help, values)
        states = {
            f'{{{label},state="{state}"}}': float(worker.state == state)
            for worker, label in workers.items()
            for state in STATES
        }
        family("worker_state", "gauge", "1 for the state that a worker is in", states)
        lines += self.seconds.lines(f"{PREFIX}_request_seconds", "From arrival to the last byte")
        lines += self.first_byte.lines(f"{PREFIX}_first_byte_seconds", "From arrival to the first")
        return ("\n".join(lines) + "\n").encode()
