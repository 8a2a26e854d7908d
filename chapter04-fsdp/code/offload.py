"""Offload: what a step does not need at the moment lies elsewhere, in CPU memory or on disk.

A rank needs one unit's weights at a time, and of gradients and optimizer state nothing until the
optimizer's step. Kept in CPU memory (FSDP2's CPUOffloadPolicy) they free a GPU's memory, and the
optimizer steps on the CPU. Without a GPU all memory is CPU memory: the policy then changes nothing,
and all that can be shown is that the numbers are equal. Kept on disk, in memory-mapped files
(`fsdp.disk`), they free memory everywhere, if the kernel's page cache does not keep the files in
memory after all: so each unit is flushed and dropped after use, and where one can be made the ranks
run in a control group that counts the page cache too, and is too small for the state.

Run:
    torchrun --nproc_per_node=2 chapter04-fsdp/code/offload.py --folder build/offload
    torchrun --nproc_per_node=2 chapter04-fsdp/code/offload.py --folder build/offload --bound drop

You should see: the same losses in all three, bit for bit; 16 bytes of each parameter gone from
memory to disk; bytes read and written as predicted, and a step that takes the time that the disk
needs for them.

Source: Rajbhandari et al., "ZeRO-Infinity" (arXiv 2104.07857), sections 3 and 5.
"""

import math
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from distlab import host, predict, runtime, script
from distlab.display import quantity, side_by_side
from distlab.errors import UsageError
from distlab.model import Llama, add_model_flags, config_from_args, model_from_args
from distlab.ranks import digest, gathered
from distlab.run import Run
from distlab.runtime import Runtime
from distlab.training.cgroup import Group, bounded_memory
from distlab.training.memory import bytes_of, give_back_at_once
from fsdp.disk import OnDisk, disk_rates, put_on_disk

