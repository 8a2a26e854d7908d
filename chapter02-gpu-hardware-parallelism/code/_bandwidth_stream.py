"""STREAM's four kernels with torch, and a sweep over working sets that shows the caches.

Source: McCalpin, "Memory Bandwidth and Machine Balance in Current High Performance Computers",
IEEE TCCA Newsletter, December 1995. A kernel's bytes are those that it reads and writes by its
text. What the hardware adds is not counted: a store to a line that is in no cache first reads it.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from distlab import measure

SCALAR = 3.0
STREAMS = {"copy": 2, "scale": 2, "add": 3, "triad": 3}  # arrays read or written
ELEMENT = 8  # float64, as in STREAM


@dataclass(frozen=True)
class StreamResult:
    """Bytes/s of each kernel by the median time, and whether the arrays hold what they must."""

    threads: int
    bandwidth: dict[str, float]
    values: tuple[float, float, float]  # the only value in a, in b and in c; NaN: there are several
    expected: tuple[float, float, float]


def stream(array_bytes: int, threads: int, repeats: int) -> StreamResult:
    """Run copy, scale, add and triad in turns on `threads` threads."""
    count = array_bytes // ELEMENT
    with torch_threads(threads):
        a, b, c = (torch.full((count,), x, dtype=torch.float64) for x in (1.0, 2.0, 0.0))
        timings = measure.compare(
            {
                "copy": lambda: c.copy_(a),
                "scale": lambda: torch.mul(c, SCALAR, out=b),
                "add": lambda: torch.add(a, b, out=c),
                "triad": lambda: torch.add(b, c, alpha=SCALAR, out=a),
            },
            warmup=0,  # each round uses the last one's values; the median forgives the first round
            repeats=repeats,
        )
    bandwidth = {
        name: STREAMS[name] * count * ELEMENT / timing.median for name, timing in timings.items()
    }
    values = tuple(_only_value(array) for array in (a, b, c))
    return StreamResult(threads, bandwidth, values, _by_hand(repeats))  # type: ignore[arg-type]


def _only_value(array: torch.Tensor) -> float:
    low, high = torch.aminmax(array)
    return low.item() if low == high else float("nan")


def _by_hand(rounds: int) -> tuple[float, float, float]:
    """The same rounds on three numbers; whole ones, so exact as long as they are below 2^53."""
    a, b, c = 1.0, 2.0, 0.0
    for _ in range(rounds):
        c = a
        b = SCALAR * c
        c = a + b
        a = b + SCALAR * c
    return a, b, c


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class SweepPoint:
    """The bandwidth of all threads together, each with a working set of its own.

    `bandwidth` is that of the median time, `fastest` that of the shortest: interference only ever
    adds time.
    """

    working_set: int  # bytes of one thread
    threads: int
    bandwidth: float
    fastest: float
    exact: bool


def sweep(working_set: int, threads: int, traffic: int, repeats: int) -> SweepPoint:
    """Add a row to a total again and again, about `traffic` bytes in all, both in `working_set`.

    One NumPy call makes all passes, since a call for each would cost more than a pass in the first
    cache. The row is broadcast: every pass reads the same memory. The first pass copies the row:
    two arrays are read or written; every other one reads both and writes the total: three.
    """
    count = working_set // (2 * ELEMENT)
    passes = max(2, traffic // (3 * ELEMENT * count))
    workers = [_Adder(count, passes) for _ in range(threads)]
    for worker in workers:
        worker.run()
    seconds = [_together(workers) for _ in range(repeats)]
    moved = threads * ELEMENT * count * (2 + 3 * (passes - 1))
    exact = all(bool((worker.total == passes).all()) for worker in workers)
    median, shortest = float(np.median(seconds)), min(seconds)
    return SweepPoint(2 * ELEMENT * count, threads, moved / median, moved / shortest, exact)


class _Adder:
    """One thread's row of ones and its total: after a run every element is the number of passes."""

    def __init__(self, count: int, passes: int) -> None:
        self.rows = np.broadcast_to(np.ones(count), (passes, count))
        self.total = np.empty(count)

    def run(self) -> None:
        np.add.reduce(self.rows, axis=0, out=self.total)  # without the interpreter's lock


def _together(workers: list[_Adder]) -> float:
    """Seconds from when all threads start until the last one is done."""
    start = threading.Barrier(len(workers))

    def work(worker: _Adder) -> None:
        start.wait(timeout=60)
        worker.run()

    if len(workers) == 1:
        began = time.perf_counter()
        workers[0].run()
        return time.perf_counter() - began
    ready = [threading.Thread(target=work, args=(worker,)) for worker in workers[1:]]
    for thread in ready:
        thread.start()
    start.wait(timeout=60)
    began = time.perf_counter()
    workers[0].run()
    for thread in ready:
        thread.join()
    return time.perf_counter() - began
