"""What `multi_gpu_ddp.py` says of its losses, of the time of a step, and of the all-reduce."""

from argparse import Namespace
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from distlab import measure, predict
from distlab.run import Run
from distlab.runtime import Runtime

WARMUP_STEPS = 2  # DDP arranges its buckets in the second step
WAYS = ["whole batch, alone", "share, alone", "shares, no sync", "real step", "data"]


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

    def median(way: str, over_ranks: Callable = np.max) -> float:
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
        "parts", kind="bar", title="Where the step's time goes", x_label="", y_label="ms",
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
