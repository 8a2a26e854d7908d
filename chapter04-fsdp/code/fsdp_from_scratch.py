"""Fully sharded data parallelism from scratch: it trains as torch's does, in less time on gloo.

The mechanism, whole, is `FullySharded` in fsdp/sharded.py: an all-gather makes a unit's parameters
whole before it computes, a reduce-scatter leaves each rank its part of the gradient, and the next
unit is always on its way. This script proves and measures it: models are trained beside torch's
`fully_shard` and beside one process; what a rank keeps and what it sends are counted; and a step is
timed, ours and torch's in turns.

Run:
    torchrun --nproc_per_node=2 chapter04-fsdp/code/fsdp_from_scratch.py
    torchrun --nproc_per_node=4 chapter04-fsdp/code/fsdp_from_scratch.py
    python3 scripts/lab.py cluster --nodes 2 --rate 1gbit -- \\
        torchrun --nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d \\
        --rdzv_endpoint=node0:29500 chapter04-fsdp/code/fsdp_from_scratch.py

You should see: losses, gradients and weights equal to those of fully_shard and of one process to
1e-5 in every case; weights, gradients and Adam's state of exactly 16 bytes for each parameter of
the shard; on nodes of a cluster the bytes on the wire, 3(K-1)/K of the units' and 2(K-1)/K of the
root's, where torch's own on gloo sends 4(K-1)/K; and a step that takes no longer than torch's.
"""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from distlab import runtime, script
from distlab.errors import UsageError
from distlab.launch import detect_launch
from distlab.measure import LiveBytes, tensor_bytes
from distlab.model import Llama, add_model_flags, config_from_args, model_from_args, num_parameters
from distlab.ranks import gathered, in_turns
from distlab.run import Run
from distlab.runtime import Runtime
from distlab.traffic import bytes_sent, reduction_factor
from fsdp.parity import MICRO_BATCHES, prove_equal
from fsdp.sharded import FullySharded
from fsdp.strategies import own_batch

PRESETS: dict[str, dict[str, object]] = {
    "smoke": {"model": "smoke", "batch_size": 24, "seq_len": 32, "steps": 6, "repeats": 5},
    "laptop": {"model": "laptop", "batch_size": 24, "seq_len": 128, "steps": 20, "repeats": 15,
               "max_ratio": 1.05},
    "gpu": {"model": "gpu", "batch_size": 24, "seq_len": 512, "steps": 20, "repeats": 20,
            "max_ratio": 1.05},
}  # fmt: skip
FLOAT = 4  # bytes
STATES = 4  # float32 numbers of a parameter: weight, gradient, Adam's two means
TIMED_SEQUENCES = 4  # of a rank, in a step that is timed
WARMUP_STEPS = 3
HEADERS = 0.01  # of the payload, at most: packets' headers and acknowledgements

