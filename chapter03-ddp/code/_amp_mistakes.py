"""Two mistakes with float16: no scaler, so that gradients vanish, and clipping scaled gradients."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from distlab.run import Run

if TYPE_CHECKING:
    from amp_ddp import Lab

STEPS = 8
SCALE = 2.0**16  # GradScaler's first, by default
ACCUMULATED = (1, 64, 4096)  # micro-batches in a step
# The smallest numbers of the formats; what is below half of it rounds to zero.
SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133}


def report_underflow(run: Run, lab: "Lab") -> None:
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


def gradient(
    lab: "Lab", precision: str, scale: float, input_ids: Tensor, targets: Tensor
) -> Tensor:
    """This rank's own, of the scaled loss; shape [parameters]."""
    trainee = lab.trainee(precision)
    loss = trainee.loss(trainee.replica.module, input_ids, targets)
    gradients = torch.autograd.grad(loss * scale, trainee.parameters)
    return torch.cat([one.flatten() for one in gradients])


def report_clipping(run: Run, lab: "Lab") -> None:
    """Clip in both orders, under both optimizers: the norm that they get, and the loss."""
    rows: list[list[Any]] = []
    norms = {}
    for optimizer in ("sgd", "adamw"):
        for clip_first in (False, True):
            trainee = lab.trainee("float16", optimizer=optimizer)
            trainee.clip_first = clip_first
            losses, given = [], []
            for batch in lab.first_batches(STEPS):
                losses.append(trainee.step(*batch))
                given.append(trainee.norm)
            order = "clip, then unscale_" if clip_first else "unscale_, then clip"
            mean = lab.mean(losses)
            norms[clip_first] = float(np.nanmedian(given))  # NaN where a step was skipped
            rows.append([optimizer, order, norms[clip_first], mean[0], mean[-1]])
    run.table(
        "clipping",
        ["optimizer", "order", "norm", "first loss", f"loss after {STEPS} steps"],
        rows,
        caption=f"The norm that the optimizer gets (median), clipped to {lab.args.clip:g}",
    )
    scale = lab.args.scale
    run.compare("norm after clipping the scaled gradient", lab.args.clip / scale, norms[True])
    run.check_above("SGD then learns nothing: loss after the mistake", rows[1][4], rows[0][4])
