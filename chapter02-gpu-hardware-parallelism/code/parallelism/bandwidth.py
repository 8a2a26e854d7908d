"""Bytes on the move: STREAM's kernels, a sweep over working sets, copies between memories.

Source of STREAM: McCalpin, "Memory Bandwidth and Machine Balance in Current High Performance
Computers", IEEE TCCA Newsletter, December 1995. A kernel's bytes are those that it reads and writes
by its text. What the hardware adds is not counted: a store to a line that is in no cache first
reads it.

A copy of n bytes takes alpha + n / bandwidth: what one transfer costs, and what a byte costs. It is
the model that the collectives are predicted with (`distlab.predict.communication`).
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import permutations

import numpy as np
import torch

from distlab import host, measure
from distlab.catalog import find_gpu
from distlab.display import quantity
from distlab.script import Run
from parallelism.machine import Cache, caches

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
    """The bytes/s of all threads together, each with a working set of its own, every time."""

    working_set: int  # bytes of one thread
    threads: int
    samples: tuple[float, ...]
    exact: bool

    @property
    def bandwidth(self) -> float:
        """The median."""
        return float(np.median(self.samples))


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
    samples = tuple(moved / taken for taken in seconds)
    return SweepPoint(2 * ELEMENT * count, threads, samples, exact)


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


BLOCK = 2**20 + 7  # no power of two, lest a piece in the wrong place look right


@dataclass(frozen=True)
class Route:
    """From one memory to another. `specified` in bytes/s one way, None where nobody tells."""

    name: str
    source: torch.device
    target: torch.device
    pinned: bool = False  # the host's side is page-locked: the GPU's copy engine reads it itself
    specified: float | None = None


@dataclass
class Transfers:
    """What the copies of one route took."""

    route: Route
    sizes: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    wrong: list[int] = field(default_factory=list)  # sizes whose copy differs from its source

    @property
    def best(self) -> float:
        return max(size / taken for size, taken in zip(self.sizes, self.seconds, strict=True))


def host_routes(device: torch.device) -> list[Route]:
    """Between the host and a GPU, both ways, pinned and pageable; on a CPU within its memory."""
    cpu = torch.device("cpu")
    if device.type == "cpu":
        return [Route("host to host", cpu, cpu)]
    spec = find_gpu(torch.cuda.get_device_name(device))
    one_way = None if spec is None or spec.pcie_bandwidth is None else spec.pcie_bandwidth / 2
    return [
        Route(f"{kind} host to device" if up else f"device to {kind} host",
              cpu if up else device, device if up else cpu, kind == "pinned", one_way)
        for kind in ("pinned", "pageable") for up in (True, False)
    ]  # fmt: skip


def peer_routes() -> list[Route]:
    """From each GPU to each other; over NVLink where both have it, by the data sheet."""
    routes = []
    for a, b in permutations(range(torch.cuda.device_count()), 2):
        spec = find_gpu(torch.cuda.get_device_name(a))
        both_ways = spec and torch.cuda.can_device_access_peer(a, b) and spec.nvlink_bandwidth
        routes.append(
            Route(f"GPU{a} to GPU{b}", torch.device("cuda", a), torch.device("cuda", b),
                  specified=both_ways / 2 if both_ways else None)
        )  # fmt: skip
    return routes


def transfer(route: Route, sizes: Sequence[int], repeats: int) -> Transfers:
    """Copy each size `repeats` times, in turns over the sizes, and look at what has arrived."""
    clock = route.source if route.source.type == "cuda" else route.target
    pairs = {size: _buffers(route, size) for size in sizes}
    copies = {
        str(size): lambda a=source, b=target: b.copy_(a, non_blocking=route.pinned)
        for size, (source, target) in pairs.items()
    }
    with (
        torch.cuda.device(clock) if clock.type == "cuda" else nullcontext()
    ):  # whose events time it
        timings = measure.compare(copies, 2, repeats, clock)
    result = Transfers(route)
    for size, (source, target) in pairs.items():
        result.sizes.append(size)
        result.seconds.append(timings[str(size)].median)
        if not torch.equal(source.cpu(), target.cpu()):
            result.wrong.append(size)
    return result


def _buffers(route: Route, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random bytes at the source, a block of them repeated, and zeros at the target."""
    generator = torch.Generator().manual_seed(size)
    block = torch.randint(256, (min(size, BLOCK),), generator=generator, dtype=torch.uint8)
    content = block.repeat(-(-size // BLOCK))[:size]
    source, target = content.to(route.source), torch.zeros_like(content, device=route.target)
    if route.pinned and route.source.type == "cpu":
        source = source.pin_memory()
    if route.pinned and route.target.type == "cpu":
        target = target.pin_memory()
    return source, target


def fit_line(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """(alpha, beta) that come closest to `seconds` = alpha + beta · size, relative to each time.

    Relative, since an absolute fit would hear only the largest sizes. Neither may be negative.
    """
    taken = np.asarray(seconds)
    rows = np.stack([1 / taken, np.asarray(sizes) / taken], axis=1)
    alpha, beta = np.linalg.lstsq(rows, np.ones(len(taken)), rcond=None)[0]
    if alpha < 0:
        alpha, beta = 0.0, rows[:, 1].sum() / (rows[:, 1] ** 2).sum()
    if beta < 0:
        alpha, beta = rows[:, 0].sum() / (rows[:, 0] ** 2).sum(), 0.0
    return float(alpha), float(beta)


TOLERANCE = 1.05  # over a data sheet's number, for its rounding
SMALLEST_SET, FIRST_END, LAST_END = 2**14, 2**26, 2**29


@dataclass(frozen=True)
class Result:
    """One measured bandwidth beside what was promised, both in bytes/s."""

    what: str
    measured: float
    specified: float | None


def working_sets(step: int) -> list[int]:
    """Bytes from half of a usual first cache to twice the last one (64 MiB to 512 MiB)."""
    end = min(max(2 * host.last_level_cache(), FIRST_END), LAST_END)
    sizes = [SMALLEST_SET]
    while sizes[-1] < end:
        sizes.append(min(sizes[-1] * step, end))
    return sizes


def level_of(together: int, alone: int) -> str:
    """The first cache that holds the working set: of all threads where they share it, else each."""
    levels: list[Cache] = caches()
    if not levels:
        return "unknown"
    for cache in levels:
        if (together if cache.shared_by > 1 else alone) <= cache.size:
            return cache.name
    return "memory"


def draw_sweep(run: Run, points: Sequence[SweepPoint]) -> None:
    series = []
    for threads in sorted({p.threads for p in points}):
        mine = [p for p in points if p.threads == threads]
        series.append({
            "label": f"{threads} thread{'s' * (threads > 1)}",
            "x": [p.working_set / 2**10 for p in mine],
            "y": [p.bandwidth / 1e9 for p in mine],
        })  # fmt: skip
    run.figure(
        "bandwidth_sweep", kind="line", log_x=True, series=series,
        title="Every cache that is outgrown costs bandwidth",
        x_label="working set of a thread (KiB)", y_label="bandwidth (GB/s)",
        lines=[{"label": cache.name, "x": cache.size / 2**10} for cache in caches()],
    )  # fmt: skip


def draw_transfers(run: Run, done: Sequence[Transfers]) -> None:
    series = []
    for copies in done:
        alpha, beta = fit_line(copies.sizes, copies.seconds)
        pairs = list(zip(copies.sizes, copies.seconds, strict=True))
        series.append({"label": copies.route.name, "x": copies.sizes,
                       "y": [size / taken / 1e9 for size, taken in pairs]})  # fmt: skip
        series.append({"label": "its line", "x": copies.sizes,
                       "y": [size / (alpha + beta * size) / 1e9 for size, _ in pairs]})  # fmt: skip
    run.figure(
        "bandwidth_copies", kind="line", log_x=True, log_y=True, series=series,
        title="Small copies pay for their start, large ones for their bytes",
        x_label="bytes", y_label="bandwidth (GB/s)",
    )  # fmt: skip


def draw_peers(run: Run, done: Sequence[Transfers]) -> None:
    """Bandwidth from each GPU (row) to each other (column)."""
    fastest = {(c.route.source.index, c.route.target.index): c.best / 1e9 for c in done}
    gpus = sorted({pair[0] for pair in fastest})
    names = [f"GPU{gpu}" for gpu in gpus]
    table = [[fastest.get((a, b)) for b in gpus] for a in gpus]
    run.table(
        "peers",
        ["GB/s from", *names],
        [[name, *row] for name, row in zip(names, table, strict=True)],
        caption="Copies from GPU to GPU, one pair at a time",
    )
    run.figure(
        "bandwidth_peers", kind="matrix", title="Copies from GPU to GPU (GB/s)",
        x_label="to", y_label="from",
        series=[{"label": name, "x": names, "y": row}
                for name, row in zip(names, table, strict=True)],
    )  # fmt: skip


def compare_with_specification(run: Run, results: list[Result]) -> None:
    run.table(
        "specification",
        ["what", "measured", "specified", "share"],
        [[r.what, quantity(r.measured, "B/s"), quantity(r.specified, "B/s"),
          quantity(100 * r.measured / r.specified if r.specified else None, "%")] for r in results],
        caption="One direction; unknown: no data sheet of this device is known",
    )  # fmt: skip
    above = [r.what for r in results if r.specified and r.measured > TOLERANCE * r.specified]
    known = sum(r.specified is not None for r in results)
    run.check_true(
        "nothing is faster than its specification",
        not above,
        ", ".join(above) or f"{known} of {len(results)} have one",
    )
