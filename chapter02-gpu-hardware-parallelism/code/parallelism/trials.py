"""Collectives on trial: results beside the library's, bytes beside formulas, a race for time."""

import argparse
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from distlab import measure
from distlab.check import quantile_interval
from distlab.measure import Timing
from distlab.ranks import digest, gathered, slowest
from distlab.run import Run
from distlab.runtime import Runtime
from parallelism.collectives import FORMULAS, PIPELINED, Wire, chunk, pipelined

Collective = Callable[[Wire, Tensor], Tensor]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTEGERS = [torch.int32, torch.int64, torch.uint8]
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def byte_count(text: str) -> int:
    """An argparse type: a size such as 4096, 64KiB or 16MiB."""
    match = re.fullmatch(r"(\d+)([KMG]?i?B)?", text)
    if match is None or (match[2] or "B") not in UNITS or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; use one such as 64KiB or 16MiB")
    return int(match[1]) * UNITS[match[2] or "B"]


@dataclass(frozen=True)
class Trial:
    """One collective on one tensor: how its result compares, and what this rank did."""

    summed: bool  # floats: judged by their rounding, everything else by its bits
    exact: bool
    rounding: float
    digest: str
    counted: tuple[int, int]  # steps, and bytes sent
    formula: tuple[int, int]


