"""What the parallelism scripts share: their flags, the one-process model, and the proof.

Every rank computes the one-process model for itself, on the whole batch, and compares with it what
the ranks have computed together.
"""

import copy
import math
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distlab import data, runtime, script
from distlab.errors import UsageError
from distlab.model import (
    Llama,
    add_model_flags,
    config_from_args,
    model_from_args,
    num_parameters,
)
from distlab.predict.plan import divisors
from distlab.ranks import gathered
from distlab.run import Run
from distlab.runtime import Runtime

Presets = Mapping[str, Mapping[str, Any]]
PRESETS: Presets = {
    "smoke": {
        "model": "smoke", "heads": 8, "kv_heads": 4,
        "corpus_mb": 0.2, "seq_len": 32, "batch_size": 8,
    },
    "laptop": {"model": "laptop", "corpus_mb": 2.0, "seq_len": 128, "batch_size": 8},
    "gpu": {"model": "gpu", "corpus_mb": 12.0, "seq_len": 1024, "batch_size": 8},
}  # fmt: skip
TOLERANCE = 1e-5  # float32 rounds at 6e-8; the sums are the same, their order is not
FLOAT = 4  # bytes


def parser(doc: str | None, presets: Presets = PRESETS) -> script.Parser:
    """The flags of every parallelism script."""
    made = script.Parser(doc, presets)
    add_model_flags(made)
    data.add_data_flags(made)
    runtime.add_runtime_flags(made)
    return made


@dataclass(frozen=True)
class Problem:
    """A model, one global batch [batch, seq], and what one process makes of them."""

    model: Llama
    input_ids: Tensor
    targets: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]

    def new_model(self) -> Llama:
        """The model before its first step, to be changed as one likes."""
        return copy.deepcopy(self.model)


def one_process(run: Run, args: Namespace, job: Runtime) -> Problem:
    """The loss and the gradients of one process, and what they are of."""
    tokens = data.prepare_from_args(args, config_from_args(args).vocab_size)
    batch = next(data.Loader(tokens, args.seq_len, args.batch_size, device=job.device))
    model = model_from_args(args, job.device)
    run.print(
        f"job: {job.world_size} rank(s), {job.backend} on {job.device.type}; "
        f"{num_parameters(model):,} parameters, {args.batch_size} x {args.seq_len} tokens"
    )
    return solve(model, *batch)


def solve(model: Llama, input_ids: Tensor, targets: Tensor) -> Problem:
    alone = copy.deepcopy(model)
    loss = alone.loss(input_ids, targets)
    loss.backward()
    return Problem(model, input_ids, targets, loss.detach(), gradients_of(alone))


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """By name; a tied weight is there once, under its first name."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def gradient_of(tensor: Tensor) -> Tensor:
    """What a backward pass has left in `tensor`."""
    if tensor.grad is None:
        raise ValueError("no backward pass has reached this tensor")
    return tensor.grad


def check_equal(
    run: Run,
    who: str,
    loss: Tensor,
    gradients: Mapping[str, Tensor],
    problem: Problem,
    own_part: Callable[[str, Tensor], Tensor] = lambda name, whole: whole,
) -> None:
    """Compare with one process; `own_part` cuts from a gradient what this rank should have of it.

    A gradient's differences count in units of its largest element: a small gradient that is all
    wrong is wrong by less than 1e-5 in absolute terms.
    """
    expected = {name: own_part(name, whole) for name, whole in problem.gradients.items()}
    run.check_close(f"{who}: the loss is one process's", loss, problem.loss, TOLERANCE)
    run.check_close(
        f"{who}: each gradient is one process's", gradients, expected, TOLERANCE, relative=True
    )


def check_share(
    run: Run, who: str, loss: Tensor, gradients: Mapping[str, Tensor], problem: Problem, place: str
) -> None:
    """Compare the gradients that this rank holds; one process's must each be on some `place`."""
    held = {name for names in gathered(list(gradients)) for name in names}
    run.check_equal(f"{who}: every gradient is on a {place}", len(held), len(problem.gradients))
    own = {name: problem.gradients[name] for name in gradients}
    check_equal(run, who, loss, gradients, replace(problem, gradients=own))


def check_shares(flag: str, count: int, shares: int, what: str) -> None:
    """Raise `UsageError` where `count`, which `flag` gave, is no multiple of `shares`."""
    if count % shares:
        below = count // shares * shares
        fitting = " or ".join(str(size) for size in (below, below + shares) if size)
        raise UsageError(f"{flag} {count} is not divisible by {shares} {what}; use {fitting}")


def check_degree(ranks: int, counts: Mapping[str, int], instead: str = "") -> None:
    """Raise `UsageError` where the ranks cannot share out evenly what is counted in `counts`."""
    for name, count in counts.items():
        if count % ranks:
            usable = divisors(math.gcd(*counts.values()))
            raise UsageError(
                f"--nproc_per_node {ranks} does not divide {count} {name}; use {usable}{instead}"
            )


def begin_differently(model: Llama, seed: int, rank: int) -> None:
    """New weights of the rank's own, but for rank 0."""
    if rank > 0:
        torch.manual_seed(seed + rank)
        model.reset_parameters()


def mean_loss(loss: Tensor) -> Tensor:
    """The mean of the ranks' losses, which have equal shares of the batch."""
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return mean / dist.get_world_size()
