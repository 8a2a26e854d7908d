"""Mixed precision under DDP: float32, bfloat16 and float16, and what float16's small range needs.

Autocast runs the matrix products in 16 bits. Weights, gradients and Adam's state stay float32; what
the forward pass keeps for the backward pass is about halved. bfloat16 has float32's range. float16
has not: gradients below 6e-8 become zero, so the loss is multiplied by a large scale before the
backward pass and the gradients are divided by it after. A scale that is too large gives infinity.
DDP's all-reduce carries one rank's infinity to all, so every rank's scaler skips the same step and
halves the same scale.

Run:
    torchrun --nproc_per_node=2 chapter03-ddp/code/amp_ddp.py --figures build/figures
    python chapter03-ddp/code/amp_ddp.py

You should see: the same losses in all three; the same bytes of weights, gradients and moments, and
fewer of activations, unless the tokens of a step are so few that autocast's 16-bit copies of the
weights outweigh what it saves; a step that one rank's overflow makes all of them skip; and what two
mistakes do: no scaler (gradients vanish), and clipping before unscale_ (to a norm that is not the
gradient's). A CPU without 16-bit matrix units is slower with 16 bits than with 32.

Sources: Micikevicius et al., "Mixed Precision Training" (arXiv 1710.03740), section 3.
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from ddp.amp import (
    Lab,
    report_clipping,
    report_memory,
    report_overflow,
    report_underflow,
)  # fmt: skip
from distlab import data, measure, runtime, script
from distlab.errors import Skipped
from distlab.model import add_model_flags, config_from_args, model_from_args
from distlab.ranks import distinct
from distlab.run import Run
from distlab.runtime import Runtime

PRESETS: dict[str, dict[str, object]] = {
    "smoke": {"model": "smoke", "corpus_mb": 0.2, "seq_len": 16, "batch_size": 4, "steps": 6},
    "laptop": {"model": "smoke", "corpus_mb": 2.0, "seq_len": 64, "batch_size": 8, "steps": 40},
    "gpu": {"model": "gpu", "corpus_mb": 12.0, "seq_len": 1024, "batch_size": 16, "steps": 40},
}


LAST = 5  # steps, over which a loss is averaged
WARMUP = 2
LOSS_TOLERANCE = 0.02  # relative: 16 bits round otherwise, and training amplifies it


@dataclass(frozen=True)
class Precision:
    """What autocast computes in (None: no autocast), and whether the loss is scaled."""

    dtype: torch.dtype | None = None
    scaled: bool = False


PRECISIONS = {
    "float32": Precision(),
    "bfloat16": Precision(torch.bfloat16),
    "float16": Precision(torch.float16, scaled=True),
    "float16-no-scaler": Precision(torch.float16),
}


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with (
        script.run(args) as run,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        run.print(f"job: {job.world_size} rank(s), {job.backend} on {job.device.type}")
        refuse_without_16_bits(job.device)
        lab = new_lab(args, job)
        compare_precisions(run, lab)
        report_overflow(run, lab)
        report_underflow(run, lab)
        report_clipping(run, lab)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    data.add_data_flags(parser)
    runtime.add_runtime_flags(parser)
    add = parser.add_argument
    add("--steps", type=script.positive_int, help="to train in each precision")
    add("--learning-rate", type=script.positive_float, default=2e-3, metavar="LR")
    add("--clip", type=script.positive_float, default=1.0, help="largest norm of the gradient")
    add("--scale", type=script.positive_float, default=2.0**16, help="the scaler's first")
    args = parser.parse_args(argv)
    config_from_args(args)  # a wrong shape is told before anything starts
    script.refuse_no_median(args, "steps", 5)
    return args


def refuse_without_16_bits(device: torch.device) -> None:
    """Old processors and old builds of torch have no 16-bit matrix product."""
    for dtype in (torch.bfloat16, torch.float16):
        narrow = torch.ones(8, 8, device=device, dtype=dtype)
        try:
            _ = narrow @ narrow
        except RuntimeError as error:
            raise Skipped(f"no matrix product in {dtype} on {device.type}: {error}") from error


class Trainee:
    """A replica, its optimizer and its scaler; one step of training in one precision."""

    def __init__(
        self,
        model: nn.Module,
        precision: Precision,
        args: Namespace,
        device: torch.device,
        optimizer: str = "adamw",
        **scaler: float,
    ) -> None:
        self.precision, self.clip, self.device = precision, args.clip, device
        self.replica = DDP(model, gradient_as_bucket_view=True)
        self.parameters = list(model.parameters())
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(self.parameters, lr=args.learning_rate)
            if optimizer == "adamw"
            else torch.optim.SGD(self.parameters, lr=0.3, momentum=0.9)
        )
        self.scaler = torch.amp.GradScaler(
            device.type, **{"init_scale": args.scale, **scaler}, enabled=precision.scaled
        )
        self.clip_first = False  # the mistake
        self.norm = 0.0  # of the gradient that the optimizer was given last

    def loss(self, model: nn.Module, input_ids: Tensor, targets: Tensor) -> Tensor:
        dtype = self.precision.dtype
        with torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            return model(input_ids, targets=targets)

    def step(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """One step on this rank's [b, seq] tokens; its mean loss. The order is what matters."""
        loss = self.loss(self.replica, input_ids, targets)
        self.scaler.scale(loss).backward()  # DDP averages the scaled gradients
        if self.clip_first:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
            self.scaler.unscale_(self.optimizer)
        else:
            self.scaler.unscale_(self.optimizer)  # looks for infinities on the way
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.norm = gradient_norm(self.parameters)
        self.scaler.step(self.optimizer)  # skipped where one was found
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss.detach()