def prove(
    run: Run,
    args: Namespace,
    job: Runtime,
    collectives: Mapping[str, Collective],
    slice_bytes: int,
) -> None:
    """Every collective on every type and size, against the library and against its formula."""
    run.print(f"job: {job.world_size} rank(s), {job.backend} on {job.device.type}")
    trials = {}
    for name, collective in run.progress(collectives.items(), "collectives"):
        movable = [] if "reduce" in name else [torch.bool]
        trials[name] = [
            try_out(job, name, collective, dtype, n, slice_bytes)
            for dtype in [*FLOATS, *INTEGERS, *movable]
            for n in (0, 1, job.world_size + 1, 1003, args.bytes // dtype.itemsize)
        ]
    report_costs(run, args, {name: own[4] for name, own in trials.items()})
    for name, own in trials.items():
        check_results(run, name, own, job.world_size)
    everything = [trial for own in trials.values() for trial in own]
    run.check_equal(
        "steps and bytes of each rank equal the formulas",
        [trial.counted for trial in everything],
        [trial.formula for trial in everything],
    )
    digests = [t.digest for name, own in trials.items() if "all-reduce" in name for t in own]
    run.check_equal(
        "all ranks hold the same bits after an all-reduce", len(set(gathered(tuple(digests)))), 1
    )


def try_out(
    job: Runtime, name: str, collective: Collective, dtype: torch.dtype, n: int, slice_bytes: int
) -> Trial:
    tensor = some_values(job, dtype, n)
    summed = "reduce" in name and dtype.is_floating_point
    library = run_library(name, tensor.clone(), job)
    magnitudes = run_library(name, tensor.double().abs(), job) if summed else tensor
    wire = Wire(job)
    own = collective(wire, tensor.clone())
    formula = FORMULAS[name] if name != PIPELINED else pipelined(slice_bytes // dtype.itemsize)
    steps = formula.steps(n, job.rank, job.world_size)
    sent = dtype.itemsize * formula.elements(n, job.rank, job.world_size)
    return Trial(
        summed=summed,
        exact=own.shape == library.shape and torch.equal(own, library),
        rounding=rounding(own, library, magnitudes) if summed else 0.0,
        digest=digest([own]),
        counted=(wire.steps, wire.sent),
        formula=(steps, sent),
    )


def rounding(own: Tensor, library: Tensor, magnitudes: Tensor) -> float:
    """The largest difference of two float sums, in units of eps times the summed magnitudes."""
    if own.shape != library.shape:
        return float("inf")
    if not own.numel():
        return 0.0
    unit = (torch.finfo(own.dtype).eps * magnitudes).clamp(min=torch.finfo(torch.float64).tiny)
    return float(((own.double() - library.double()).abs() / unit).nan_to_num(nan=torch.inf).max())


def some_values(job: Runtime, dtype: torch.dtype, n: int) -> Tensor:
    """Other values on each rank."""
    generator = torch.Generator().manual_seed(1000 * n + job.rank)
    if dtype.is_floating_point:
        return torch.randn(n, generator=generator).to(dtype).to(job.device)
    highest = {torch.bool: 2, torch.uint8: 256}.get(dtype, 10**6)
    return torch.randint(highest, (n,), generator=generator).to(dtype).to(job.device)


def report_costs(run: Run, args: Namespace, largest: Mapping[str, Trial]) -> None:
    """Steps and bytes of the busiest rank, counted and by formula."""
    rows = []
    for name, trial in largest.items():
        everybody = gathered((trial.counted, trial.formula))
        steps, sent = (max(counted[i] for counted, _ in everybody) for i in (0, 1))
        by_formula = [max(formula[i] for _, formula in everybody) for i in (0, 1)]
        rows.append([name, steps, by_formula[0], sent, by_formula[1], sent / args.bytes])
    run.table(
        "costs",
        ["collective", "steps", "formula", "bytes sent", "formula", "of the tensor"],
        rows,
        caption=f"the busiest of {dist.get_world_size()} ranks, {args.bytes:,} bytes of float32; "
        "the steps of the pipelined ring's slices overlap",
    )


def check_results(run: Run, name: str, trials: Sequence[Trial], workers: int) -> None:
    """Equal bits; sums of floats may differ by the rounding of the additions in another order.

    K - 1 additions, in whatever order, err by (K - 1)·eps/2 times the sum of the magnitudes
    (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2); so two sums differ by
    twice that at most.
    """
    bits = [trial for trial in trials if not trial.summed]
    sums = [trial for trial in trials if trial.summed]
    worst = max((trial.rounding for trial in sums), default=0.0)
    told = f"{sum(trial.exact for trial in bits)} of {len(bits)} results bit for bit"
    told += f", {len(sums)} float sums to {worst:.2f} eps, tolerance {workers - 1}" if sums else ""
    equal = all(trial.exact for trial in bits) and worst <= workers - 1
    run.check_true(f"{name} equals torch.distributed's", equal, told)


def run_library(name: str, tensor: Tensor, job: Runtime) -> Tensor:
    """The library's result of the collective called `name`, on `tensor`'s device."""
    kind = name.partition(" (")[0]
    staged = job.backend == "gloo"  # not all of gloo's collectives take CUDA tensors
    return LIBRARY[kind](tensor.cpu() if staged else tensor).to(tensor.device)


def broadcast(tensor: Tensor) -> Tensor:
    dist.broadcast(tensor, src=0)
    return tensor


def reduce_scatter(tensor: Tensor) -> Tensor:
    """The library wants chunks of one size."""
    chunks = tensor.tensor_split(dist.get_world_size())
    padded = [padded_to(chunks[0].numel(), chunk) for chunk in chunks]
    own = torch.empty_like(padded[0])
    dist.reduce_scatter(own, padded)
    return own[: chunks[dist.get_rank()].numel()]


def all_gather(tensor: Tensor) -> Tensor:
    """The library wants chunks of one size."""
    chunks = tensor.tensor_split(dist.get_world_size())
    own = padded_to(chunks[0].numel(), chunks[dist.get_rank()])
    gathered = [torch.empty_like(own) for _ in chunks]
    dist.all_gather(gathered, own)
    return torch.cat([g[: c.numel()] for g, c in zip(gathered, chunks, strict=True)])


def all_to_all(tensor: Tensor) -> Tensor:
    sizes = [chunk.numel() for chunk in tensor.tensor_split(dist.get_world_size())]
    own = sizes[dist.get_rank()]
    received = tensor.new_empty(own * len(sizes))
    dist.all_to_all_single(received, tensor, [own] * len(sizes), sizes)
    return received


def all_reduce(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor)
    return tensor


def padded_to(size: int, tensor: Tensor) -> Tensor:
    return pad(tensor, (0, size - tensor.numel()))


LIBRARY = {
    "broadcast": broadcast,
    "reduce-scatter": reduce_scatter,
    "all-gather": all_gather,
    "all-to-all": all_to_all,
    "all-reduce": all_reduce,
}

TORCHS = "torch.distributed's"
SENDS_FIRST = "all-reduce (ring), sends posted first"
ROUNDS = 3  # of the duel at most, where one cannot tell if the ratio that is asked for is reached

AllReduce = Callable[[Wire, Tensor], Tensor]


def race(run: Run, args: Namespace, job: Runtime, all_reduces: Mapping[str, AllReduce]) -> None:
    """Time the all-reduces on one buffer; the pipelined ring and the library more often.

    Those two are timed in turns, so that what disturbs the machine disturbs both. All samples
    count, those of the further rounds too.
    """
    buffer = torch.zeros(max(1, args.bytes // 4), device=job.device)
    calls: dict[str, Callable[[], object]] = {TORCHS: partial(dist.all_reduce, buffer)}
    calls |= {name: partial(one, Wire(job), buffer) for name, one in all_reduces.items()}
    sends_first = Wire(job, receive_first=False)
    calls[SENDS_FIRST] = partial(all_reduces["all-reduce (ring)"], sends_first, buffer)
    duel = {name: calls.pop(name) for name in (TORCHS, PIPELINED)}

    run.print(f"job: {job.world_size} rank(s), {job.backend} on {job.device.type}")
    timings = of_slowest(measure.compare(duel, 1, args.repeats, job.device))
    for _ in range(ROUNDS - 1):
        if args.min_ratio is None or can_tell(timings, args.min_ratio):
            break
        more = of_slowest(measure.compare(duel, 0, args.repeats, job.device))
        timings = {name: Timing(own.samples + more[name].samples) for name, own in timings.items()}
    timings |= of_slowest(measure.compare(calls, 1, max(3, args.repeats // 2), job.device))

    seconds = {name: own.median for name, own in timings.items()}
    report_times(run, args, job, seconds)
    run.metric("pipelined_ring_against_library", ratio(timings), "", "ratio of medians, 1 is equal")
    if args.min_ratio is not None:
        run.check_within(
            "the pipelined ring keeps up with the library",
            timings[TORCHS].ratios(timings[PIPELINED]),
            at_least=args.min_ratio,
            any_size=True,
        )


def of_slowest(timings: Mapping[str, Timing]) -> dict[str, Timing]:
    """The seconds of each repeat on the rank that took longest: the same numbers on all ranks."""
    return {name: slowest(timing) for name, timing in timings.items()}


def can_tell(timings: Mapping[str, Timing], min_ratio: float) -> bool:
    """Whether the pipelined ring surely reaches the ratio, or surely does not."""
    low, high = quantile_interval(timings[TORCHS].ratios(timings[PIPELINED]))
    return low >= min_ratio or high < min_ratio


def ratio(timings: Mapping[str, Timing]) -> float:
    return timings[TORCHS].median / timings[PIPELINED].median


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
        rows.append([name, 1e3 * measured, predicted, seconds[TORCHS] / measured])
    run.table(
        "race",
        ["all-reduce", "ms", "predicted ms", "times the library's speed"],
        rows,
        caption=f"{args.bytes:,} bytes over {job.world_size} ranks, medians of the slowest rank",
    )


def latency(job: Runtime) -> float:
    """Seconds of a step that carries one number, median; 0 for a rank alone."""
    if job.world_size == 1:
        return 0.0
    wire, (own, other) = Wire(job), torch.zeros(2, 1, device=job.device)
    step = partial(wire.exchange, send=(own, wire.right), receive=(other, wire.left))
    return slowest(measure.measure(step, 3, 20, job.device)).median


RECORD_BYTES, VALUE_BYTES, SIZE_BYTES = 8, 4, 8  # index and value, value, one partition's size
TOLERANCE = 1e-5  # float32: the same terms, added in another order


def report_words(
    run: Run,
    form: str,
    counts: Counter[str],
    expected: Counter[str],
    arrived: int,
    emitted: int,
    sent: int,
) -> None:
    """This rank's `counts` of the words that hash to it; records in, bytes emitted and sent."""
    everybody = gathered((counts, arrived, emitted, sent))
    workers = len(everybody)
    found = [count for counts, *_ in everybody for count in counts.items()]
    loads = [arrived for _, arrived, *_ in everybody]
    all_emitted = sum(emitted for *_, emitted, _ in everybody)
    all_sent = sum(sent for *_, sent in everybody)
    run.print(f"\nword count, {form}")
    run.metric(f"records_{form.replace(' ', '_')}", sum(loads), "", "into the shuffle")
    run.metric(
        f"busiest_reducer_{form.replace(' ', '_')}", max(loads) * workers / sum(loads), "",
        "times the mean number of records",
    )  # fmt: skip
    sizes = workers * (workers - 1) * SIZE_BYTES
    predicted = (workers - 1) / workers * all_emitted + sizes
    run.compare(f"bytes sent, {form}", predicted, all_sent, "B")
    run.check_equal("every word has one reducer", len(found), len(expected))
    run.check_equal("counts equal one process's", dict(found), dict(expected))


def report_gradients(
    run: Run,
    job: Runtime,
    combined: Tensor,
    one_process: Tensor,
    own_examples: int,
    sums: Mapping[str, np.ndarray],
    everywhere: Mapping[str, Tensor],
    sent: Mapping[str, int],
) -> None:
    """`sums` are this rank's chunk, `everywhere` the whole gradient; `sent` the bytes, by form."""
    run.print(f"\ngradient sum, {combined.numel():,} parameters")
    library = combined.clone()
    dist.all_reduce(library)
    own_chunk = one_process.tensor_split(job.world_size)[job.rank]
    for form, chunk_sum in sums.items():
        run.check_close(
            f"{form}: this rank's chunk equals one process's", chunk_sum, own_chunk,
            TOLERANCE, relative=True,
        )  # fmt: skip
    for form, whole in everywhere.items():
        run.check_close(
            f"{form} equals torch.distributed's all-reduce", whole, library,
            TOLERANCE, relative=True,
        )  # fmt: skip
        run.check_close(f"{form} equals one process", whole, one_process, TOLERANCE, relative=True)
    expected = formulas(combined.numel(), job.rank, job.world_size, own_examples)
    counted, predicted = totals(sent, job), totals(expected, job)
    ring = max(1, predicted["ring all-reduce"])
    rows = [[form, n, predicted[form], n / ring] for form, n in counted.items()]
    run.table(
        "bytes", ["gradient sum", "bytes sent", "formula", "of a ring's"], rows,
        caption=f"all {job.world_size} ranks together",
    )  # fmt: skip
    run.check_equal("each rank's bytes equal the formulas", dict(sent), expected)


def formulas(n: int, rank: int, workers: int, own_examples: int) -> dict[str, int]:
    """Bytes that a rank sends: all that it emits but its own chunk, and its partitions' sizes."""
    leaving = n - chunk(n, rank, workers)
    sizes = (workers - 1) * SIZE_BYTES
    return {
        "every example": own_examples * leaving * RECORD_BYTES + sizes,
        "combined": leaving * RECORD_BYTES + sizes,
        "without keys": leaving * VALUE_BYTES + sizes,
        "all-gather": FORMULAS["all-gather (ring)"].elements(n, rank, workers) * VALUE_BYTES,
        "ring all-reduce": FORMULAS["all-reduce (ring)"].elements(n, rank, workers) * VALUE_BYTES,
    }


def totals(sent: Mapping[str, int], job: Runtime) -> dict[str, int]:
    """The sums over the ranks."""
    counts = torch.tensor(list(sent.values()), device=job.device)
    dist.all_reduce(counts)
    return dict(zip(sent, counts.tolist(), strict=True))
