"""Experiments with mixed precision under DDP: memory, an overflow on one rank, and two mistakes.

The trainee, whose step is the lesson, is that of `amp_ddp.py`; here it is only known what it can.
"""

import copy
import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel as DDP

from distlab import data, predict
from distlab.display import side_by_side
from distlab.measure import LiveBytes, tensor_bytes
from distlab.model import Llama
from distlab.ranks import digest, gathered
from distlab.run import Run
from distlab.runtime import Runtime

PARTS = ("weights", "gradients", "moments", "activations")
TOLERANCE = 0.15  # of the activations: the formula leaves out small tensors
OVERFLOW_STEPS = 12
GROWTH_INTERVAL = 4  # good steps, after which the scale doubles; torch's default is 2000
LARGEST = 60  # log2 of a scale that is too large for every gradient
CLIPPED_STEPS = 8
SCALE = 2.0**16  # GradScaler's first, by default
ACCUMULATED = (1, 64, 4096)  # micro-batches in a step
# The smallest numbers of the formats; what is below half of it rounds to zero.
SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133}


class Trainee(Protocol):
    """A replica, its optimizer and its scaler; one step of training in one precision."""

    replica: DDP
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    clip_first: bool  # the mistake
    norm: float  # of the gradient that the optimizer was given last

    def loss(self, model: nn.Module, input_ids: Tensor, targets: Tensor) -> Tensor: ...
    def step(self, input_ids: Tensor, targets: Tensor) -> Tensor: ...


class NewTrainee(Protocol):
    """Makes a trainee; `scaler` are settings of its scaler."""

    def __call__(
        self, model: nn.Module, precision: str, optimizer: str = "adamw", **scaler: float
    ) -> Trainee: ...


