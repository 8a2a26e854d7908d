"""Ranks with different numbers of batches: the job hangs, and the ways to mend it differ.

DDP averages gradients in every backward pass, so every rank must make as many of them. A rank that
runs out of data leaves its loop, and the others wait for it: nothing is printed and nothing fails
until the process group's timeout. This script runs that as a job of its own (--mistake).

Then each cure trains one epoch from the same weights, on ranks of which each has fewer examples
than the one before, and is compared with one process that takes all examples of a step at once:

- `join()` has those that are done take part with zeros. Divided by all K ranks, the gradient of a
  step shrinks with the ranks that still have data, as if the learning rate fell; divided by the
  active ranks it does not. Neither knows of a last batch that is smaller: they average means.
- Stopping when the first rank has no more loses what the others still have.
- DistributedSampler deals all ranks as many by repeating some examples, which then count twice.
- Weights: a rank without data takes any example with weight 0, and every rank divides by the sum
  of all ranks' weights. The all-reduce of that sum is also the flag that says when to stop.

Run:
    torchrun --nproc_per_node=2 chapter03-ddp/code/uneven_inputs.py
    torchrun --nproc_per_node=2 chapter03-ddp/code/uneven_inputs.py --mistake --timeout 5

You should see: an error when the timeout has passed, and not before; `join` with 1/K of the last
step's gradient, or all of it; and only the weights giving what one process computes from all data.
"""

import copy
from argparse import Namespace

import torch
from _uneven_cures import (
    Batch,
    Cure,
    Dealt,
    Trainee,
    batched,
    dealt_by_sampler,
    join_divided_by_active,
    join_divided_by_all,
    one_process,
    plain,
    weighted,
)
from _uneven_mistake import leave_the_loop, run_mistake
from torch import Tensor, nn

from distlab import data, runtime, script
from distlab.errors import UsageError
from distlab.model import add_model_flags, config_from_args, model_from_args
from distlab.run import Run
from distlab.runtime import Runtime

PRESETS = {
    "smoke": {"model": "smoke", "corpus_mb": 0.2, "seq_len": 32, "batch_size": 8},
    "laptop": {"model": "smoke", "corpus_mb": 0.5, "seq_len": 64, "batch_size": 8},
    "gpu": {"model": "laptop", "corpus_mb": 2.0, "seq_len": 128, "batch_size": 32},
}
EXACT = 1e-3  # %: float32 rounds, and the order of the sums differs
WRONG = 0.1  # %: no rounding explains more


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with (
        script.run(args) as run,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        if args.mistake:
            trainee = Trainee(model_from_args(args, job.device), args.learning_rate)
            leave_the_loop(trainee, batches_of_ranks(args, job)[job.rank], job)
        else:
            if job.is_main:
                run_mistake(run, args.preset)
            compare_cures(run, args, job)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    data.add_data_flags(parser)
    runtime.add_runtime_flags(parser)
    parser.add_argument("--batches", type=script.positive_int, default=6, help="that rank 0 has")
    parser.add_argument("--learning-rate", type=script.positive_float, default=0.1, metavar="LR")
    parser.add_argument("--mistake", action="store_true", help="train without a cure, and hang")
    args = parser.parse_args(argv)
    config_from_args(args)  # a wrong shape is told before anything starts
    return args


def batches_of_ranks(args: Namespace, job: Runtime) -> list[list[Batch]]:
    """By rank: its batches. Each rank has one batch and one example fewer than the one before."""
    ranks, size = job.world_size, args.batch_size // job.world_size
    if ranks < 2 or size < 2 or args.batch_size % ranks:
        raise UsageError(
            f"--batch-size {args.batch_size} on {ranks} rank(s) gives no uneven ranks; use "
            f"torchrun --nproc_per_node=2 or more, and --batch-size {4 * ranks}"
        )
    counts = [size * args.batches - rank * (size + 1) for rank in range(ranks)]
    counts[-1] -= sum(counts) % ranks == 0  # else DistributedSampler need not repeat any
    if counts[-1] < 1:
        raise UsageError(f"--batches {args.batches} leaves none for rank {ranks - 1}; use more")
    tokens = data.prepare_from_args(args, config_from_args(args).vocab_size)
    examples = torch.from_numpy(tokens.windows(range(sum(counts)), args.seq_len)).to(job.device)
    return [batched(share, size) for share in examples.split(counts)]


def compare_cures(run: Run, args: Namespace, job: Runtime) -> None:
    """Train an epoch with each cure; `dealt` is what it trains on, `whole` what it should have."""
    start = model_from_args(args, job.device)
    everything = batches_of_ranks(args, job)
    stopped = [batches[: len(everything[-1])] for batches in everything]
    sampled = dealt_by_sampler(everything, job.world_size)
    rows, errors = [], {}
    for name, cure, dealt, whole in [
        ("join, divided by all ranks", join_divided_by_all, everything, everything),
        ("join, divided by the active", join_divided_by_active, everything, everything),
        ("stop with the first", plain, stopped, everything),
        ("DistributedSampler", plain, sampled, sampled),
        ("DistributedSampler, weights", weighted, sampled, sampled),
        ("weights", weighted, everything, everything),
    ]:
        way, right_way = ways(args, job, start, cure, dealt, whole)
        errors[name] = 100 * float((way - right_way).norm() / right_way.norm())
        taken, distinct = count(dealt)
        lost = count(everything)[1] - distinct
        rows.append([name, max(map(len, dealt)), lost, taken - distinct, errors[name]])
    run.table(
        "cures",
        ["cure", "steps", "examples lost", "seen twice", "off one process by (%)"],
        rows,
        caption=f"{count(everything)[1]} examples on {job.world_size} ranks, one epoch",
    )
    last = [everything[0][:1], *[[] for _ in range(job.world_size - 1)]]  # only rank 0 has data
    for divisor, cure, share in [
        ("all ranks", join_divided_by_all, 1 / job.world_size),
        ("the active", join_divided_by_active, 1.0),
    ]:
        way, right_way = ways(args, job, start, cure, last, last)
        applied = float(way @ right_way / (right_way @ right_way))
        run.compare(f"of the last rank's gradient, divided by {divisor}", share, applied)
    for name in ("weights", "DistributedSampler, weights"):
        run.check_below(f"{name}: off one process by", errors.pop(name), EXACT, "%")
    run.check_above("every other cure: off one process by", min(errors.values()), WRONG, "%")


def ways(
    args: Namespace, job: Runtime, start: nn.Module, cure: Cure, dealt: Dealt, whole: Dealt
) -> tuple[Tensor, Tensor]:
    """How an epoch changes the weights: by the cure, and in one process, both from `start`."""
    begin = Trainee(start, args.learning_rate).weights()
    trained = Trainee(copy.deepcopy(start), args.learning_rate)
    cure(trained, dealt[job.rank], job)
    alone = Trainee(copy.deepcopy(start), args.learning_rate)
    one_process(alone, whole)
    return trained.weights() - begin, alone.weights() - begin


def count(dealt: Dealt) -> tuple[int, int]:
    """The examples, and those of them that are no repetitions."""
    weights = torch.cat([batch.weights for batches in dealt for batch in batches])
    return len(weights), int(weights.sum())


if __name__ == "__main__":
    script.exit(main)
