"""DistributedDataParallel from scratch: it trains as torch's does, and a step takes as long.

The mechanism, whole, is `DataParallel` in ddp/data_parallel.py: hooks fill buckets with gradients,
and full buckets are all-reduced while backward goes on. This script proves and measures it: three
models are trained beside torch's DDP and beside one process; each bucket is watched; and a step is
timed with overlap, without, and by torch's DDP.

Run:
    torchrun --nproc_per_node=2 chapter03-ddp/code/ddp_from_scratch.py
    torchrun --nproc_per_node=4 chapter03-ddp/code/ddp_from_scratch.py
    python3 scripts/lab.py cluster --nodes 2 --rate 1gbit -- \\
        torchrun --nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d \\
        --rdzv_endpoint=node0:29500 chapter03-ddp/code/ddp_from_scratch.py

You should see: losses and weights equal to those of torch's DDP and of one process to 1e-5, for a
model with tied weights, for one without, and for one that is odd in every way; the buckets, and
when in backward each of them left; the time of a step, and of torch's.
"""

import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from ddp.data_parallel import MIB, Bucket, DataParallel
from ddp.parity import check_shares, prove_equal
from ddp.step_times import Trainee, own_batch
from distlab import predict, runtime, script
from distlab.errors import UsageError
from distlab.model import add_model_flags, config_from_args, model_from_args, num_parameters
from distlab.ranks import in_turns
from distlab.run import Run
from distlab.runtime import Runtime

