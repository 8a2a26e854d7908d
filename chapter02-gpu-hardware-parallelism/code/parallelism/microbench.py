"""What the microbenchmark calls, verifies and reports; and Ctrl-C as a request to stop.

The data are small whole numbers, so that every dtype adds them without rounding, in any order. An
element's value follows from its rank and its index alone; so each rank knows the right result
without any communication.

Times are medians. A known link is held against lower quartiles: what other work on the machine
adds to a call, it never takes away, and it is not the link's.
"""

import argparse
import signal
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from distlab import predict
from distlab.display import quantity
from distlab.errors import UsageError
from distlab.measure import Timing
from distlab.run import Run
from distlab.runtime import Runtime
from parallelism.links import Link, alpha_and_beta, fit_line, left_out

# Whole numbers up to which each dtype is exact.
EXACT = {
    "float32": 2**24, "float64": 2**53, "float16": 2**11, "bfloat16": 2**8,
    "int32": 2**31 - 1, "int64": 2**63 - 1,
}  # fmt: skip
# torch 2.13's names, else the earlier ones
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Case:
    """One collective at one size. `size` and `count` as nccl-tests has them: bytes of the larger of
    the buffers that go in and come out, and elements of one rank's share of the call."""

    size: int
    count: int
    call: Callable[[], object]
    output: Tensor
    expected: Callable[[], Tensor]

    def wrong(self) -> int:
        """Call once, and count the elements that are not what they must be."""
        self.call()
        return int((self.output != self.expected()).sum())


