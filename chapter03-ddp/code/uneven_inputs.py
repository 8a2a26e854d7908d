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
import os
import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, repeat
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DistributedSampler, TensorDataset

from distlab import data, runtime, script
from distlab.display import write_line
from distlab.errors import UsageError
from distlab.model import add_model_flags, config_from_args, model_from_args
from distlab.process import run_command
from distlab.run import Run
from distlab.runtime import Runtime

PRESETS: dict[str, dict[str, object]] = {
    "smoke": {"model": "smoke", "corpus_mb": 0.2, "seq_len": 32, "batch_size": 8},
    "laptop": {"model": "smoke", "corpus_mb": 0.5, "seq_len": 64, "batch_size": 8},
    "gpu": {"model": "laptop", "corpus_mb": 2.0, "seq_len": 128, "batch_size": 32},
}
EXACT = 1e-3  # %: float32 rounds, and the order of the sums differs
WRONG = 0.1  # %: no rounding explains more
TIMEOUT_S = 3.0
LIMIT_S = 50.0  # for the whole job: its start can be slow
OF_THE_OUTER_JOB = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_",
                    "SLURM_")  # fmt: skip


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


class Batch(NamedTuple):
    """Examples int64 [n, seq + 1] and their weights [n]: 0 for one that shall not count."""

    examples: Tensor
    weights: Tensor


Dealt = Sequence[Sequence[Batch]]  # by rank: its batches