PRESETS: dict[str, dict[str, object]] = {
    "smoke": {"model": "smoke", "batch_size": 8, "seq_len": 32, "steps": 20, "repeats": 5,
              "bucket_mb": 0.1},
    "laptop": {"model": "laptop", "batch_size": 8, "seq_len": 128, "steps": 20, "repeats": 15,
               "bucket_mb": 2.0, "max_ratio": 1.05},
    "gpu": {"model": "gpu", "batch_size": 8, "seq_len": 512, "steps": 20, "repeats": 20,
            "bucket_mb": 25.0, "max_ratio": 1.05},
}  # fmt: skip
FLOAT = 4  # bytes
TENSORS_OF_A_LAYER = 9  # q, k, v and o, gate, up and down, two norms
WATCHED_STEPS = 5
WARMUP_STEPS = 3  # DDP arranges its buckets in the second step


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with (
        script.run(args) as run,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        prove_equal(run, args, job, DataParallel)
        report_buckets(run, args, job)
        compare_step_times(run, args, job)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    runtime.add_runtime_flags(parser)
    add = parser.add_argument
    add("--batch-size", type=script.positive_int, help="sequences of all ranks together")
    add("--seq-len", type=script.positive_int)
    add("--steps", type=script.positive_int, help="of each proof")
    add("--bucket-mb", type=script.positive_float, metavar="MB", help="cap of a bucket, in 2^20 B")
    add("--repeats", type=script.positive_int, help="timed steps of each kind")
    add("--max-ratio", type=script.positive_float, help="to DDP's step time, judged at 2 ranks")
    args = parser.parse_args(argv)
    check_shares(args)
    script.refuse_no_median(args, "repeats")
    if args.bucket_mb * MIB < 1:
        raise UsageError(f"--bucket-mb {args.bucket_mb:g} is less than a byte; use 0.1 or more")
    return args


def report_buckets(run: Run, args: Namespace, job: Runtime) -> None:
    """A few steps, watched: which bucket left when, and how many bytes that were."""
    model, cap = model_from_args(args, job.device), cap_of(args)
    replica = Watched(model, cap, first_bucket_bytes=cap)
    trainee = trainee_of(args, job, model, replica)
    for _ in range(WARMUP_STEPS):
        trainee.step()
    left = np.median([launches_of_a_step(trainee, replica) for _ in range(WATCHED_STEPS)], axis=0)

    rows: list[list[Any]] = []
    first = 1
    for index, bucket in enumerate(replica.buckets):
        last = first + len(bucket.parameters) - 1
        rows.append([index, first, last, bucket.flat.nbytes / 1e6, 100 * left[index]])
        run.print(f"sample: bucket {index} has {bucket.names[0]} to {bucket.names[-1]}")
        first = last + 1
    run.table(
        "buckets", ["bucket", "from tensor", "to tensor", "MB", "launched at % of backward"], rows,
        caption="tensors from the model's end on; the last bucket waits for the end of backward",
    )  # fmt: skip
    run.check_equal(
        "the buckets that leave while backward still computes",
        sum(early for _, early in replica.launches),
        len(rows) - 1,
    )
    report_bytes(run, args, job, sum(bucket.flat.nbytes for bucket in replica.buckets))


class Watched(DataParallel):
    """`DataParallel` that notes when each bucket leaves, and if gradients are still to come."""

    launches: list[tuple[float, bool]] = []  # of the last step

    def all_reduce(self, bucket: Bucket) -> dist.Work:
        early = any(one.missing for one in self.buckets)
        self.launches = [*self.launches, (time.perf_counter(), early)]
        return super().all_reduce(bucket)


def launches_of_a_step(trainee: Trainee, replica: Watched) -> list[float]:
    """Each launch as a part of backward, which ends when it launches the last bucket."""
    trainee.optimizer.zero_grad()
    loss = trainee.forward()
    replica.launches = []
    began = time.perf_counter()
    loss.backward()
    last, _ = replica.launches[-1]
    return [(at - began) / (last - began) for at, _ in replica.launches]


def cap_of(args: Namespace) -> int:
    """Bytes of a bucket, of the first one too, as DDP(bucket_cap_mb=) has it."""
    return int(args.bucket_mb * MIB)


def trainee_of(args: Namespace, job: Runtime, model: nn.Module, wrapped: nn.Module) -> Trainee:
    """With this rank's share of one global batch."""
    vocabulary, share = config_from_args(args).vocab_size, args.batch_size // job.world_size
    batch = own_batch(args, job, vocabulary, share)
    return Trainee(model, wrapped, batch, learning_rate=0.01, momentum=0.9)


def report_bytes(run: Run, args: Namespace, job: Runtime, flat_bytes: int) -> None:
    """A ring sends 2·(K - 1)/K of the buffers: 4·P bytes of gradients, and 4 for each tensor."""
    config = config_from_args(args)
    outside = 2 if config.tie_word_embeddings else 3  # of the layers
    tensors = TENSORS_OF_A_LAYER * config.num_hidden_layers + outside
    gradient = FLOAT * (num_parameters(config) + tensors)
    predicted = predict.data_parallel_bytes(gradient, job.world_size)
    counted = predict.BUS_FACTORS["all_reduce"](job.world_size) * flat_bytes
    run.compare("bytes that a rank sends in a step", predicted, counted, "B")
    run.check_equal("the counted bytes are those predicted", counted, predicted)


def compare_step_times(run: Run, args: Namespace, job: Runtime) -> None:
    """Ours, ours without overlap, and torch's DDP, in turns; the slowest rank's time counts."""

    def ours(model: nn.Module, overlap: bool = True) -> DataParallel:
        return DataParallel(model, cap_of(args), overlap, first_bucket_bytes=cap_of(args))

    def step(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[], object]:
        model = model_from_args(args, job.device)
        return trainee_of(args, job, model, wrap(model)).step

    steps = {
        "from scratch": step(ours),
        "without overlap": step(partial(ours, overlap=False)),
        "of torch DDP": step(partial(DDP, bucket_cap_mb=args.bucket_mb)),
    }
    timings = in_turns(steps, WARMUP_STEPS, args.repeats, job)
    for name, timing in timings.items():
        run.metric(f"step {name}", timing.median, "s", f"median of {args.repeats}, in turns")
    ratios = timings["from scratch"].ratios(timings["of torch DDP"])
    name = "a step's time, in units of torch DDP's"
    if args.max_ratio is None or job.world_size != 2:  # small steps are noise; ranks share cores
        run.metric(name, float(np.median(ratios)), note="median of each to its twin")
    else:
        run.check_within(name, ratios, args.max_ratio, any_size=True)


if __name__ == "__main__":
    script.exit(main)
