"""bandwidth_test.py's sweep sizes and the caches they fit in, its figures, its comparison."""

from collections.abc import Sequence
from dataclasses import dataclass

from _bandwidth_copies import Transfers, fit_line
from _bandwidth_stream import SweepPoint
from _topology_sysfs import Cache, caches

from distlab import host
from distlab.display import quantity
from distlab.script import Run

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
        x_label="working set of a thread (KiB)", y_label="GB/s",
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
        x_label="bytes", y_label="GB/s",
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