PRESETS: dict[str, dict[str, object]] = {
    "smoke": {"model": "smoke", "batch_size": 2, "seq_len": 32, "steps": 2, "bound_mb": 64.0},
    "laptop": {"model": "laptop", "layers": 12, "hidden_size": 384, "batch_size": 1, "seq_len": 64,
               "steps": 3, "bound_mb": 120.0},
    "gpu": {"model": "gpu", "batch_size": 4, "seq_len": 1024, "steps": 4, "bound_mb": 2000.0},
}  # fmt: skip
PLACES = ("memory", "cpu", "disk")
TOLERANCE = 0.1  # of predicted bytes
LARGE = 8 * 10**6  # bytes, of which a disk's rate can be measured
COLUMNS = (
    "state in", "device, MB", "CPU memory, MB", "disk, MB", "read a step, MB",
    "written a step, MB", "step predicted, ms", "step measured, ms", "error, %", "last loss",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with (
        script.run(args) as run,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        run.print(f"job: {job.world_size} rank(s), {job.backend} on {job.device.type}")
        compare_places(run, args, job)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    runtime.add_runtime_flags(parser)
    add = parser.add_argument
    add("--folder", type=Path, default=Path("build/offload"), help="on the disk to use")
    add("--bound", choices=["auto", "group", "drop"], default="auto",
        help="of the page cache: a control group if one can be made (auto)")  # fmt: skip
    add("--bound-mb", type=script.positive_float, metavar="MB",
        help="that the group lets a rank use beyond what it holds, 10^6 bytes")  # fmt: skip
    add("--batch-size", type=script.positive_int, help="of a rank, sequences")
    add("--seq-len", type=script.positive_int, help="tokens")
    add("--steps", type=script.positive_int, help="the first one is not measured")
    args = parser.parse_args(argv)
    if args.steps < 2:
        raise UsageError("--steps 1 leaves nothing to measure after the first; use 2 or more")
    return args


@dataclass
class Outcome:
    """What training with the state in one place did: bytes of this rank, seconds of a step."""

    losses: list[float]
    weights: str  # digest of the shards after training
    held: int  # bytes of weights, gradients and moments
    seconds: float
    read: float  # a step, from the disk, as /proc/self/io has it
    written: float
    cached: int = 0  # bytes of the files in the page cache after the last step
    expected: tuple[float, float] = (0.0, 0.0)  # bytes that a step should read and write
    rates: tuple[float, float] = (1.0, 1.0)  # of the disk: bytes a second, read and written
    peak: int | None = None  # of the control group, if there was one


def compare_places(run: Run, args: Namespace, job: Runtime) -> None:
    refuse_small_bound(args, job)
    give_back_at_once()  # else the group is charged with what glibc keeps
    outcomes = {place: train(args, job, place) for place in PLACES}
    report(run, args, job, outcomes)


def train(args: Namespace, job: Runtime, place: str) -> Outcome:
    """The same steps from the same seed, with the state in `place`."""
    runtime.seed_everything(args.seed)
    model = model_from_args(args, job.device)
    shard(model, place)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    if place != "disk":
        return steps(args, job, model, optimizer)
    with bound(args) as group, put_on_disk(model, optimizer, args.folder) as files:
        outcome = steps(args, job, model, optimizer, files)
        rates = disk_rates(args.folder, max(LARGE, files.bytes // 8))
        peak = group.peak() if group else None
    return replace(outcome, expected=files.traffic(), rates=rates, peak=peak)


def shard(model: Llama, place: str) -> None:
    """`fully_shard`; but for "memory" its shards, and so the optimizer's step, are on the CPU."""
    policy = OffloadPolicy() if place == "memory" else CPUOffloadPolicy(pin_memory=False)
    for layer in model.model.layers:
        fully_shard(layer, offload_policy=policy)
    fully_shard(model, offload_policy=policy)


@contextmanager
def bound(args: Namespace) -> Iterator[Group | None]:
    """A control group for this rank, where all ranks can have one and it is wanted."""
    wanted = args.bound != "drop"
    with bounded_memory(round(args.bound_mb * 1e6)) if wanted else nullcontext() as group:
        everyone = all(gathered(group is not None))
        if args.bound == "group" and not everyone:
            raise UsageError(
                "--bound group: this process may make no control group; use --bound drop"
            )
        yield group if everyone else None


def steps(
    args: Namespace,
    job: Runtime,
    model: Llama,
    optimizer: torch.optim.Optimizer,
    files: OnDisk | None = None,
) -> Outcome:
    """Train; what a step took, the first one left out."""
    draw = torch.Generator().manual_seed(args.seed + job.rank)
    size = (args.batch_size, args.seq_len + 1)
    losses, marks, held = [], [], 0
    for _ in range(args.steps):
        marks.append(mark(job))
        tokens = torch.randint(model.config.vocab_size, size, generator=draw).to(job.device)
        loss = model(tokens[:, :-1], targets=tokens[:, 1:])
        loss.backward()
        (files or optimizer).step()
        held = sum(count() for count in bytes_of(model, optimizer).values())
        optimizer.zero_grad()
        losses.append(loss.item())
    marks.append(mark(job))
    cached = files.cached() if files else 0
    average = (np.array(marks[-1]) - np.array(marks[1])) / (args.steps - 1)
    shards = [p.to_local() for p in model.parameters() if isinstance(p, DTensor)]
    seconds, read, written = average.tolist()
    return Outcome(losses, digest(shards), held, seconds, read, written, cached)


def mark(job: Runtime) -> tuple[float, int, int]:
    """Now, when all ranks are here; bytes that this process has read from disks, and written."""
    job.synchronize()
    job.barrier()
    told = dict(line.split(": ") for line in host.read("/proc/self/io").splitlines())
    return time.perf_counter(), int(told["read_bytes"]), int(told["write_bytes"])


def refuse_small_bound(args: Namespace, job: Runtime) -> None:
    """What a rank needs beside its state: gathered units, whole gradients, activations."""
    with torch.device("meta"):
        model = Llama(config_from_args(args))
    layer = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    root = sum(p.nbytes for p in model.parameters()) - len(model.model.layers) * layer
    activations = predict.peak_activations(
        model.config.architecture, "fp32", args.seq_len, args.batch_size
    )
    needed = 1.25 * (2 * root + 6 * layer + activations)  # what libraries take for themselves
    if args.bound != "drop" and job.device.type == "cpu" and needed > args.bound_mb * 1e6:
        raise UsageError(
            f"--bound-mb {args.bound_mb:g} is too small: units, gradients and activations alone "
            f"take {quantity(needed, 'B')}; use --bound-mb {math.ceil(needed / 1e6)}"
        )


def report(run: Run, args: Namespace, job: Runtime, outcomes: dict[str, Outcome]) -> None:
    memory, disk = outcomes["memory"], outcomes["disk"]
    how = f"a control group of {args.bound_mb:g} MB" if disk.peak else "dropping alone"
    waiting = sum(size / rate for size, rate in zip(disk.expected, disk.rates, strict=True))
    predicted = {"memory": None, "cpu": None, "disk": memory.seconds + waiting}
    rows = [
        [place, *places(one, place, job), one.read / 1e6, one.written / 1e6,
         *side_by_side(predicted[place], one.seconds, 1e3), one.losses[-1]]
        for place, one in outcomes.items()
    ]  # fmt: skip
    run.table("places", COLUMNS, rows, f"bytes of rank 0; the page cache bounded by {how}")
    run.metric("disk_reads", disk.rates[0], "B/s", "mapped, this folder, all ranks at once")
    run.metric("disk_writes", disk.rates[1], "B/s")
    same = {place: (one.losses, one.weights) for place, one in outcomes.items()}
    run.check_equal("losses and weights are memory's", same, dict.fromkeys(same, same["memory"]))
    check_traffic(run, args, disk)


def places(one: Outcome, place: str, job: Runtime) -> tuple[float, float, float]:
    """MB of state on the device, in CPU memory besides, and on disk."""
    on_device = place == "memory" and job.device.type == "cuda"
    own = one.held / 1e6
    if place == "disk":
        return 0.0, one.cached / 1e6, own
    return (own, 0.0, 0.0) if on_device else (0.0, own, 0.0)


def check_traffic(run: Run, args: Namespace, disk: Outcome) -> None:
    """The files were really used, and not kept in memory."""
    if disk.peak is not None:
        run.check_below("peak of the control group", disk.peak / 1e6, args.bound_mb, "MB")
    run.check_equal("bytes of the files that stay in the page cache", disk.cached, 0)
    if args.preset != "smoke":  # there a part is smaller than what the kernel reads at a time
        moved = np.array([disk.read, disk.written])
        run.check_close(
            "read and written", moved, np.array(disk.expected), TOLERANCE, relative=True
        )


if __name__ == "__main__":
    script.exit(main)
