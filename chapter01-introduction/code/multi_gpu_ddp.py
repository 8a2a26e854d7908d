"""The first distributed run: DDP on K ranks, proved equal to one process, and where its time goes.

K ranks hold the same model, each takes its b = B/K sequences of the global batch, and DDP averages
their gradients in the backward pass. Rank 0 also trains a twin: the same model, alone, on the whole
global batch. Losses and final parameters must agree. The ranks start from different weights, so
that DDP's broadcast is proved too.

In every step the same work is timed in four ways, one after another: the whole batch by rank 0
alone, a rank's share by rank 0 alone, the shares by all ranks at once without communication
(`no_sync`), and the real step. Their differences say what eats the rest of K-fold speed.

Run:
    torchrun --nproc_per_node=2 chapter01-introduction/code/multi_gpu_ddp.py
    torchrun --nproc_per_node=4 chapter01-introduction/code/multi_gpu_ddp.py
    python chapter01-introduction/code/multi_gpu_ddp.py

You should see: losses equal to the twin's to 1e-5 in all steps, the scaling efficiency, and a table
whose parts sum to the step's time. With more ranks than cores, contention takes most of it.
"""

import copy
import hashlib
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from _ddp_report import WARMUP_STEPS, WAYS, report_all_reduce, report_losses, report_times
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from distlab import data, hardware, runtime, script
from distlab.errors import UsageError
from distlab.model import add_model_flags, config_from_args, model_from_args, num_parameters
from distlab.run import Run
from distlab.runtime import Runtime

PRESETS = {
    "smoke": {"model": "smoke", "corpus_mb": 0.2, "seq_len": 32, "batch_size": 8, "steps": 6},
    "laptop": {"model": "laptop", "corpus_mb": 2.0, "seq_len": 128, "batch_size": 8, "steps": 10},
    "gpu": {"model": "gpu", "corpus_mb": 12.0, "seq_len": 1024, "batch_size": 32, "steps": 20},
}
TOLERANCE = 1e-5  # float32: the sums over the batch are the same, their order is not


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with (
        script.run(args) as run,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        compare_with_one_process(run, args, job)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    data.add_data_flags(parser)
    runtime.add_runtime_flags(parser)
    parser.add_argument("--steps", type=script.positive_int)
    parser.add_argument("--learning-rate", type=script.positive_float, default=0.03, metavar="LR")
    args = parser.parse_args(argv)
    if args.steps < WARMUP_STEPS + 3:
        raise UsageError(f"--steps {args.steps} gives no median; use {WARMUP_STEPS + 3} or more")
    return args


def compare_with_one_process(run: Run, args: Namespace, job: Runtime) -> None:
    say_how_crowded(run, job)
    tokens = data.prepare_from_args(args, config_from_args(args).vocab_size)
    model = model_from_args(args, job.device)
    twin = copy.deepcopy(model) if job.is_main else None
    torch.manual_seed(args.seed + job.rank)
    if not job.is_main:
        model.reset_parameters()
    run.check_equal("the ranks begin with different weights", distinct(model), job.world_size)
    replica = DDP(model)
    run.check_equal("DDP gives all of them rank 0's", distinct(model), 1)

    losses, times = train(run, args, job, tokens, twin, replica)

    if twin is not None:
        run.check_close("losses equal one process's", losses[:, 1], losses[:, 0], TOLERANCE)
        run.check_close(
            "final parameters equal one process's",
            dict(model.named_parameters()),
            dict(twin.named_parameters()),
            TOLERANCE,
        )
    run.check_equal("all ranks end with the same weights, bit for bit", distinct(model), 1)
    report_losses(run, losses)
    report_times(run, args, job, times)
    if job.world_size > 1:
        report_all_reduce(run, job, num_parameters(model))


def say_how_crowded(run: Run, job: Runtime) -> None:
    threads, cores = torch.get_num_threads(), hardware.machine().cores
    wanted = job.local_world_size * threads
    crowded = f"; over-subscribed: {wanted} threads take turns on them" if wanted > cores else ""
    run.print(
        f"job: {job.world_size} rank(s) of {threads} thread(s), {job.backend} on "
        f"{job.device.type}, {cores} core(s){crowded if job.device.type == 'cpu' else ''}"
    )


def distinct(model: nn.Module) -> int:
    """How many different models the ranks hold, compared bit for bit."""
    own = hashlib.sha256()
    for parameter in model.parameters():
        own.update(parameter.detach().cpu().numpy().tobytes())
    digests: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, own.hexdigest())
    return len(set(digests))


class Trainee:
    """A model with its optimizer: SGD with momentum, whose update is linear in the gradient.

    AdamW would prove less: it divides the gradient's scale out, so it would not notice a sum where
    a mean belongs, and it enlarges the rounding of gradients near zero to a full update.
    """

    def __init__(self, model: nn.Module, learning_rate: float) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)

    def step(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """One optimizer step on [batch, seq] tokens; gives the mean loss of its own batch."""
        loss = self.model(input_ids, targets=targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def train(
    run: Run, args: Namespace, job: Runtime, tokens: data.Tokens, twin: nn.Module | None, ddp: DDP
) -> tuple[np.ndarray, np.ndarray]:
    """Train the twin and the replicas; losses [steps, 2] and seconds [ranks, steps, WAYS]."""
    alone = Trainee(twin, args.learning_rate) if twin is not None else None
    together = Trainee(ddp, args.learning_rate)
    spare = Trainee(DDP(copy.deepcopy(ddp.module)), args.learning_rate)  # timed without sync only
    whole = data.Loader(tokens, args.seq_len, args.batch_size, device=job.device)
    share = data.Loader(
        tokens, args.seq_len, args.batch_size, job.rank, job.world_size, device=job.device
    )
    losses = torch.zeros(args.steps, 2, device=job.device)
    clock = Clock(job, args.steps)
    for step in run.progress(range(args.steps), "training"):
        batch = next(whole)
        own = [part.chunk(job.world_size)[job.rank] for part in batch]
        if alone is not None:
            with clock(step, "whole batch, alone"):
                losses[step, 0] = alone.step(*batch)
            with clock(step, "share, alone"), spare.model.no_sync():
                spare.step(*own)
        job.barrier()
        with clock(step, "shares, no sync"), spare.model.no_sync():
            spare.step(*own)
        job.barrier()
        with clock(step, "real step"):
            with clock(step, "data"):
                inputs, targets = next(share)
            loss = together.step(inputs, targets)
        dist.all_reduce(loss)
        losses[step, 1] = loss / job.world_size
    return losses.cpu().numpy(), clock.of_all_ranks()


class Clock:
    """Seconds of each way to do the work, in each step."""

    def __init__(self, job: Runtime, steps: int) -> None:
        self.job = job
        self.seconds = torch.zeros(steps, len(WAYS), dtype=torch.float64)

    @contextmanager
    def __call__(self, step: int, way: str) -> Iterator[None]:
        self.job.synchronize()
        started = time.perf_counter()
        yield
        self.job.synchronize()
        self.seconds[step, WAYS.index(way)] = time.perf_counter() - started

    def of_all_ranks(self) -> np.ndarray:
        """Seconds [ranks, steps, WAYS], on every rank."""
        own = self.seconds.to(self.job.device)
        gathered = [torch.empty_like(own) for _ in range(self.job.world_size)]
        dist.all_gather(gathered, own)
        return torch.stack(gathered).cpu().numpy()


if __name__ == "__main__":
    script.exit(main)
