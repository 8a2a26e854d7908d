"""Offload: the optimizer's state in CPU memory, or on a disk; what it costs, and if it is there.

On a GPU, `offload_optimizer` frees 12 of a parameter's 16 bytes, and the step is done by
DeepSpeed's own Adam on the CPU, which is timed here beside torch's. With `"device": "nvme"` that
state lies in files: each rank reads a group of parameters, updates it, and writes it back. A model
too small writes no file and says nothing, so the files are counted.

Run:
    torchrun --nproc_per_node=2 chapter05-deepspeed-zero/code/offload_deepspeed.py

You should see: the same losses wherever the state is; swap files of 12 bytes for each of a rank's
parameters, and as much read and written in a step, which takes the disk's time longer; and
DeepSpeed's Adam beside torch's, both bound by memory.
"""

import shutil
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distlab import host, runtime, script
from distlab.display import side_by_side
from distlab.errors import UsageError
from distlab.files import refuse_unwritable_folder
from distlab.hardware import measured_bandwidth
from distlab.measure import compare
from distlab.model import add_model_flags, config_from_args, num_parameters
from distlab.ranks import gathered, slowest
from distlab.run import Run
from distlab.runtime import Runtime
from zero import engine, operators

PRESETS: dict[str, dict[str, object]] = {
    "smoke": {"model": "smoke", "hidden_size": 128, "layers": 4, "batch_size": 1, "seq_len": 16,
              "steps": 2, "numbers": 100_000, "repeats": 3},
    "laptop": {"model": "laptop", "hidden_size": 384, "layers": 8, "batch_size": 1, "seq_len": 64,
               "steps": 4, "numbers": 10_000_000, "repeats": 15},
    "gpu": {"model": "gpu", "batch_size": 4, "seq_len": 1024, "steps": 4,
            "numbers": 100_000_000, "repeats": 15},
}  # fmt: skip
GROUP = 1_000_000  # numbers that are updated at once; DeepSpeed swaps no group below 1 MiB
FLOAT = 4
MOVED = 7 * FLOAT  # bytes of a number in Adam's step: four are read, three written
STATE = 3 * FLOAT  # of a number: the float32 weights and two moments
EPSILON = 1e-4  # as large as gradients: else Adam divides rounding by its own size
SAME = 1e-5  # nats, or of a weight: CPUAdam divides in another order than torch's
TRAFFIC = 0.1  # of the predicted bytes
LARGE = 16 * 2**20  # bytes by which a disk's rate is measured
AIO = {"block_size": 2**20, "queue_depth": 8, "single_submit": False, "overlap_events": True}
PLACES = ("memory", "cpu", "nvme")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with (
        script.run(args) as run,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        run.print(f"job: {job.world_size} rank(s), {job.backend} on {job.device.type}")
        engine.load()
        if job.device.type == "cpu":
            names = (operators.CPU_ADAM, operators.PINNED, operators.ASYNC_IO)
            operators.use(*names, flag="offload_deepspeed.py")
        compare_adams(run, args, job)
        compare_places(run, args, job)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    runtime.add_runtime_flags(parser)
    add = parser.add_argument
    add("--folder", type=Path, default=Path("build/nvme"), help="on the disk to use")
    add("--batch-size", type=script.positive_int, help="of a rank, sequences")
    add("--seq-len", type=script.positive_int, help="tokens")
    add("--steps", type=script.positive_int, help="the first one is not measured")
    add("--numbers", type=script.positive_int, help="in the comparison of optimizers")
    add("--repeats", type=script.positive_int, help="timed steps of each optimizer")
    args = parser.parse_args(argv)
    script.refuse_no_median(args, "repeats")
    if args.steps < 2:
        raise UsageError("--steps 1 leaves nothing to measure after the first; use 2 or more")
    refuse_unwritable_folder("--folder", args.folder)
    return args


def compare_adams(run: Run, args: Namespace, job: Runtime) -> None:
    """Every rank at once, as in a step; predicted from this machine's memory bandwidth."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    kinds: dict[str, Any] = {
        "DeepSpeed's CPUAdam": DeepSpeedCPUAdam,
        "torch's, fused": partial(torch.optim.AdamW, fused=True),
        "torch's, foreach": partial(torch.optim.AdamW, foreach=True),
    }
    parameters = {name: nn.Parameter(torch.ones(args.numbers)) for name in kinds}
    steps = {}
    for name, kind in kinds.items():
        generator = torch.Generator().manual_seed(args.seed)
        parameters[name].grad = torch.randn(args.numbers, generator=generator)
        steps[name] = kind([parameters[name]], lr=1e-3, weight_decay=0.01).step
    timings = compare(steps, 2, args.repeats, before=job.barrier)
    job.barrier()
    predicted = MOVED * args.numbers / measured_bandwidth(torch.device("cpu"))
    rows: list[list[Any]] = []
    for name, timing in timings.items():
        median = slowest(timing).median
        rows.append(
            [name, *side_by_side(predicted, median, 1e3), MOVED * args.numbers / median / 1e9]
        )
    run.table(
        "adams", ["AdamW", "step predicted, ms", "step measured, ms", "error, %", "GB/s"], rows,
        caption=f"{args.numbers:,} numbers on each of {job.world_size} rank(s) at once; predicted: "
        "28 bytes for each, at the memory's bandwidth, measured by all ranks at once",
    )  # fmt: skip
    first, *others = (p.detach() for p in parameters.values())
    worst = max((first - other).abs().max().item() for other in others)
    run.check_below("all three have the same weights", worst, SAME)


@dataclass
class Outcome:
    losses: list[float]
    seconds: float  # of a step, the first left out, as those that follow
    read: float  # bytes from the disk, of this rank, as /proc/self/io has it
    written: float
    files: int  # bytes of this rank's swap files
    kept: int  # bytes of master weights and moments in memory between steps


def compare_places(run: Run, args: Namespace, job: Runtime) -> None:
    outcomes = {}
    for place in PLACES:
        with folder(args, job) as swapped:
            outcomes[place] = train(args, job, place, swapped)
            rates = disk_rates(swapped, job) if place == "nvme" else (1.0, 1.0)
    own = num_parameters(config_from_args(args)) / job.world_size
    report(run, job, outcomes, STATE * own, rates)


@contextmanager
def folder(args: Namespace, job: Runtime) -> Iterator[Path]:
    """An empty one for all ranks of this node; gone at the end."""
    if job.local_rank == 0:
        shutil.rmtree(args.folder, ignore_errors=True)
        args.folder.mkdir(parents=True)
    job.barrier()
    try:
        yield args.folder
    finally:
        if job.local_rank == 0:
            shutil.rmtree(args.folder, ignore_errors=True)


def config_of(args: Namespace, place: str, swapped: Path) -> dict[str, Any]:
    zero: dict[str, Any] = {"sub_group_size": GROUP, "stage3_param_persistence_threshold": 0}
    if place != "memory":
        zero["offload_optimizer"] = {"device": place, "pin_memory": False}
    if place == "nvme":
        zero["offload_optimizer"]["nvme_path"] = str(swapped)
    config = engine.stage_config(3, args.batch_size, **zero)
    config["optimizer"]["params"] |= {"torch_adam": place == "memory", "eps": EPSILON}
    return {**config, "aio": AIO}


def train(args: Namespace, job: Runtime, place: str, swapped: Path) -> Outcome:
    """The same steps from the same seed, with the optimizer's state in `place`."""
    config = config_of(args, place, swapped)
    draw = torch.Generator().manual_seed(args.seed + job.rank)
    size = (args.batch_size, args.seq_len + 1)
    losses, marks = [], []
    with engine.engine_of(engine.new_model(args, config, job), config, job) as trained:
        for _ in range(args.steps):
            marks.append(mark(job))
            tokens = torch.randint(config_from_args(args).vocab_size, size, generator=draw)
            tokens = tokens.to(job.device)
            loss: Tensor = trained(tokens[:, :-1], targets=tokens[:, 1:])
            trained.backward(loss)
            trained.step()
            losses.append(loss.item())
        marks.append(mark(job))
        held = engine.held(trained)
        own = [
            path for path in swapped.rglob("*") if path.is_file() and f"rank{job.rank}" in str(path)
        ]
        files = sum(path.stat().st_size for path in own)
    seconds, read, written = (np.array(marks[-1]) - np.array(marks[1])) / (args.steps - 1)
    return Outcome(losses, seconds, read, written, files, held["moments"] + held["master"])


def mark(job: Runtime) -> tuple[float, int, int]:
    """Now, when all ranks are here; bytes that this process has read from disks, and written."""
    job.synchronize()
    job.barrier()
    told = dict(line.split(": ") for line in host.read("/proc/self/io").splitlines())
    return time.perf_counter(), int(told["read_bytes"]), int(told["write_bytes"])


def disk_rates(swapped: Path, job: Runtime) -> tuple[float, float]:
    """Bytes a second, read and written by this rank while all do, past the page cache."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    handle = AsyncIOBuilder().load().aio_handle(*AIO.values(), 1)
    buffer = torch.zeros(LARGE // FLOAT)
    path = str(swapped / f"rate{job.rank}")
    seconds = []
    for move in (handle.sync_pwrite, handle.sync_pread):
        samples = []
        for _ in range(3):
            job.barrier()
            begun = time.perf_counter()
            move(buffer, path, 0)
            samples.append(time.perf_counter() - begun)
        seconds.append(max(gathered(sorted(samples)[1])))
    written, read = (LARGE / each for each in seconds)
    return read, written


def report(
    run: Run, job: Runtime, outcomes: dict[str, Outcome], state: float, rates: tuple[float, float]
) -> None:
    memory, disk = outcomes["memory"], outcomes["nvme"]
    waiting = state / rates[0] + state / rates[1]
    added = disk.seconds - outcomes["cpu"].seconds  # both by CPUAdam
    rows = [
        [place, one.kept / 1e6, one.files / 1e6, one.read / 1e6, one.written / 1e6,
         1e3 * one.seconds, one.losses[-1]]
        for place, one in outcomes.items()
    ]  # fmt: skip
    run.table(
        "places",
        ["state in", "memory, MB", "files, MB", "read a step, MB", "written a step, MB",
         "step, ms", "last loss"], rows,
        caption="optimizer's state of rank 0: float32 weights and moments, between two steps",
    )  # fmt: skip
    run.compare("what the disk adds to the step in CPU memory", waiting, added, "s")
    run.metric("disk reads", rates[0], "B/s", "past the page cache, all ranks at once")
    run.metric("disk writes", rates[1], "B/s")
    differ = max(abs(a - b) for one in outcomes.values()
                 for a, b in zip(one.losses, memory.losses, strict=True))  # fmt: skip
    run.check_below("losses differ from memory's by", differ, SAME, "nats")
    run.check_above("swap files hold the state: their bytes to its", disk.files / state, 1.0)
    moved = [disk.read, disk.written]
    run.check_close("read and written in a step", moved, [state] * 2, TRAFFIC, relative=True)


if __name__ == "__main__":
    script.exit(main)
