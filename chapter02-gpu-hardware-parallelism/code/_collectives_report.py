"""The proof of `collectives_from_scratch.py`: results beside the library's, counts by formula."""

import argparse
import hashlib
import re
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from _collectives_formulas import FORMULAS, PIPELINED, pipelined
from _collectives_library import run_library
from _collectives_wire import Wire
from torch import Tensor

from distlab.run import Run
from distlab.runtime import Runtime

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
    digest: bytes
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
    run.check_equal("all ranks hold the same bits after an all-reduce", distinct(digests), 1)


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
        digest=hashlib.sha256(own.cpu().view(torch.uint8).numpy().tobytes()).digest(),
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
        everybody: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, (trial.counted, trial.formula))
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


def distinct(digests: Sequence[bytes]) -> int:
    """How many different lists of results the ranks hold."""
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, list(digests))
    return len({b"".join(own) for own in everybody})
