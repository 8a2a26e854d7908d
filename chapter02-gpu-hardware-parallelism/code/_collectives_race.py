"""The all-reduces of `collectives_from_scratch.py` against the library's, side by side."""

from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.distributed as dist
from _collectives_formulas import FORMULAS, PIPELINED
from _collectives_wire import Wire
from torch import Tensor

from distlab import measure
from distlab.run import Run
from distlab.runtime import Runtime

LIBRARY = "torch.distributed's"
SENDS_FIRST = "all-reduce (ring), sends posted first"
ROUNDS = 3  # of the duel, where one does not reach the ratio that is asked for

AllReduce = Callable[[Wire, Tensor], Tensor]


def race(run: Run, args: Namespace, job: Runtime, all_reduces: Mapping[str, AllReduce]) -> None:
    """Time the all-reduces on one buffer; the pipelined ring and the library more often.

    Those two are timed in turns, so that what disturbs the machine disturbs both. All samples
    count, those of the further rounds too.
    """
    buffer = torch.zeros(max(1, args.bytes // 4), device=job.device)
    calls: dict[str, Callable[[], object]] = {LIBRARY: partial(dist.all_reduce, buffer)}
    calls |= {name: partial(one, Wire(job), buffer) for name, one in all_reduces.items()}
    sends_first = Wire(job, receive_first=False)
    calls[SENDS_FIRST] = partial(all_reduces["all-reduce (ring)"], sends_first, buffer)
    duel = {name: calls.pop(name) for name in (LIBRARY, PIPELINED)}

    run.print(f"job: {job.world_size} rank(s), {job.backend} on {job.device.type}")
    samples = slowest_rank(measure.compare(duel, 1, args.repeats, job.device), job)
    for _ in range(ROUNDS - 1):
        if args.min_ratio is None or ratio(samples) >= args.min_ratio:
            break
        more = slowest_rank(measure.compare(duel, 0, args.repeats, job.device), job)
        samples = {name: torch.cat([own, more[name]]) for name, own in samples.items()}
    samples |= slowest_rank(measure.compare(calls, 1, max(3, args.repeats // 2), job.device), job)

    seconds = {name: median(own) for name, own in samples.items()}
    report_times(run, args, job, seconds)
    run.metric("pipelined_ring_against_library", ratio(samples), "", "ratio of medians, 1 is equal")
    if args.min_ratio is not None:
        run.check_above(
            "the pipelined ring keeps up with the library", ratio(samples), args.min_ratio
        )


def slowest_rank(timings: Mapping[str, measure.Timing], job: Runtime) -> dict[str, Tensor]:
    """The seconds of each repeat on the rank that took longest: the same numbers on all ranks."""
    samples = torch.tensor([own.samples for own in timings.values()], dtype=torch.float64)
    samples = samples.to(job.device)
    dist.all_reduce(samples, dist.ReduceOp.MAX)
    return dict(zip(timings, samples.cpu(), strict=True))


def ratio(samples: Mapping[str, Tensor]) -> float:
    return median(samples[LIBRARY]) / median(samples[PIPELINED])


def median(samples: Tensor) -> float:
    return float(samples.quantile(0.5))


def report_times(run: Run, args: Namespace, job: Runtime, seconds: Mapping[str, float]) -> None:
    """Medians beside the alpha-beta prediction, where the link's bandwidth is given."""
    alpha = latency(job)
    run.metric("step_latency", alpha, "s", "alpha: one number to the right, one from the left")
    rows = []
    for name, measured in seconds.items():
        formula = FORMULAS.get(name, FORMULAS["all-reduce (ring)"])
        predicted = None
        if args.link_gbit is not None and name != SENDS_FIRST:
            beta = 8 / (args.link_gbit * 1e9)
            predicted = 1e3 * formula.seconds(args.bytes, job.world_size, alpha, beta)
        rows.append([name, 1e3 * measured, predicted, seconds[LIBRARY] / measured])
    run.table(
        "race",
        ["all-reduce", "ms", "predicted ms", "library / it"],
        rows,
        caption=f"{args.bytes:,} bytes over {job.world_size} ranks, medians of the slowest rank",
    )


def latency(job: Runtime) -> float:
    """Seconds of a step that carries one number, median; 0 for a rank alone."""
    if job.world_size == 1:
        return 0.0
    wire, (own, other) = Wire(job), torch.zeros(2, 1, device=job.device)
    step = partial(wire.exchange, send=(own, wire.right), receive=(other, wire.left))
    timings = measure.compare({"step": step}, 3, 20, job.device)
    return median(slowest_rank(timings, job)["step"])