class Trainee:
    """A model with plain SGD: an update is the gradient itself, so nothing hides a wrong scale."""

    def __init__(self, model: nn.Module, learning_rate: float) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)

    def losses(self, examples: Tensor) -> Tensor:
        """The mean loss of each example, [n]."""
        logits = self.model(examples[:, :-1]).float()
        return F.cross_entropy(logits.mT, examples[:, 1:], reduction="none").mean(dim=1)

    def step(self, loss: Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


Cure = Callable[[Trainee, Sequence[Batch], Runtime], None]


def plain(trainee: Trainee, own: Sequence[Batch], job: Runtime) -> None:
    """The usual loop. Where a rank has fewer batches than another, the other one hangs."""
    trainee.model = DDP(trainee.model)
    for batch in own:
        trainee.step(trainee.losses(batch.examples).mean())


def joined(trainee: Trainee, own: Sequence[Batch], job: Runtime, by_all: bool) -> None:
    """Divided by all ranks, torch's default, or by those that still have data."""
    trainee.model = DDP(trainee.model)
    with trainee.model.join(divide_by_initial_world_size=by_all):
        for batch in own:
            trainee.step(trainee.losses(batch.examples).mean())


def weighted(trainee: Trainee, own: Sequence[Batch], job: Runtime) -> None:
    """Exact whatever the ranks have: the sum of all weights is the flag, and the divisor."""
    trainee.model = DDP(trainee.model)
    nothing = Batch(own[0].examples[:1], torch.zeros(1, device=job.device))
    for batch in chain(own, repeat(nothing)):
        total = batch.weights.sum()
        dist.all_reduce(total)
        if total == 0:
            return
        loss = (batch.weights * trainee.losses(batch.examples)).sum()
        trainee.step(loss * job.world_size / total)  # DDP will divide by the world size


def compare_cures(run: Run, args: Namespace, job: Runtime) -> None:
    """Train an epoch with each cure; `dealt` is what it trains on, `whole` what it should have."""
    join_all: Cure = partial(joined, by_all=True)
    join_active: Cure = partial(joined, by_all=False)
    start = model_from_args(args, job.device)
    everything = batches_of_ranks(args, job)
    stopped = [batches[: len(everything[-1])] for batches in everything]
    sampled = dealt_by_sampler(everything, job.world_size)
    rows, errors = [], {}
    cures: list[tuple[str, Cure, Dealt, Dealt]] = [
        ("join, divided by all ranks", join_all, everything, everything),
        ("join, divided by the active", join_active, everything, everything),
        ("stop with the first", plain, stopped, everything),
        ("DistributedSampler", plain, sampled, sampled),
        ("DistributedSampler, weights", weighted, sampled, sampled),
        ("weights", weighted, everything, everything),
    ]
    for name, cure, dealt, whole in cures:
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
        ("all ranks", join_all, 1 / job.world_size),
        ("the active", join_active, 1.0),
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


def one_process(trainee: Trainee, dealt: Dealt) -> None:
    """Every example that counts, of all ranks' batches of a step, in one batch."""
    for step in range(max(map(len, dealt))):
        batches = [own[step] for own in dealt if step < len(own)]
        distinct = torch.cat([batch.examples[batch.weights > 0] for batch in batches])
        trainee.step(trainee.losses(distinct).mean())


def count(dealt: Dealt) -> tuple[int, int]:
    """The examples, and those of them that are no repetitions."""
    weights = torch.cat([batch.weights for batches in dealt for batch in batches])
    return len(weights), int(weights.sum())


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


def batched(examples: Tensor, size: int) -> list[Batch]:
    return [Batch(part, torch.ones(len(part), device=part.device)) for part in examples.split(size)]


def dealt_by_sampler(dealt: Dealt, ranks: int) -> list[list[Batch]]:
    """All ranks' examples, dealt anew by DistributedSampler; what it repeats has weight 0."""
    examples = torch.cat([batch.examples for own in dealt for batch in own])
    size = len(dealt[0][0].examples)
    anew = []
    for rank in range(ranks):
        sampler: DistributedSampler = DistributedSampler(
            TensorDataset(examples), ranks, rank, shuffle=False
        )
        indices = torch.tensor(list(sampler), device=examples.device)
        # The rank's i-th is number i * ranks + rank of the list, which begins anew at its end.
        places = rank + ranks * torch.arange(len(indices), device=examples.device)
        weights = (places < len(examples)).float()
        parts = zip(examples[indices].split(size), weights.split(size), strict=True)
        anew.append([Batch(*part) for part in parts])
    return anew


def leave_the_loop(trainee: Trainee, own: Sequence[Batch], job: Runtime) -> None:
    """Train on what this rank has. With fewer batches it goes on to the barrier after the loop."""
    trainee.model = DDP(trainee.model)
    began = time.monotonic()
    try:
        for number, batch in enumerate(own, start=1):
            where, began = f"in step {number} of its {len(own)}", time.monotonic()
            trainee.step(trainee.losses(batch.examples).mean())
        where, began = "at the barrier", time.monotonic()
        job.barrier()
    finally:
        write_line(f"rank {job.rank} ended {where} after {time.monotonic() - began:.2f} s")


def run_mistake(run: Run, preset: str) -> None:
    """Start that as a job of two ranks, with a short timeout, and tell what became of it."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        __file__, "--mistake", "--preset", preset, "--timeout", str(TIMEOUT_S),
        "--backend", "gloo", "--device", "cpu",
    ]  # fmt: skip
    clean = {k: v for k, v in os.environ.items() if not k.startswith(OF_THE_OUTER_JOB)}
    done = run_command(command, {**clean, "LAB_RECORD_DIR": ""}, timeout_s=LIMIT_S)
    ends = re.findall(r"^(rank (\d) ended .* after ([\d.]+) s)$", done.stdout, re.MULTILINE)
    for line, _, _ in ends:
        run.print(f"trace: without a cure, {line}")
    for line in re.findall(r"^error: (.*)$", done.stderr, re.MULTILINE):
        run.print(f"trace: {line.partition(' This is typically')[0]}")
    waited = max((float(seconds) for _, _, seconds in ends), default=0.0)
    run.compare("without a cure, the wait until the error", TIMEOUT_S, waited, "s")
    run.check_equal("the job without a cure fails", done.status, 1)
    run.check_above("it fails only when the timeout has passed", waited, 0.99 * TIMEOUT_S, "s")


if __name__ == "__main__":
    script.exit(main)
