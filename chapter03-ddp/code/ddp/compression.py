"""Communication hooks: the bytes that each makes a rank send, torch's own, and error feedback.

Bytes are of a step on K ranks, from the shapes of the parameters alone; packet headers come on top.
Error feedback is measured alone: one gradient averaged again and again, and the error of the sum.
"""

import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    bf16_compress_hook,
    fp16_compress_hook,
)
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel as DDP

from distlab import predict
from distlab.host import PACKET_HEADERS
from distlab.run import Run
from distlab.runtime import Runtime

Shape = tuple[int, ...]
Payload = Callable[[Sequence[Shape], int], float]
FLOAT = 4
PACKET = 1500 - 20 - 32  # bytes of data in a full packet
MESSAGES = 10_000  # bytes of gloo's own messages in a step, which do not grow with the gradient
ELEMENTS = 50_000
ROUNDS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Hook:
    """A communication hook: how it is registered, and the bytes that a rank sends by it."""

    register: Callable[[DDP, Namespace], None]
    payload: Payload


def all_reduced(bytes_per_element: int) -> Payload:
    """A ring all-reduce of all elements: 2·(K - 1)/K·b·n."""
    return lambda shapes, workers: predict.data_parallel_bytes(
        bytes_per_element * elements(shapes), workers
    )


def exchanged_in_int8(chunk: int) -> Payload:
    """2·(K - 1)/K·n·(1 + 4/chunk), where n is rounded up to whole chunks for every rank."""

    def payload(shapes: Sequence[Shape], workers: int) -> float:
        padded = math.ceil(elements(shapes) / (workers * chunk)) * workers * chunk
        return predict.data_parallel_bytes(padded + FLOAT * padded / chunk, workers)

    return payload


def low_rank(rank: int, least_rate: float = 2.0) -> Payload:
    """PowerSGD: an all-reduce of P and one of Q, r·(n + m) elements of a gradient of n x m.

    A tensor whose P and Q together are not `least_rate` times smaller is all-reduced itself, and
    a vector always. Source: Vogels et al. (arXiv 1905.13727), algorithm 1.
    """

    def sent(shape: Shape) -> int:
        n = shape[0]
        m = math.prod(shape) // n
        thin = min(n, m, rank) * (n + m)
        return thin if thin * least_rate < n * m else n * m

    return lambda shapes, workers: predict.data_parallel_bytes(
        FLOAT * sum(map(sent, shapes)), workers
    )


def elements(shapes: Sequence[Shape]) -> int:
    return sum(map(math.prod, shapes))


def most_on_the_wire(payload: float) -> float:
    """The most bytes that a step's payload becomes at the interface, with nothing sent again.

    Every packet has headers, and every second one that comes in is acknowledged; as many come in as
    go out. The kernel counts the headers of what it hands over as one large packet once, so there
    may be fewer.
    """
    packets = payload / PACKET
    return payload + 1.5 * packets * PACKET_HEADERS + MESSAGES


def none(replica: DDP, args: Namespace) -> None:
    """DDP's own all-reduce in float32."""


def fp16(replica: DDP, args: Namespace) -> None:
    replica.register_comm_hook(None, fp16_compress_hook)


def bf16(replica: DDP, args: Namespace) -> None:
    replica.register_comm_hook(dist.group.WORLD, bfloat16_hook)


def bfloat16_hook(group: dist.ProcessGroup, bucket: dist.GradBucket) -> Future[Tensor]:
    """torch's own by another name: DDP knows that one, and refuses it without NCCL."""
    return bf16_compress_hook(group, bucket)


def powersgd(rank: int, feedback: bool = True) -> Hook:
    """`rank` columns for each matrix, which begin as those of the step before (warm start)."""

    def register(replica: DDP, args: Namespace) -> None:
        state = PowerSGDState(
            None, rank, args.start_powersgd, use_error_feedback=feedback, warm_start=True
        )
        replica.register_comm_hook(state, powerSGD_hook)

    return Hook(register, low_rank(rank))


TORCH_HOOKS = {
    "none": Hook(none, all_reduced(4)),
    "fp16": Hook(fp16, all_reduced(2)),
    "bf16": Hook(bf16, all_reduced(2)),
    "powersgd-1": powersgd(1),
    "powersgd-2": powersgd(2),
    "powersgd-4": powersgd(4),
    "powersgd-4-no-feedback": powersgd(4, feedback=False),
}


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


class FeedbackState(Protocol):
    """What a hook keeps from step to step."""

    def owed(self, parameters: Sequence[Tensor]) -> Tensor: ...


State = TypeVar("State", bound=FeedbackState)


def measure_feedback(
    job: Runtime, new_state: Callable[[bool], State], hook: Callable[[State, Any], Future[Tensor]]
) -> Feedback:
    """Average one gradient of each rank again and again, with feedback and without.

    `new_state` is told whether there is to be feedback.
    """
    generator = torch.Generator().manual_seed(1 + job.rank)
    sizes = 10 ** (-3 * torch.rand(ELEMENTS, generator=generator))  # as unequal as gradients are
    own = (sizes * torch.randn(ELEMENTS, generator=generator)).to(job.device)
    mean = mean_of_ranks(own, job)
    errors: dict[bool, list[float]] = {}
    for feedback in (True, False):
        state, owner = new_state(feedback), nn.Parameter(torch.zeros_like(own))
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