def make_case(collective: str, size: int, dtype: str, job: Runtime) -> Case:
    """Buffers of about `size` bytes: a whole number of elements for each rank, at least one."""
    kind = getattr(torch, dtype)
    shared = collective in ("all_gather", "reduce_scatter", "all_to_all")
    shares = job.world_size if shared else 1
    count = max(1, size // (kind.itemsize * shares))
    pattern = Pattern(kind, job)
    call, output, expected = _MAKERS[collective](count, pattern, job)
    return Case(count * shares * kind.itemsize, count, call, output, expected)


class Pattern:
    """Element i of rank r is (i + 3·r) mod m; m keeps the sum over the ranks exact."""

    def __init__(self, dtype: torch.dtype, job: Runtime) -> None:
        name = str(dtype).removeprefix("torch.")
        self.modulus = min(251, EXACT[name] // job.world_size)
        if self.modulus < 2:
            raise UsageError(
                f"--dtype {name} does not add {job.world_size} ranks' numbers without rounding, so "
                "nothing could be verified; use float32"
            )
        self.dtype, self.device, self.world_size = dtype, job.device, job.world_size

    def of(self, rank: int, count: int, begin: int = 0) -> Tensor:
        """Elements `begin` to `begin + count` of this rank's data."""
        index = torch.arange(begin, begin + count, device=self.device)
        return ((index + 3 * rank) % self.modulus).to(self.dtype)

    def summed(self, count: int, begin: int = 0) -> Tensor:
        """The sum over all ranks."""
        index = torch.arange(begin, begin + count, device=self.device)
        total = torch.zeros_like(index)
        for rank in range(self.world_size):
            total += (index + 3 * rank) % self.modulus
        return total.to(self.dtype)


Made = tuple[Callable[[], object], Tensor, Callable[[], Tensor]]


def _all_reduce(count: int, pattern: Pattern, job: Runtime) -> Made:
    buffer = pattern.of(job.rank, count)
    return lambda: dist.all_reduce(buffer), buffer, lambda: pattern.summed(count)


def _all_gather(count: int, pattern: Pattern, job: Runtime) -> Made:
    own = pattern.of(job.rank, count)
    gathered = own.new_zeros(count * job.world_size)

    def expected() -> Tensor:
        return torch.cat([pattern.of(rank, count) for rank in range(job.world_size)])

    return lambda: _all_gather_single(gathered, own), gathered, expected


def _reduce_scatter(count: int, pattern: Pattern, job: Runtime) -> Made:
    whole = pattern.of(job.rank, count * job.world_size)
    share = whole.new_zeros(count)
    return (
        lambda: _reduce_scatter_single(share, whole),
        share,
        lambda: pattern.summed(count, job.rank * count),
    )


def _all_to_all(count: int, pattern: Pattern, job: Runtime) -> Made:
    outgoing = pattern.of(job.rank, count * job.world_size)
    incoming = torch.zeros_like(outgoing)

    def expected() -> Tensor:
        begin = job.rank * count
        return torch.cat([pattern.of(rank, count, begin) for rank in range(job.world_size)])

    return lambda: dist.all_to_all_single(incoming, outgoing), incoming, expected


def _broadcast(count: int, pattern: Pattern, job: Runtime) -> Made:
    buffer = pattern.of(job.rank, count)
    return lambda: dist.broadcast(buffer, 0), buffer, lambda: pattern.of(0, count)


def _reduce(count: int, pattern: Pattern, job: Runtime) -> Made:
    """Only rank 0's buffer is defined afterwards, so the others show a copy of what is right."""
    buffer = pattern.of(job.rank, count)
    output = buffer if job.is_main else pattern.summed(count)
    return lambda: dist.reduce(buffer, 0), output, lambda: pattern.summed(count)


def _sendrecv(count: int, pattern: Pattern, job: Runtime) -> Made:
    """A ring, as in nccl-tests: every rank sends to the next and receives from the one before.

    gloo sends from host memory only, so on a GPU the copies there and back are part of the call.
    """
    to, source = (job.rank + 1) % job.world_size, (job.rank - 1) % job.world_size
    outgoing = pattern.of(job.rank, count)
    incoming = torch.zeros_like(outgoing)
    staged = job.backend == "gloo" and job.device.type == "cuda"
    host = torch.zeros_like(incoming, device="cpu") if staged else incoming

    def call() -> None:
        if job.world_size == 1:
            incoming.copy_(outgoing)
            return
        sent = outgoing.cpu() if staged else outgoing
        operations = [dist.P2POp(dist.isend, sent, to), dist.P2POp(dist.irecv, host, source)]
        for request in dist.batch_isend_irecv(operations):
            request.wait()
        if staged:
            incoming.copy_(host)

    return call, incoming, lambda: pattern.of(source, count)


_MAKERS = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "broadcast": _broadcast,
    "reduce": _reduce,
    "all_to_all": _all_to_all,
    "sendrecv": _sendrecv,
}
COLLECTIVES = tuple(_MAKERS)

SAME_PRESS_S = 1.0  # a terminal and torchrun each send a SIGINT for one Ctrl-C


class Interrupt:
    """Within the block, the first Ctrl-C only sets `requested`; one that comes later ends at once.

    A rank that died in the middle of a collective would leave the others with an error instead of
    their results.
    """

    def __enter__(self) -> Self:
        self.requested = False
        self._first = 0.0
        self._previous: Any = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def agreed(self, job: Runtime) -> bool:
        """Whether any rank was asked to stop; the same on all of them, so all must call it."""
        flag = torch.tensor(int(self.requested), device=job.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested and now - self._first > SAME_PRESS_S:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self._first = True, now


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
        check_link(run, rows, predicted, args.tolerance)


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
        x_label="size (bytes)", y_label="bus bandwidth (GB/s)", log_x=True,
        series=[
            {"label": "measured", "x": x, "y": [r.busbw(job.world_size) / 1e9 for r in rows]},
            {"label": "predicted", "x": [n for n, _ in known], "y": [y for _, y in known]},
        ],
        lines=peak,
    )  # fmt: skip


def check_link(
    run: Run, rows: Sequence[Row], predicted: Sequence[float | None], tolerance: float | None
) -> None:
    """The link predicts the times of 1 to 16 MiB, as far as they were measured.

    It is held against the lower quartile of the times, and the error falls as the time grows: so
    it is the errors' upper quartile.
    """
    errors = {
        f"{row.size / 2**20:g} MiB": [100 * (guess - taken) / taken for taken in row.timing.samples]
        for row, guess in zip(rows, predicted, strict=True)
        if CHECKED[0] <= row.size <= CHECKED[1] and guess is not None
    }
    if errors and tolerance is not None:
        run.check_within(
            "the link's rate and delay predict the times of 1 to 16 MiB",
            errors, 100 * tolerance, -100 * tolerance, "%", "--repeats and --seconds",
            quantile=0.75, any_size=True,
        )  # fmt: skip
