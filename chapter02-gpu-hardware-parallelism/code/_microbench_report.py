"""What `allreduce_microbench.py` prints and draws of its times.

Times are medians. A known link is held against lower quartiles: what other work on the machine
adds to a call, it never takes away, and it is not the link's.
"""

import argparse
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

from _microbench_model import Link, alpha_and_beta, fit_line, left_out

from distlab import predict
from distlab.display import quantity
from distlab.measure import Timing
from distlab.run import Run
from distlab.runtime import Runtime

BYTE_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}
CHECKED = (2**20, 2**24)  # bytes whose time the link alone must predict


@dataclass(frozen=True)
class Row:
    """One collective at one size; `timing` is the slowest rank's, `wrong` all ranks' together."""

    collective: str
    size: int
    count: int
    dtype: str
    timing: Timing
    wrong: int

    def busbw(self, workers: int, seconds: float | None = None) -> float:
        return predict.bus_bandwidth(
            self.collective, self.size, seconds or self.timing.median, workers
        )


def byte_size(text: str) -> int:
    """An argparse type: 4, 64K, 16M, 1G; powers of two, as in nccl-tests."""
    number = text.strip().lower().removesuffix("ib").removesuffix("b")
    unit = number[-1:] if number[-1:].isalpha() else ""
    digits = number.removesuffix(unit)
    if unit not in BYTE_UNITS or not digits.isdecimal() or int(digits) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size in bytes; use 4, 64K, 16M or 1G")
    return int(digits) * BYTE_UNITS[unit]


def report(
    run: Run, args: Namespace, job: Runtime, collective: str, rows: Sequence[Row], link: Link | None
) -> None:
    """The table, the fit, the figure and the checks of one collective."""
    sizes, seconds = [row.size for row in rows], [row.timing.median for row in rows]
    predicted: list[float | None]
    if link is None:
        held, predicted = seconds, left_out(sizes, seconds)
    else:
        held = [row.timing.q1 for row in rows]
        predicted = [link.seconds(collective, n, job.world_size, job.backend) for n in sizes]
    print_table(run, job, collective, rows, held, predicted, link)
    print_fit(run, job, collective, sizes, seconds, predicted, link)
    draw(run, job, collective, rows, predicted, link)
    run.check_equal(f"{collective}: no wrong element", sum(row.wrong for row in rows), 0)
    if link is not None and collective == "all_reduce" and job.world_size > 1:
        check_link(run, sizes, held, predicted, args.tolerance)


def print_table(
    run: Run,
    job: Runtime,
    collective: str,
    rows: Sequence[Row],
    held: Sequence[float],
    predicted: Sequence[float | None],
    link: Link | None,
) -> None:
    """Each size's times; the error is the prediction's, of what is `held` against it."""
    cells = []
    for row, taken, guess in zip(rows, held, predicted, strict=True):
        median = row.timing.median
        cells.append([
            row.size, row.count, row.dtype, 1e6 * median, row.size / median / 1e9,
            row.busbw(job.world_size) / 1e9, row.wrong, len(row.timing.samples),
            *([] if link is None else [1e6 * taken]),
            None if guess is None else 1e6 * guess,
            None if guess is None else 100 * (guess - taken) / taken,
        ])  # fmt: skip
    run.table(
        collective,
        ["size (B)", "count", "type", "time (us)", "algbw (GB/s)", "busbw (GB/s)", "#wrong",
         "calls", *([] if link is None else ["quartile (us)"]), "predicted (us)", "error (%)"],
        cells,
        caption=f"{collective}: medians of the slowest rank's times",
    )  # fmt: skip


def print_fit(
    run: Run,
    job: Runtime,
    collective: str,
    sizes: Sequence[int],
    seconds: Sequence[float],
    predicted: Sequence[float | None],
    link: Link | None,
) -> None:
    run.metric(f"{collective}_best_busbw", best_busbw(collective, sizes, seconds, job), "B/s")
    if link is not None:
        alpha, beta = link.cost
        run.print(
            f"predicted from the link: alpha = {quantity(alpha, 's')}, of which the link delays "
            f"{quantity(link.delay, 's')}, 1/beta = {quantity(1 / beta, 'B/s')} of "
            f"{quantity(link.rate, 'bit/s')}"
        )
    else:
        run.print("predicted from a line through all the other sizes")
    line = fit_line(sizes, seconds)
    if line is None or job.world_size == 1:
        why = "one rank sends nothing" if job.world_size == 1 else "it takes four sizes"
        run.print(f"fit of {collective}: none, since {why}")
        return
    run.print(
        f"fit of {collective} over {len(sizes)} sizes, {quantity(sizes[0], 'B')} to "
        f"{quantity(sizes[-1], 'B')}, ± half the 95 % interval:"
    )
    run.print(f"  {alpha_and_beta(line, collective, job.world_size, job.backend)}")
    run.extra(**{f"fit_{collective}": vars(line)})


def best_busbw(
    collective: str, sizes: Sequence[int], seconds: Sequence[float], job: Runtime
) -> float:
    return max(
        predict.bus_bandwidth(collective, n, taken, job.world_size)
        for n, taken in zip(sizes, seconds, strict=True)
    )


def draw(
    run: Run,
    job: Runtime,
    collective: str,
    rows: Sequence[Row],
    predicted: Sequence[float | None],
    link: Link | None,
) -> None:
    x = [row.size for row in rows]
    known = [
        (row.size, row.busbw(job.world_size, seconds) / 1e9)
        for row, seconds in zip(rows, predicted, strict=True)
        if seconds
    ]
    peak = [] if link is None else [{"label": "the link", "y": 1 / link.cost[1] / 1e9}]
    run.figure(
        f"{collective}_busbw", kind="line", title=f"{collective} on {job.world_size} ranks",
        x_label="size (bytes)", y_label="busbw (GB/s)", log_x=True,
        series=[
            {"label": "measured", "x": x, "y": [r.busbw(job.world_size) / 1e9 for r in rows]},
            {"label": "predicted", "x": [n for n, _ in known], "y": [y for _, y in known]},
        ],
        lines=peak,
    )  # fmt: skip


def check_link(
    run: Run,
    sizes: Sequence[int],
    seconds: Sequence[float],
    predicted: Sequence[float | None],
    tolerance: float,
) -> None:
    """The link predicts the times of 1 to 16 MiB, as far as they were measured."""
    errors = [
        abs(guess - taken) / taken
        for n, taken, guess in zip(sizes, seconds, predicted, strict=True)
        if CHECKED[0] <= n <= CHECKED[1] and guess is not None
    ]
    if errors:
        run.check_below(
            "the link's rate and delay predict the times of 1 to 16 MiB",
            100 * max(errors), 100 * tolerance, "%",
        )  # fmt: skip
