"""The proof of a data-parallel wrapper: it trains as torch's DDP does, and as one process does."""

from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from distlab.errors import UsageError
from distlab.launch import detect_launch
from distlab.model import Llama, config_from_args
from distlab.ranks import distinct
from distlab.run import Run
from distlab.runtime import Runtime

TOLERANCE = 1e-5  # float32: the sums over the batch are the same, their order is not
MICRO_BATCHES = 2  # of a step that accumulates
LEARNING_RATE = 0.03
FEW = 16  # tokens of a sequence of the proof
Wrap = Callable[..., Any]


@dataclass(frozen=True)
class Problem:
    """A model, and steps of one global batch [batch, …] each, to be shared out to the ranks.

    `apart`: the one process, too, computes the ranks' shares one after another, each with the
    buffers that the step began with, since ranks do not see what the others make of theirs.
    """

    name: str
    new_model: Callable[[], nn.Module]
    batches: list[tuple[Tensor, Tensor]]
    micro_batches: int = 1
    apart: bool = False


def check_shares(args: Namespace) -> None:
    parts = MICRO_BATCHES * detect_launch().world_size
    if args.batch_size % parts:
        below = args.batch_size // parts * parts
        fitting = " or ".join(str(size) for size in (below, below + parts) if size)
        raise UsageError(
            f"--batch-size {args.batch_size} is not divisible by {MICRO_BATCHES} micro-batches on "
            f"{parts // MICRO_BATCHES} ranks; use {fitting}"
        )


def prove_equal(run: Run, args: Namespace, job: Runtime, wrap: Wrap) -> None:
    run.print(f"job: {job.world_size} rank(s), {job.backend} on {job.device.type}")
    for problem in problems(args, job):
        caps = {"bucket_bytes": 2000, "first_bucket_bytes": 500} if problem.apart else {}
        ours = train(problem, args, job, partial(wrap, **caps))
        theirs = train(problem, args, job, partial(DDP, find_unused_parameters=problem.apart))
        begun, ended = ours.different
        run.check_equal(f"{problem.name}: the ranks begin differently", begun, job.world_size)
        run.check_equal(f"{problem.name}: they end with the same weights", ended, 1)
        compare(run, problem, ours, theirs, "DDP")
        if job.is_main:
            compare(run, problem, ours, train_alone(problem, args, job), "one process")


def problems(args: Namespace, job: Runtime) -> list[Problem]:
    random = torch.Generator().manual_seed(args.seed)
    tied = replace(config_from_args(args), tie_word_embeddings=True)
    untied = replace(tied, tie_word_embeddings=False)
    text = [text_batch(args, random, job.device) for _ in range(args.steps)]
    odd = [odd_batch(args.batch_size, step, random, job.device) for step in range(args.steps)]
    return [
        Problem("tied Llama", lambda: Llama(tied), text),
        Problem("untied Llama, no_sync", lambda: Llama(untied), text, MICRO_BATCHES),
        Problem("odd module, no_sync", OddModule, odd, MICRO_BATCHES, apart=True),
    ]


