"""Broadcast, reduce-scatter, all-gather, all-to-all and three all-reduces, from send and receive.

A collective is a plan: who sends what to whom, in which step. Here are the plans that the libraries
use, each a few lines over `Wire`, which sends to one rank and receives from one rank at a time and
counts steps and bytes. A step costs a latency, so few steps are good for short messages (tree,
recursive doubling); a byte costs 1/bandwidth, so few bytes are good for long ones (ring).

Run:
    torchrun --nproc_per_node=4 chapter02-gpu-hardware-parallelism/code/collectives_from_scratch.py
    torchrun --nproc_per_node=3 chapter02-gpu-hardware-parallelism/code/collectives_from_scratch.py
    torchrun --nproc_per_node=2 \
        chapter02-gpu-hardware-parallelism/code/collectives_from_scratch.py --compare-with-library

You should see: every collective equal to torch.distributed's for all types and for sizes that do
not divide, integers bit for bit; and every rank's steps and bytes as the formulas say. With
--compare-with-library the all-reduces race against the library's; over a network link
(`lab cluster --rate 1gbit`) the ring keeps up with it.
"""

from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from distlab import runtime, script
from distlab.errors import UsageError
from distlab.run import Run
from distlab.runtime import Runtime
from parallelism.collectives import (
    PIPELINED,
    Wire,
    all_gather,
    pipelined_ring_all_reduce,
    reduce_scatter,
    ring_all_reduce,
)
from parallelism.trials import byte_count, prove, race

PRESETS = {
    "smoke": {"bytes": 2**16, "repeats": 5},
    "laptop": {"bytes": 2**20, "repeats": 10},
    "gpu": {"bytes": 2**26, "repeats": 20},
}


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with (
        script.run(args) as run,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        show(run, args, job)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    runtime.add_runtime_flags(parser)
    parser.add_argument("--bytes", type=byte_count, metavar="SIZE", help="such as 16MiB")
    group = parser.add_argument_group("timing")
    group.add_argument(
        "--compare-with-library", action="store_true", help="time the all-reduces side by side"
    )
    group.add_argument("--repeats", type=script.positive_int, help="of each all-reduce")
    group.add_argument(
        "--link-gbit", type=script.positive_float, metavar="G", help="predict from this bandwidth"
    )
    group.add_argument(
        "--min-ratio", type=script.positive_float, metavar="R",
        help="check that the pipelined ring has R of the library's speed",
    )  # fmt: skip
    args = parser.parse_args(argv)
    script.refuse_no_median(args, "repeats")
    if not args.compare_with_library and (args.min_ratio or args.link_gbit):
        raise UsageError("--min-ratio and --link-gbit are about time; add --compare-with-library")
    return args


def show(run: Run, args: Namespace, job: Runtime) -> None:
    job.barrier()
    if args.compare_with_library:
        race(run, args, job, ALL_REDUCES)
    else:
        slice_bytes = args.bytes // 5 + 1  # several slices, the last one shorter
        in_slices = partial(pipelined_ring_all_reduce, slice_bytes=slice_bytes)
        collectives = COLLECTIVES | ALL_REDUCES | {PIPELINED: in_slices}
        prove(run, args, job, collectives, slice_bytes)


def tree_broadcast(wire: Wire, tensor: Tensor, root: int = 0) -> Tensor:
    """Binomial tree: in every step each rank that has `tensor` sends it to one that has not."""
    place = (wire.rank - root) % wire.world_size
    for distance in reversed(powers_of_two(wire.world_size)):
        if place % (2 * distance) == distance:
            wire.exchange(receive=(tensor, (wire.rank - distance) % wire.world_size))
        elif place % (2 * distance) == 0 and place + distance < wire.world_size:
            wire.exchange(send=(tensor, (wire.rank + distance) % wire.world_size))
    return tensor


def tree_reduce(wire: Wire, tensor: Tensor, root: int = 0) -> Tensor:
    """The broadcast backwards; the root ends with the sum, the others with a part of it."""
    place = (wire.rank - root) % wire.world_size
    arriving = torch.empty_like(tensor)
    for distance in powers_of_two(wire.world_size):
        if place % (2 * distance) == distance:
            wire.exchange(send=(tensor, (wire.rank - distance) % wire.world_size))
        elif place % (2 * distance) == 0 and place + distance < wire.world_size:
            wire.exchange(receive=(arriving, (wire.rank + distance) % wire.world_size))
            tensor += arriving
    return tensor


def tree_all_reduce(wire: Wire, tensor: Tensor) -> Tensor:
    tree_reduce(wire, tensor)
    return tree_broadcast(wire, tensor)


def doubling_all_reduce(wire: Wire, tensor: Tensor) -> Tensor:
    """Recursive doubling: swap the sums of ever larger groups with the rank of the other group.

    It needs a power of two, so the ranks above the largest one first hand their numbers to a rank
    below it, and get the result from there in the end.
    """
    core = 1 << (wire.world_size.bit_length() - 1)
    if wire.rank >= core:
        wire.exchange(send=(tensor, wire.rank - core))
        wire.exchange(receive=(tensor, wire.rank - core))
        return tensor
    arriving = torch.empty_like(tensor)
    has_extra = wire.rank + core < wire.world_size
    if has_extra:
        wire.exchange(receive=(arriving, wire.rank + core))
        tensor += arriving
    for distance in powers_of_two(core):
        partner = wire.rank ^ distance
        wire.exchange(send=(tensor, partner), receive=(arriving, partner))
        tensor += arriving
    if has_extra:
        wire.exchange(send=(tensor, wire.rank + core))
    return tensor


def all_to_all(wire: Wire, tensor: Tensor) -> Tensor:
    """Chunk r of `tensor` goes to rank r; the ranks' chunks for this one, in their order."""
    leaving = tensor.tensor_split(wire.world_size)
    arriving = [torch.empty_like(leaving[wire.rank]) for _ in leaving]
    arriving[wire.rank].copy_(leaving[wire.rank])
    for step in range(1, wire.world_size):
        to, source = (wire.rank + step) % wire.world_size, (wire.rank - step) % wire.world_size
        wire.exchange(send=(leaving[to], to), receive=(arriving[source], source))
    return torch.cat(arriving)


def powers_of_two(limit: int) -> list[int]:
    """1, 2, 4 … below `limit`."""
    return [1 << i for i in range((limit - 1).bit_length())]


COLLECTIVES: dict[str, Callable[[Wire, Tensor], Tensor]] = {
    "broadcast (tree)": tree_broadcast,
    "reduce-scatter (ring)": reduce_scatter,
    "all-gather (ring)": all_gather,
    "all-to-all (pairwise)": all_to_all,
}
ALL_REDUCES: dict[str, Callable[[Wire, Tensor], Tensor]] = {
    "all-reduce (ring)": ring_all_reduce,
    PIPELINED: pipelined_ring_all_reduce,
    "all-reduce (tree)": tree_all_reduce,
    "all-reduce (recursive doubling)": doubling_all_reduce,
}

if __name__ == "__main__":
    script.exit(main)
