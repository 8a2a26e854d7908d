"""An overflow on one rank: what the all-reduce makes of it, and how all scalers recover."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future

from distlab.run import Run

if TYPE_CHECKING:
    from amp_ddp import Lab, Trainee

STEPS = 12
GROWTH_INTERVAL = 4  # good steps, after which the scale doubles; torch's default is 2000
LARGEST = 60  # log2 of a scale that is too large for every gradient


class Watch:
    """A communication hook that looks at this rank's gradients before DDP averages them."""

    def __init__(self) -> None:
        self.finite = True

    def hook(self, state: object, bucket: dist.GradBucket) -> Future[Tensor]:
        self.finite &= bool(bucket.buffer().isfinite().all())
        group = dist.distributed_c10d._get_default_group()
        return allreduce_hook(group, bucket)


@dataclass(frozen=True)
class Step:
    """One step, as one rank sees it."""

    scale: float  # before it
    own: bool  # whether this rank's gradient has an infinity or NaN
    averaged: bool  # whether it has one after the all-reduce
    skipped: bool
    weights: str  # their digest after it
    loss: float


def report_overflow(run: Run, lab: "Lab") -> None:
    """Train with a scale that is too large for one rank's batch, and for no other's."""
    batches = lab.first_batches(STEPS)
    thresholds = sorted(lab.of_all_ranks(largest_scale(lab, *batches[0])))
    second = [*thresholds, 4 * thresholds[0]][1]  # alone there is no other rank
    scale = math.sqrt(thresholds[0] * second)
    trainee = lab.trainee("float16", init_scale=scale, growth_interval=GROWTH_INTERVAL)
    watch = Watch()
    trainee.replica.register_comm_hook(None, watch.hook)
    before = trainee.digest()
    ranks = lab.of_all_ranks([watched_step(trainee, watch, *batch) for batch in batches])
    steps = list(zip(*ranks, strict=True))  # [steps][ranks]
    run.table(
        "overflow",
        ["step", "scale", "with inf", "after the all-reduce", "that skip", "loss"],
        [
            [n, ranks[0].scale, count(ranks, "own"), count(ranks, "averaged"),
             count(ranks, "skipped"), sum(one.loss for one in ranks) / len(ranks)]
            for n, ranks in enumerate(steps)
        ],
        caption="float16 with a scale too large for one rank's batch; how many of "
        f"{lab.job.world_size} rank(s)",
    )  # fmt: skip
    first, everybody = steps[0], lab.job.world_size
    run.check_equal("in step 0 one rank overflows", count(first, "own"), 1)
    run.check_equal("after the all-reduce all of them have it", count(first, "averaged"), everybody)
    run.check_equal(
        "and the step changes no weight", {one.weights for one in first} == {before}, True
    )
    same = [len({(one.scale, one.skipped, one.weights) for one in ranks}) for ranks in steps]
    run.check_equal("in every step all ranks agree: scale, skip, weights", same, [1] * STEPS)
    overflows = [any(one.own for one in ranks) for ranks in steps]
    run.check_equal(
        "skipped are the steps with an overflow", [r[0].skipped for r in steps], overflows
    )
    run.check_close(
        "the scale is halved and doubled by the rule", [ranks[0].scale for ranks in steps],
        scales_by_rule(scale, overflows), 1e-6, relative=True,
    )  # fmt: skip
    with torch.no_grad():
        again = lab.mean([trainee.loss(trainee.replica.module, *batches[0])])[0]
    loss = sum(one.loss for one in first) / everybody
    run.check_below("training goes on: step 0's batch now has a loss of", again, loss)


def count(ranks: Sequence[Step], what: str) -> int:
    return sum(getattr(one, what) for one in ranks)


def scales_by_rule(scale: float, overflows: Sequence[bool]) -> list[float]:
    """Halved after an overflow, doubled after `GROWTH_INTERVAL` steps in a row without one."""
    scales, good = [], 0
    for overflow in overflows:
        scales.append(scale)
        good = 0 if overflow else good + 1
        if overflow:
            scale /= 2
        elif good == GROWTH_INTERVAL:
            scale, good = 2 * scale, 0
    return scales


def largest_scale(lab: "Lab", input_ids: Tensor, targets: Tensor) -> float:
    """The largest scale with which this rank's own gradient is finite, to 0.3 %, by bisection."""
    trainee = lab.trainee("float16")
    module = trainee.replica.module  # without DDP: nothing is averaged
    loss = trainee.loss(module, input_ids, targets)
    low, high = 0.0, float(LARGEST)
    while high - low > 1 / 256:
        middle = (low + high) / 2
        scaled = loss * 2**middle
        gradients = torch.autograd.grad(scaled, trainee.parameters, retain_graph=True)
        finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
        low, high = (middle, high) if finite else (low, middle)
    return 2**low


def watched_step(trainee: "Trainee", watch: Watch, input_ids: Tensor, targets: Tensor) -> Step:
    watch.finite = True
    scale = trainee.scaler.get_scale()
    loss = trainee.step(input_ids, targets)
    skipped = trainee.scaler.get_scale() < scale
    averaged = not math.isfinite(trainee.norm)
    return Step(scale, not watch.finite, averaged, skipped, trainee.digest(), float(loss))
