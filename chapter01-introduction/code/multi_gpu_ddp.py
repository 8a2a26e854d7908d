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
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from distlab import data, hardware, measure, predict, runtime, script
from distlab.model import add_model_flags, config_from_args, model_from_args, num_parameters
from distlab.ranks import distinct, gathered
from distlab.run import Run
from distlab.runtime import Runtime

PRESETS = {
    "smoke": {"model": "smoke", "corpus_mb": 0.2, "seq_len": 32, "batch_size": 8, "steps": 6},
    "laptop": {"model": "laptop", "corpus_mb": 2.0, "seq_len": 128, "batch_size": 8, "steps": 10},
    "gpu": {"model": "gpu", "corpus_mb": 12.0, "seq_len": 1024, "batch_size": 32, "steps": 20},
}
TOLERANCE = 1e-5  # float32: the sums over the batch are the same, their order is not
WARMUP_STEPS = 2  # DDP arranges its buckets in the second step
WAYS = ["whole batch, alone", "share, alone", "shares, no sync", "real step", "data"]


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
    script.refuse_no_median(args, "steps", WARMUP_STEPS + 3)
    return args


def compare_with_one_process(run: Run, args: Namespace, job: Runtime) -> None:
    say_how_crowded(run, job)
    tokens = data.prepare_from_args(args, config_from_args(args).vocab_size)
    model = model_from_args(args, job.device)
    twin = copy.deepcopy(model) if job.is_main else None
    torch.manual_seed(args.seed + job.rank)
    if not job.is_main:
        model.reset_parameters()
    run.check_equal(
        "the ranks begin with different weights", distinct(model.parameters()), job.world_size
    )
    replica = DDP(model)
    run.check_equal("DDP gives all of them rank 0's", distinct(model.parameters()), 1)

    losses, times = train(run, args, job, tokens, twin, replica)

    if twin is not None:
        run.check_close("losses equal one process's", losses[:, 1], losses[:, 0], TOLERANCE)
        run.check_close(
            "final parameters equal one process's",
            dict(model.named_parameters()),
            dict(twin.named_parameters()),
            TOLERANCE,
        )
    run.check_equal(
        "all ranks end with the same weights, bit for bit", distinct(model.parameters()), 1
    )
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
    apart = DDP(copy.deepcopy(ddp.module))  # timed without sync only
    spare = Trainee(apart, args.learning_rate)
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
            with clock(step, "share, alone"), apart.no_sync():
                spare.step(*own)
        job.barrier()
        with clock(step, "shares, no sync"), apart.no_sync():
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
        self.seconds = np.zeros((steps, len(WAYS)))

    @contextmanager
    def __call__(self, step: int, way: str) -> Iterator[None]:
        self.job.synchronize()
        started = time.perf_counter()
        yield
        self.job.synchronize()
        self.seconds[step, WAYS.index(way)] = time.perf_counter() - started

    def of_all_ranks(self) -> np.ndarray:
        """Seconds [ranks, steps, WAYS], on every rank."""
        return np.array(gathered(self.seconds.tolist()))


def report_losses(run: Run, losses: np.ndarray) -> None:
    steps = list(range(len(losses)))
    run.metric("final_loss", float(losses[-1, 1]), "nats", f"after {len(losses)} steps")
    run.figure(
        "losses", kind="line", title="DDP and one process at the same global batch",
        x_label="step", y_label="loss (nats)",
        series=[
            {"label": "one process", "x": steps, "y": losses[:, 0].tolist()},
            {"label": "DDP", "x": steps, "y": losses[:, 1].tolist()},
        ],
    )  # fmt: skip


def report_times(run: Run, args: Namespace, job: Runtime, times: np.ndarray) -> None:
    """Split the real step's time into an even share of the compute, and what came on top of it."""
    steady = times[:, WARMUP_STEPS:]

    def median(way: str, over_ranks: Callable[..., np.ndarray] = np.max) -> float:
        return float(np.median(over_ranks(steady[:, :, WAYS.index(way)], axis=0)))

    alone, step = median("whole batch, alone"), median("real step")
    even, share_alone, fetched = alone / job.world_size, median("share, alone"), median("data")
    mean_share, slowest_share = median("shares, no sync", np.mean), median("shares, no sync")
    parts = {
        "compute: 1/K of one process's": even,
        "a smaller batch is less efficient": share_alone - even,
        "contention for cores and memory": mean_share - share_alone,
        "waiting for the slowest rank": slowest_share - mean_share,
        "all-reduce that backward does not hide": step - fetched - slowest_share,
        "data": fetched,
    }
    rows = [[name, 1e3 * seconds, 100 * seconds / step] for name, seconds in parts.items()]
    rows.append(["the step", 1e3 * step, 100.0])
    run.table(
        "step", ["part", "ms", "% of the step"], rows,
        caption=f"K = {job.world_size}; medians of {steady.shape[1]} steps; they sum to the step",
    )  # fmt: skip
    run.figure(
        "parts", kind="bar", title="Where the step's time goes", x_label="", y_label="time (ms)",
        series=[{"label": "ms", "x": list(parts), "y": [1e3 * s for s in parts.values()]}],
    )  # fmt: skip
    tokens = args.batch_size * args.seq_len
    run.metric("one_process", tokens / alone, "tok/s", "the twin, with a rank's threads")
    run.metric("tokens_per_second", tokens / step, "tok/s", "all ranks together")
    run.metric("scaling_efficiency", 100 * even / step, "%", "1/K of one process's time / the step")


def report_all_reduce(run: Run, job: Runtime, parameters: int) -> None:
    """Predict the all-reduce's time from shorter ones, and measure it.

    In a ring each rank sends 2·(K-1)/K of the gradient's 4·P bytes (Patarasuk and Yuan 2009), so
    time = latency + bytes / bandwidth; one of K numbers shows the latency.
    """
    sent = predict.BUS_FACTORS["all_reduce"](job.world_size) * 4 * parameters
    run.metric("all_reduce_bytes", sent, "B", "sent by each rank in a step")
    gradient = torch.zeros(parameters, device=job.device)
    few, quarter = gradient[: job.world_size], gradient[: parameters // 4]
    timings = measure.compare(
        {
            "few": lambda: dist.all_reduce(few),
            "quarter": lambda: dist.all_reduce(quarter),
            "all": lambda: dist.all_reduce(gradient),
        },
        repeats=20,
        device=job.device,
    )
    latency, seconds = timings["few"].median, timings["quarter"].median
    run.metric("all_reduce_latency", latency, "s", f"an all-reduce of {job.world_size} numbers")
    run.metric("bus_bandwidth", sent / 4 / seconds, "B/s", "of a quarter of the gradient")
    predicted = latency + 4 * max(0.0, seconds - latency)
    run.compare("all-reduce alone", predicted, timings["all"].median, "s")


if __name__ == "__main__":
    script.exit(main)