Step = Callable[[], object]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with (
        script.run(args) as run,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        run.print(f"job: {job.world_size} rank(s), {job.backend} on {job.device.type}")
        prove_equal(run, args, job)
        report_states(run, args, job)
        if job.local_world_size < job.world_size:
            report_wire(run, args, job)
        compare_steps(run, args, job)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    runtime.add_runtime_flags(parser)
    add = parser.add_argument
    add("--batch-size", type=script.positive_int, help="sequences of all ranks in the proofs")
    add("--seq-len", type=script.positive_int)
    add("--steps", type=script.positive_int, help="of each proof")
    add("--repeats", type=script.positive_int, help="timed steps of each kind")
    add("--max-ratio", type=script.positive_float, help="to fully_shard's time, at 2 ranks")
    args = parser.parse_args(argv)
    parts = MICRO_BATCHES * detect_launch().world_size
    if args.batch_size % parts:
        raise UsageError(
            f"--batch-size {args.batch_size} is not divisible by {MICRO_BATCHES} micro-batches on "
            f"{parts // MICRO_BATCHES} ranks; use {-(-args.batch_size // parts) * parts}"
        )
    script.refuse_no_median(args, "repeats")
    return args


def report_states(run: Run, args: Namespace, job: Runtime) -> None:
    """What a rank holds after a step of Adam: 16 bytes for each number of its shards."""
    model = sharded(args, job)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    stepper(args, job, model, optimizer)()
    held = [tensor for shard in model.shards for tensor in (shard.detach(), shard.grad)]
    held += [value for state in optimizer.state.values() for value in state.values()]
    measured = tensor_bytes(tensor for tensor in held if tensor is not None and tensor.dim())
    predicted = STATES * FLOAT * sum(shard_sizes(args, job.world_size))
    run.compare("weights, gradients and Adam's state of a rank", predicted, measured, "B")
    run.check_equal("they are what the formula says", measured, predicted)
    whole = STATES * FLOAT * num_parameters(config_from_args(args))
    run.metric("of an unsharded rank's", measured / whole, "", f"1/K is {1 / job.world_size:.4f}")


def shard_sizes(args: Namespace, ranks: int) -> list[int]:
    """Numbers in a rank's shard of each unit, the root first: a K-th, rounded up."""
    return [-(-size // ranks) for size in unit_sizes(args)]


def unit_sizes(args: Namespace) -> list[int]:
    """Parameters of the root, and of each layer."""
    with torch.device("meta"):
        model = Llama(config_from_args(args))
    layers = [num_parameters(layer) for layer in model.model.layers]
    return [num_parameters(model) - sum(layers), *layers]


def report_wire(run: Run, args: Namespace, job: Runtime) -> None:
    """What a step sends, counted at the network interface of each node.

    A unit is gathered twice and reduced once; the root, and what is kept after forward, is gathered
    once. torch's own reduces by gloo's reduce-scatter, which sends as much as an all-reduce.
    """
    root, *units = (FLOAT * job.world_size * size for size in shard_sizes(args, job.world_size))
    share = (job.world_size - 1) / job.world_size
    once, inner = root + sum(units), sum(units)
    reduction = reduction_factor(job.backend)
    kinds: dict[str, tuple[Any, float]] = {
        "from scratch": (sharded(args, job), once + inner + once),
        "from scratch, kept after forward": (sharded(args, job, False), once + once),
        "torch's fully_shard": (by_torch(args, job), once + inner + reduction * once),
    }
    rows: list[list[Any]] = []
    for name, (model, payload) in kinds.items():
        step = stepper(args, job, model, torch.optim.SGD(model.parameters(), lr=0.0))
        sent = max(gathered(bytes_sent(step, job)))
        predicted = share * payload
        rows.append([name, predicted / 1e6, sent / 1e6, 100 * (predicted - sent) / sent])
    run.table(
        "wire", ["wrapper", "predicted (MB)", "measured (MB)", "error (%)"], rows,
        caption="what a rank sends in a step; predicted without the packets' headers",
    )  # fmt: skip
    worst = max(abs(error) for *_, error in rows) / 100
    run.check_below("the largest of these errors", worst, HEADERS)


def compare_steps(run: Run, args: Namespace, job: Runtime) -> None:
    """Ours, ours without prefetch, and torch's, in turns; the slowest rank's time counts."""
    models = {
        "from scratch": sharded(args, job),
        "without prefetch": sharded(args, job, prefetch=False),
        "of fully_shard": by_torch(args, job),
    }
    steps = {
        name: stepper(args, job, model, torch.optim.SGD(model.parameters(), lr=0.01))
        for name, model in models.items()
    }
    timings = in_turns(steps, WARMUP_STEPS, args.repeats, job)
    for name, timing in timings.items():
        run.metric(f"step {name}", timing.median, "s", f"median of {args.repeats}, in turns")
    ratios = timings["from scratch"].ratios(timings["of fully_shard"])
    name = "a step's time, in units of fully_shard's"
    if args.max_ratio is None or job.world_size != 2:  # small steps are noise; ranks share cores
        run.metric(name, float(np.median(ratios)), note="median of each to its twin")
    else:
        run.check_within(name, ratios, args.max_ratio, any_size=True)
    ours, theirs = (peak_of(steps[name]) for name in ("from scratch", "of fully_shard"))
    run.metric("a step's peak", ours, "B", "beyond the shards, from scratch")
    run.check_below("it, in units of fully_shard's", ours / theirs, 1.0)


def peak_of(step: Step) -> int:
    with LiveBytes() as live:
        step()
    return live.peak


def sharded(args: Namespace, job: Runtime, reshard: bool = True, prefetch: bool = True) -> Any:
    model = model_from_args(args, job.device)
    return FullySharded(model, model.model.layers, reshard_after_forward=reshard, prefetch=prefetch)


def by_torch(args: Namespace, job: Runtime) -> nn.Module:
    model = model_from_args(args, job.device)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def stepper(args: Namespace, job: Runtime, model: Any, optimizer: torch.optim.Optimizer) -> Step:
    """A step on this rank's own batch, always the same."""
    inputs, targets = own_batch(args, job, TIMED_SEQUENCES)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(inputs, targets=targets)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


if __name__ == "__main__":
    script.exit(main)