@dataclass(frozen=True)
class Lab:
    """What every experiment begins with: the same weights, and batches in the same order."""

    args: Namespace
    job: Runtime
    model: Llama
    batches: data.Loader
    new_trainee: NewTrainee

    def trainee(self, precision: str, optimizer: str = "adamw", **scaler: float) -> Trainee:
        """A new replica with the first weights."""
        return self.new_trainee(copy.deepcopy(self.model), precision, optimizer, **scaler)

    def first_batches(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """This rank's, always the same."""
        self.batches.load_state_dict({**self.batches.state_dict(), "samples_consumed": 0})
        return [next(self.batches) for _ in range(count)]

    def mean(self, losses: list[Tensor]) -> list[float]:
        """The means over the ranks, which have equal shares of the batch."""
        total = torch.stack(losses)
        dist.all_reduce(total)
        return (total / self.job.world_size).tolist()


def report_memory(run: Run, lab: Lab, trainees: Mapping[str, Trainee]) -> None:
    """Bytes of a rank in each precision. Only the activations depend on it."""
    rows, worst = [], 0.0
    for name in ("float32", "bfloat16", "float16"):
        predicted = predicted_bytes(lab, "fp32" if name == "float32" else "autocast")
        measured = measured_bytes(lab, trainees[name])
        rows += [
            [name, part, *side_by_side(p, m, 1e-6)]
            for part, p, m in zip(PARTS, predicted, measured, strict=True)
        ]
        run.check_equal(f"{name}: weights, gradients and moments", measured[:3], predicted[:3])
        worst = max(worst, abs(predicted[3] - measured[3]) / measured[3])
    run.table("memory", ["precision", "bytes of", "MB predicted", "MB measured", "error %"], rows)
    run.check_below("the worst error of the activations' prediction", worst, TOLERANCE)


def predicted_bytes(lab: Lab, precision: str) -> list[int]:
    a = lab.model.config.architecture
    state = predict.model_state(predict.total_parameters(a), precision, "adamw")
    local_batch = lab.batches.local_batch_size
    saved = predict.saved_activations(a, precision, lab.args.seq_len, local_batch)
    return [int(n) for n in (state.weights, state.gradients, state.optimizer, saved)]


def measured_bytes(lab: Lab, trainee: Trainee) -> list[int]:
    """Of the tensors themselves; the activations are what the forward pass leaves behind it."""
    ((input_ids, targets),) = lab.first_batches(1)
    with LiveBytes(lab.job.device) as live:
        loss = trainee.loss(trainee.replica.module, input_ids, targets)
        kept = live.bytes
    loss.backward()
    moments = [
        state[name]
        for state in trainee.optimizer.state.values()
        for name in ("exp_avg", "exp_avg_sq")
    ]
    gradients = [p.grad for p in trainee.parameters if p.grad is not None]
    sizes = [tensor_bytes(trainee.parameters), tensor_bytes(gradients), tensor_bytes(moments), kept]
    trainee.optimizer.zero_grad()
    return sizes


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


def report_overflow(run: Run, lab: Lab) -> None:
    """Train with a scale that is too large for one rank's batch, and for no other's."""
    batches = lab.first_batches(OVERFLOW_STEPS)
    thresholds = sorted(gathered(largest_scale(lab, *batches[0])))
    second = [*thresholds, 4 * thresholds[0]][1]  # alone there is no other rank
    scale = math.sqrt(thresholds[0] * second)
    trainee = lab.trainee("float16", init_scale=scale, growth_interval=GROWTH_INTERVAL)
    watch = Watch()
    trainee.replica.register_comm_hook(None, watch.hook)
    before = digest(trainee.parameters)
    ranks = gathered([watched_step(trainee, watch, *batch) for batch in batches])
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
    run.check_equal(
        "in every step all ranks agree: scale, skip, weights", same, [1] * OVERFLOW_STEPS
    )
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


def largest_scale(lab: Lab, input_ids: Tensor, targets: Tensor) -> float:
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


def watched_step(trainee: Trainee, watch: Watch, input_ids: Tensor, targets: Tensor) -> Step:
    watch.finite = True
    scale = trainee.scaler.get_scale()
    loss = trainee.step(input_ids, targets)
    skipped = trainee.scaler.get_scale() < scale
    averaged = not math.isfinite(trainee.norm)
    return Step(scale, not watch.finite, averaged, skipped, digest(trainee.parameters), float(loss))


def report_underflow(run: Run, lab: Lab) -> None:
    """The share of the gradient that is zero in 16 bits and is not in float32.

    The loss is a mean over all tokens of a step, those of accumulated micro-batches too: the more
    of them, the smaller is what one of them adds. The gradient of the logits is about 1 / (tokens
    times vocabulary), and it vanishes first.
    """
    (batch,) = lab.first_batches(1)
    rows: list[list[Any]] = []
    for accumulate in ACCUMULATED:
        exact = gradient(lab, "float32", 1 / accumulate, *batch)
        for precision, scale in (("float16", 1.0), ("float16", SCALE), ("bfloat16", 1.0)):
            narrow = gradient(lab, precision, scale / accumulate, *batch)
            vanished = (narrow == 0) & (exact != 0)
            below = exact.abs() * scale < SMALLEST[precision] / 2
            rows.append(
                [accumulate, accumulate * batch[0].numel(), precision, scale,
                 100 * share(below & (exact != 0)), 100 * share(vanished)]
            )  # fmt: skip
    run.table(
        "underflow",
        ["micro-batches", "tokens", "precision", "scale", "below range %", "vanished %"],
        rows,
        caption="The share of a rank's gradient that is below the format's range by its float32 "
        "value, and that is zero although it is not in float32",
    )
    without, scaled, _ = (row[-1] for row in rows[3:6])
    run.check_below("the scale saves nine tenths of what vanishes", scaled, without / 10, "%")


def share(of: Tensor) -> float:
    return float(of.double().mean())


def gradient(lab: Lab, precision: str, scale: float, input_ids: Tensor, targets: Tensor) -> Tensor:
    """This rank's own, of the scaled loss; shape [parameters]."""
    trainee = lab.trainee(precision)
    loss = trainee.loss(trainee.replica.module, input_ids, targets)
    gradients = torch.autograd.grad(loss * scale, trainee.parameters)
    return torch.cat([one.flatten() for one in gradients])


def report_clipping(run: Run, lab: Lab) -> None:
    """Clip in both orders, under both optimizers: the norm that they get, and the loss."""
    rows: list[list[Any]] = []
    norms = {}
    for optimizer in ("sgd", "adamw"):
        for clip_first in (False, True):
            trainee = lab.trainee("float16", optimizer=optimizer)
            trainee.clip_first = clip_first
            losses, given = [], []
            for batch in lab.first_batches(CLIPPED_STEPS):
                losses.append(trainee.step(*batch))
                given.append(trainee.norm)
            order = "clip, then unscale_" if clip_first else "unscale_, then clip"
            mean = lab.mean(losses)
            norms[clip_first] = float(np.nanmedian(given))  # NaN where a step was skipped
            rows.append([optimizer, order, norms[clip_first], mean[0], mean[-1]])
    run.table(
        "clipping",
        ["optimizer", "order", "norm", "first loss", f"loss after {CLIPPED_STEPS} steps"],
        rows,
        caption=f"The norm that the optimizer gets (median), clipped to {lab.args.clip:g}",
    )
    scale = lab.args.scale
    run.compare("norm after clipping the scaled gradient", lab.args.clip / scale, norms[True])
    run.check_above("SGD then learns nothing: loss after the mistake", rows[1][4], rows[0][4])
