"""Data parallelism with torch: DistributedDataParallel does what data_parallel.py does by hand.

What the library does for you: its constructor broadcasts rank 0's parameters and checks that all
ranks have the same shapes. It packs the gradients into buckets, last layer first, and all-reduces
each as soon as backward has filled it, beside the rest of backward. It divides by K. `no_sync`
leaves the all-reduce out, and a parameter that got no gradient is an error, not a hang.

Run:
    torchrun --nproc_per_node=2 chapter02-gpu-hardware-parallelism/code/torch_data_parallel.py

You should see: loss and gradients equal to one process's, and the bytes of data_parallel.py in
buckets: fewer messages than for each tensor, more than for one buffer, which could not overlap.
"""

from argparse import Namespace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel as DDP

from distlab import predict, runtime, script
from distlab.launch import detect_launch
from distlab.model import num_parameters
from distlab.ranks import distinct
from distlab.run import Run
from distlab.runtime import Runtime
from parallelism.problem import (
    FLOAT,
    Problem,
    begin_differently,
    check_equal,
    check_shares,
    gradients_of,
    mean_loss,
    one_process,
    parser,
)


def main(argv: list[str] | None = None) -> int:
    args = parser(__doc__).parse_args(argv)
    check_shares("--batch-size", args.batch_size, detect_launch().world_size, "ranks")
    with (
        script.run(args) as run,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        compare_with_one_process(run, args, job)
    return run.status


def compare_with_one_process(run: Run, args: Namespace, job: Runtime) -> None:
    problem = one_process(run, args, job)
    model = problem.new_model()
    begin_differently(model, args.seed, job.rank)
    run.check_equal(
        "the ranks begin with different weights", distinct(model.parameters()), job.world_size
    )
    replica = DDP(model)
    run.check_equal("the constructor gives all of them rank 0's", distinct(model.parameters()), 1)
    loss, gradients, buckets = step(replica, problem)
    check_equal(run, "DDP", loss, gradients, problem)
    whole = FLOAT * num_parameters(model.config)
    ring = predict.BUS_FACTORS["all_reduce"](job.world_size)
    run.compare("DDP: bytes", ring * whole, ring * sum(buckets), "B")
    run.metric("DDP: buckets", len(buckets))
    run.metric("DDP: messages", 2 * (job.world_size - 1) * len(buckets))


def step(replica: DDP, problem: Problem) -> tuple[Tensor, dict[str, Tensor], list[int]]:
    """The loss, the gradients, and the bytes of each bucket that DDP all-reduced for them.

    Done twice: from the first backward DDP learns the order in which the gradients come, and it has
    one bucket there.
    """
    rank, workers = dist.get_rank(), dist.get_world_size()
    buckets: list[int] = []
    replica.register_comm_hook(buckets, counted_all_reduce)
    for _ in range(2):
        replica.zero_grad()
        buckets.clear()
        loss = replica(
            problem.input_ids.chunk(workers)[rank], targets=problem.targets.chunk(workers)[rank]
        )
        loss.backward()
    return mean_loss(loss), gradients_of(replica.module), buckets


def counted_all_reduce(
    buckets: list[int], bucket: dist.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """DDP's own hook, which divides by K and all-reduces, behind a note of the bucket's size."""
    buckets.append(bucket.buffer().nbytes)
    world = dist.group.WORLD
    assert world is not None  # there are ranks
    return allreduce_hook(world, bucket)


if __name__ == "__main__":
    script.exit(main)