def new_lab(args: Namespace, job: Runtime) -> Lab:
    tokens = data.prepare_from_args(args, config_from_args(args).vocab_size)
    batches = data.Loader(
        tokens, args.seq_len, args.batch_size, job.rank, job.world_size, args.seed, job.device
    )

    def new_trainee(
        model: nn.Module, precision: str, optimizer: str = "adamw", **scaler: float
    ) -> Trainee:
        return Trainee(model, PRECISIONS[precision], args, job.device, optimizer, **scaler)

    return Lab(args, job, model_from_args(args, job.device), batches, new_trainee)


def compare_precisions(run: Run, lab: Lab) -> None:
    """Train in every precision, in turns, so that a change of the machine's speed meets all."""
    trainees = {name: lab.trainee(name) for name in PRECISIONS}
    losses: dict[str, list[Tensor]] = {name: [] for name in PRECISIONS}
    batches = lab.first_batches(lab.args.steps)
    fed = {name: iter(batches) for name in PRECISIONS}
    fed["float32"] = run.progress(batches, "training")

    def step(name: str) -> None:
        losses[name].append(trainees[name].step(*next(fed[name])))

    timings = measure.compare(
        {name: partial(step, name) for name in PRECISIONS},
        warmup=0, repeats=lab.args.steps, device=lab.job.device, before=lab.job.barrier,
    )  # fmt: skip
    models = [distinct(trainee.parameters) for trainee in trainees.values()]
    run.check_equal("all ranks end with the same weights", models, [1] * len(models))
    report_losses(run, {name: lab.mean(own) for name, own in losses.items()})
    report_speed(run, lab.job, {name: timing.samples for name, timing in timings.items()})
    report_memory(run, lab, trainees)


def gradient_norm(parameters: list[nn.Parameter]) -> float:
    norms = [p.grad.norm() for p in parameters if p.grad is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def report_losses(run: Run, losses: Mapping[str, Sequence[float]]) -> None:
    run.figure(
        "losses", kind="line", title="The same training in each precision", x_label="step",
        y_label="loss (nats)",
        series=[
            {"label": name, "x": list(range(len(own))), "y": list(own)}
            for name, own in losses.items()
        ],
    )  # fmt: skip
    final = {name: float(np.mean(own[-LAST:])) for name, own in losses.items()}
    run.extra(losses=losses)
    for name in ("bfloat16", "float16"):
        run.check_close(
            f"{name} ends with float32's loss", final[name], final["float32"], LOSS_TOLERANCE, True
        )


def report_speed(run: Run, job: Runtime, seconds: Mapping[str, Sequence[float]]) -> None:
    medians = {name: float(np.median(own[WARMUP:])) for name, own in seconds.items()}
    plain = medians["float32"]
    run.table(
        "speed",
        ["precision", "step ms", "times as fast as float32"],
        [[name, 1e3 * median, plain / median] for name, median in medians.items()],
        caption=f"A step of one rank of {job.world_size}, medians, timed in turns",
    )
    best = min(("bfloat16", "float16"), key=medians.__getitem__)
    faster = plain / medians[best]
    run.print(
        f"verdict: on this {job.device.type} 16 bits are "
        + (f"{faster:.2f} times as fast" if faster > 1 else f"{1 / faster:.2f} times as slow")
    )


if __name__ == "__main__":
    script.exit(main)
