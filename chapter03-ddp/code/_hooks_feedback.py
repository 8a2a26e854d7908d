"""What error feedback is worth: the same gradient averaged again and again, and the sum's error."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distlab.run import Run
from distlab.runtime import Runtime

ELEMENTS = 50_000
ROUNDS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Feedback:
    """Errors of the sum of n averages, as a share of one average's norm, for each of `ROUNDS`."""

    kept: list[float]  # with feedback
    lost: list[float]  # without
    owed: float  # the mean of the ranks' residuals at the end


@dataclass
class OneBucket:
    """Of a `GradBucket`, what a hook reads; torch's own is only made by DDP."""

    gradient: Tensor  # [elements]
    owner: nn.Parameter

    def buffer(self) -> Tensor:
        return self.gradient

    def parameters(self) -> list[Tensor]:
        return [self.owner]

    def index(self) -> int:
        return 0

    def is_last(self) -> bool:
        return True


def measure_feedback(
    job: Runtime, new_state: Callable[..., Any], hook: Callable[..., Any]
) -> Feedback:
    """Average one gradient of each rank again and again, with feedback and without."""
    generator = torch.Generator().manual_seed(1 + job.rank)
    sizes = 10 ** (-3 * torch.rand(ELEMENTS, generator=generator))  # as unequal as gradients are
    own = (sizes * torch.randn(ELEMENTS, generator=generator)).to(job.device)
    mean = mean_of_ranks(own, job)
    errors: dict[bool, list[float]] = {}
    for feedback in (True, False):
        state, owner = new_state(feedback=feedback), nn.Parameter(torch.zeros_like(own))
        total, errors[feedback] = torch.zeros_like(mean), []
        for done in range(1, max(ROUNDS) + 1):
            total += hook(state, OneBucket(own.clone(), owner)).wait().double()
            if done in ROUNDS:
                errors[feedback].append(float((total - done * mean).norm() / mean.norm()))
        if feedback:
            owed = mean_of_ranks(state.owed([owner]), job)
    return Feedback(errors[True], errors[False], float(owed.norm() / mean.norm()))


def mean_of_ranks(values: Tensor, job: Runtime) -> Tensor:
    total = values.double()
    dist.all_reduce(total)
    return total / job.world_size


def report_feedback(run: Run, found: Feedback) -> None:
    """With feedback what was applied and what is owed make the sum; without, n roundings do."""
    run.table(
        "feedback",
        ["gradients", "with feedback %", "without %"],
        [
            [n, 100 * kept, 100 * lost]
            for n, kept, lost in zip(ROUNDS, found.kept, found.lost, strict=True)
        ],
        caption="Error of the sum of so many int8 averages of one gradient, in % of one average",
    )
    last, first = found.kept[-1], found.lost[0]
    run.compare("error with feedback: what is owed", 100 * found.owed, 100 * last, "%")
    run.compare(
        f"error without: {ROUNDS[-1]} roundings",
        100 * ROUNDS[-1] * first,
        100 * found.lost[-1],
        "%",
    )
    run.check_close(
        "what was applied and what is owed make the whole sum", last, found.owed, 1e-3, True
    )
    run.check_below("with feedback the error does not grow", last, 2 * found.kept[0])