def text_batch(
    args: Namespace, random: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Any tokens will do, and few of them."""
    shape = (args.batch_size, min(args.seq_len, FEW) + 1)
    tokens = torch.randint(config_from_args(args).vocab_size, shape, generator=random).to(device)
    return tokens[:, :-1], tokens[:, 1:]


class OddModule(nn.Module):
    """Odd shapes, a tied and a frozen weight, a branch seldom taken, another never, a buffer."""

    mean: Tensor
    batches: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(7, 13)
        self.tied, self.again = nn.Linear(13, 13), nn.Linear(13, 13, bias=False)
        self.again.weight = self.tied.weight
        self.frozen = nn.Linear(13, 13).requires_grad_(False)
        self.scale = nn.Parameter(torch.rand(()))
        self.rare, self.never = nn.Linear(13, 3), nn.Linear(5, 1)
        self.leave = nn.Linear(13, 3)
        self.register_buffer("mean", torch.rand(13))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of [batch, 7] inputs, of which those with a large first number are rare."""
        x = torch.tanh(self.enter(inputs))
        self.mean.lerp_(x.detach().mean(0), 0.1)
        self.batches += 1
        x = torch.tanh(self.frozen(self.tied(x - self.mean)))
        y = self.leave(self.scale * self.again(x))
        rare = inputs[:, 0] > 5
        if rare.any():
            y = y + rare[:, None] * self.rare(x)
        return F.cross_entropy(y, targets)


def odd_batch(
    size: int, step: int, random: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """In every other step the last example, so the last rank, takes the rare branch."""
    inputs = torch.randn(size, 7, generator=random)
    inputs[-1, 0] = 10 * (step % 2)
    return inputs.to(device), torch.randint(3, (size,), generator=random).to(device)


@dataclass(frozen=True)
class Trained:
    """What came of 20 steps, or however many they were."""

    losses: Tensor  # of each step, the mean over the batch
    state: dict[str, Tensor]  # parameters and buffers, a tied weight once
    different: tuple[int, int] = (1, 1)  # models among the ranks, at the beginning and at the end


def train(
    problem: Problem, args: Namespace, job: Runtime, wrap: Callable[[nn.Module], Any]
) -> Trained:
    """Train replicas that begin differently."""
    model = begin(problem, args.seed + job.rank, job.device)
    start = distinct(model.parameters())
    replica = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    losses = torch.zeros(len(problem.batches), device=job.device)
    for step, batch in enumerate(problem.batches):
        inputs, targets = (part.chunk(job.world_size)[job.rank] for part in batch)
        losses[step] = accumulate(problem, replica, inputs, targets, replica.no_sync)
        optimizer.step()
        optimizer.zero_grad()
    dist.all_reduce(losses)
    different = (start, distinct(model.parameters()))
    return Trained(losses / job.world_size, state_of(model), different)


def train_alone(problem: Problem, args: Namespace, job: Runtime) -> Trained:
    """The same, by one process: no replica, no collective."""
    model = begin(problem, args.seed, job.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    losses = torch.zeros(len(problem.batches), device=job.device)
    for step, batch in enumerate(problem.batches):
        if problem.apart:
            losses[step] = share_by_share(problem, model, batch, job.world_size)
        else:
            losses[step] = accumulate(replace(problem, micro_batches=1), model, *batch, nullcontext)
        optimizer.step()
        optimizer.zero_grad()
    return Trained(losses, state_of(model))


def share_by_share(
    problem: Problem, model: nn.Module, batch: tuple[Tensor, Tensor], ranks: int
) -> Tensor:
    """Each rank's work with the buffers of the step's beginning; those of rank 0's work stay."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    after: dict[str, Tensor] = {}
    losses = []
    for inputs, targets in zip(*(part.chunk(ranks) for part in batch), strict=True):
        model.load_state_dict(before, strict=False)
        losses.append(accumulate(problem, model, inputs, targets, nullcontext, 1 / ranks))
        after = after or {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.load_state_dict(after, strict=False)
    return torch.stack(losses).mean()


def accumulate(
    problem: Problem,
    model: Any,
    inputs: Tensor,
    targets: Tensor,
    no_sync: Callable[[], Any],
    share: float = 1.0,
) -> Tensor:
    """The gradient of the micro-batches' mean loss, times `share`; only the last synchronises."""
    parts = problem.micro_batches
    losses = []
    for index in range(parts):
        with no_sync() if index < parts - 1 else nullcontext():
            loss = model(inputs.chunk(parts)[index], targets=targets.chunk(parts)[index])
            (loss * share / parts).backward()
        losses.append(loss.detach())
    return torch.stack(losses).mean()


def begin(problem: Problem, seed: int, device: torch.device) -> nn.Module:
    torch.manual_seed(seed)
    return problem.new_model().to(device)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def compare(run: Run, problem: Problem, ours: Trained, other: Trained, who: str) -> None:
    run.check_close(f"{problem.name}: losses equal {who}'s", ours.losses, other.losses, TOLERANCE)
    run.check_close(f"{problem.name}: weights equal {who}'s", ours.state, other.state, TOLERANCE)
