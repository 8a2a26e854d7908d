"""DeepSpeed's own instruments, checked before they are believed; and buckets chosen with them.

Its FLOPs profiler counts what a forward pass multiplies and adds: compared with the formula of
chapter 1. Its communication log has the calls and sizes of a step: compared, on nodes of a cluster,
with the bytes that went through the interface. Then steps are timed over the size of the buckets in
which stage 2 sends its gradients.

Run:
    torchrun --nproc_per_node=2 chapter05-deepspeed-zero/code/profile_deepspeed.py
    python3 scripts/lab.py cluster --nodes 2 --rate 1gbit --delay 1ms -- \\
        torchrun --nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d \\
        --rdzv_endpoint=node0:29500 chapter05-deepspeed-zero/code/profile_deepspeed.py

You should see: the profiler within 2 % of the formula; each kind of call with its number and bytes,
which together are what the interface counted; and a step that is slow with small buckets, where
each call waits for the link's delay.
"""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distlab import predict, runtime, script
from distlab.model import (
    add_model_flags,
    config_from_args,
    model_from_args,
    num_parameters,
)
from distlab.ranks import gathered, in_turns
from distlab.run import Run
from distlab.runtime import Runtime
from distlab.traffic import bytes_sent
from zero import engine

PRESETS: dict[str, dict[str, object]] = {
    "smoke": {"model": "smoke", "batch_size": 2, "seq_len": 32, "repeats": 3,
              "buckets": [10_000, 1_000_000]},
    "laptop": {"model": "laptop", "batch_size": 2, "seq_len": 128, "repeats": 9,
               "buckets": [10_000, 30_000, 100_000, 300_000, 1_000_000, 5_000_000]},
    "gpu": {"model": "gpu", "batch_size": 4, "seq_len": 512, "repeats": 15,
            "buckets": [100_000, 1_000_000, 10_000_000, 100_000_000, 500_000_000]},
}  # fmt: skip
PROFILER = 0.02  # of the formula's operations, at most
LOG = 0.02  # of the interface's bytes, at most: what the rendezvous and barriers send
FLOAT = 4  # bytes
A_FEW = 64  # bytes: a norm, or a flag
WARMUP_STEPS = 2


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with (
        script.run(args) as run,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        run.print(f"job: {job.world_size} rank(s), {job.backend} on {job.device.type}")
        engine.load()
        count_operations(run, args, job)
        read_log(run, args, job)
        choose_buckets(run, args, job)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    runtime.add_runtime_flags(parser)
    add = parser.add_argument
    add("--batch-size", type=script.positive_int, help="of a rank, sequences")
    add("--seq-len", type=script.positive_int)
    add("--repeats", type=script.positive_int, help="timed steps with each bucket")
    add("--buckets", nargs="+", type=script.positive_int, metavar="N", help="numbers in a bucket")
    args = parser.parse_args(argv)
    script.refuse_no_median(args, "repeats")
    return args


def count_operations(run: Run, args: Namespace, job: Runtime) -> None:
    """It counts by replacing torch's functions, so it sees what Python calls, and no backward."""
    from deepspeed.profiling.flops_profiler import FlopsProfiler

    model = model_from_args(args, job.device)
    inputs, targets = engine.own_batch(args, job)
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    with torch.no_grad():
        model(inputs, targets=targets)
    counted = profiler.get_total_flops()
    profiler.end_profile()
    formula = predict.training_flops_per_token(model.config.architecture, args.seq_len) / 3
    run.compare("operations of a forward pass", formula * inputs.numel(), counted, "FLOP")
    run.check_below(
        "error of the profiler's count", abs(formula * inputs.numel() / counted - 1), PROFILER
    )


def logged(step: Callable[[], Tensor]) -> dict[str, dict[int, int]]:
    """A step's calls by DeepSpeed's communication log: of each kind, how many of which size."""
    import deepspeed.comm

    deepspeed.comm.configure(enabled=True, prof_all=True, verbose=False)
    log = deepspeed.comm.comm.comms_logger
    log.comms_dict.clear()
    step()
    found = {
        name: {size: own[0] for size, own in sizes.items()}
        for name, sizes in log.comms_dict.items()
    }
    deepspeed.comm.configure(enabled=False)
    return found


def reductions(step: Callable[[], Tensor]) -> int:
    """How many all-reduces of gradients a step makes; those of a number or two are its norms'."""
    return sum(
        count
        for name, sizes in logged(step).items() if name.startswith("all_reduce")
        for size, count in sizes.items() if size > A_FEW
    )  # fmt: skip


def read_log(run: Run, args: Namespace, job: Runtime) -> None:
    """Every kind of call of a step: how many, of how many bytes, and what that puts on the wire."""
    step = stepper(args, job, max(args.buckets))
    step()
    found = logged(step)
    share = (job.world_size - 1) / job.world_size
    # Of a gather the log has what a rank gives, a K-th of what comes of it.
    factors = {"all_reduce": 2 * share, "all_gather": share * job.world_size}
    rows: list[list[Any]] = []
    total = 0.0
    for name, sizes in sorted(found.items()):
        size = sum(each * count for each, count in sizes.items())
        kind = next((kind for kind in factors if name.startswith(kind)), None)
        sent = factors[kind] * size if kind else None
        total += sent or 0.0
        rows.append([name, sum(sizes.values()), size / 1e6, sent and sent / 1e6])
    run.table(
        "log", ["call", "calls", "logged (MB)", "a rank sends (MB)"], rows,
        caption="one step of stage 2, by DeepSpeed's communication log",
    )  # fmt: skip
    if job.local_world_size < job.world_size:
        sent = max(gathered(bytes_sent(step, job)))
        run.compare("bytes that a rank sends, by the log", total, sent, "B")
        run.check_below("error of the log", abs(total / sent - 1), LOG)


def choose_buckets(run: Run, args: Namespace, job: Runtime) -> None:
    """Stage 2's step over the size of its buckets, in turns."""
    steps = {str(size): stepper(args, job, size) for size in args.buckets}
    timings = in_turns(steps, WARMUP_STEPS, args.repeats, job)
    parameters = num_parameters(config_from_args(args))
    rows = [
        [size, reductions(steps[str(size)]), 1e3 * timings[str(size)].median]
        for size in args.buckets
    ]
    run.table(
        "buckets", ["reduce_bucket_size", "all-reduces", "step (ms)"], rows,
        caption=f"a step of stage 2 for {parameters:,} parameters; medians, in turns",
    )  # fmt: skip
    run.figure(
        "buckets", kind="line", title="Small buckets wait for the link's delay",
        x_label="reduce_bucket_size (numbers)", y_label="step (ms)", log_x=True,
        series=[{"label": f"{job.world_size} ranks", "x": [row[0] for row in rows],
                 "y": [row[2] for row in rows]}],
    )  # fmt: skip
    best = min(rows, key=lambda row: row[2])
    run.print(f"verdict: reduce_bucket_size {best[0]:,} is the fastest here, {best[2]:.0f} ms")


def stepper(args: Namespace, job: Runtime, bucket: int) -> Callable[[], Tensor]:
    torch.manual_seed(args.seed)
    model = model_from_args(args, job.device)
    config = engine.stage_config(
        2, args.batch_size, reduce_bucket_size=bucket, allgather_bucket_size=bucket
    )
    trained = engine.begin(model, config, job)
    inputs, targets = engine.own_batch(args, job)

    def step() -> Tensor:
        loss: Tensor = trained(inputs, targets=targets)
        trained.backward(loss)
        trained.step()
        return loss.detach()

    return step


if __name__ == "__main__":
    script.exit(main)
