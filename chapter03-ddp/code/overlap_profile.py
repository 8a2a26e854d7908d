"""What overlap buys: a step with it and without it, on the link where it matters most.

Overlap hides communication behind backward, so it gains most where both take equally long: on a
much faster link there is nothing to hide, on a much slower one nothing to hide it behind. That link
is chosen by formula: a step without communication is measured, and the rate at which all gradients'
bytes take as long as backward follows. The step with and without overlap is predicted, and only
then the link gets that rate, and both are measured. Both are `DataParallel` of ddp_from_scratch.py
with the same buckets: without overlap they are all sent when backward has ended. torch's DDP runs
beside them.

The timeline is drawn from torch.profiler's trace of one step of each, on rank 0. A row for each
bucket: from its launch it waits until a thread of gloo's takes it (there are two, so two buckets
share the link), and what the profiler calls `gloo:all_reduce` is that thread's work on it; on GPUs
it is NCCL's kernel. Forward, backward and optimizer are marked by `record_function`; backward is
drawn until its last gradient is there, and then waits for the buckets. --trace keeps the trace, for
https://ui.perfetto.dev or chrome://tracing.

The two nodes share this machine's cores: gloo's threads have to interrupt backward to send, which
the prediction takes into account (see bucket_tuning.py).

Run:
    python chapter03-ddp/code/overlap_profile.py --figures build/figures --trace build/trace.json
    torchrun --nproc_per_node=2 chapter03-ddp/code/overlap_profile.py

The first makes a virtual cluster; the second measures the ranks that it has, on the link they have.

You should see: the step with overlap at least 1.2 times as fast, the speed-up predicted, and in the
timeline what overlap cannot hide: the buckets that are full only when backward is at its end.
"""

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ddp.overlap import (
    VARIANTS,
    WITH,
    WITHOUT,
    own_buckets,
    predict_variants,
    profile_steps,
    replicas,
)
from ddp.step_times import (
    Alone,
    Bucket,
    LocalStep,
    Trainee,
    Wire,
    balancing_rate,
    check_gradients,
    measure_wire,
    own_batch,
    refuse_one_rank,
    seconds_per_byte,
)
from distlab import files, host, runtime, script
from distlab.cluster import VirtualCluster
from distlab.cluster.links import parse_rate
from distlab.cluster.sweep import Sweep, here_or_on_nodes
from distlab.model import add_model_flags, config_from_args, model_from_args
from distlab.ranks import in_turns
from distlab.run import Run
from distlab.runtime import Runtime

NODES = 2
PRESETS: dict[str, dict[str, object]] = {
    "smoke": {"model": "smoke", "batch_size": 4, "seq_len": 64, "steps": 3, "bucket_mb": 0.1},
    "laptop": {"model": "laptop", "hidden_size": 128, "layers": 8, "vocab_size": 1024,
               "batch_size": 8, "seq_len": 128, "steps": 7, "bucket_mb": 1.0,
               "least_speedup": 1.2},
    "gpu": {"model": "laptop", "hidden_size": 128, "layers": 8, "vocab_size": 1024,
            "batch_size": 8, "seq_len": 128, "steps": 7, "bucket_mb": 1.0, "least_speedup": 1.2},
}  # fmt: skip
FOR_THE_NODES = (
    "preset", "model", "hidden_size", "layers", "heads", "kv_heads", "vocab_size", "batch_size",
    "seq_len", "steps", "bucket_mb", "seed", "timeout",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    return here_or_on_nodes(parse_args(argv), measure_ranks, predict_then_measure)


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    runtime.add_runtime_flags(parser)
    add = parser.add_argument
    add("--batch-size", type=script.positive_int, help="sequences of a rank")
    add("--seq-len", type=script.positive_int)
    add("--steps", type=script.positive_int, help="timed steps of each kind")
    add("--bucket-mb", type=script.positive_float, metavar="MIB", help="of a bucket, in 2^20 B")
    add("--trace", metavar="FILE", help="keep rank 0's chrome trace of a step of each kind")
    add("--link-rate", metavar="RATE", help="with torchrun: every rank's link, 25gbit")
    add("--cores-per-rank", type=script.positive_float, help="for computing and for sending")
    add("--alone", action="store_true", help="measure only what the prediction needs")
    cluster = parser.add_argument_group("the virtual cluster")
    cluster.add_argument("--rate", help="of the link, instead of the one chosen by formula")
    cluster.add_argument("--least-speedup", type=script.positive_float, help="of the check")
    args = parser.parse_args(argv)
    script.refuse_no_median(args, "steps")
    for flag, rate in (("--rate", args.rate), ("--link-rate", args.link_rate)):
        if rate:
            parse_rate(rate, f"{flag} {rate}")
    if args.trace:
        files.refuse_unwritable_file("--trace", args.trace)
    config_from_args(args)  # a wrong shape is told before anything starts
    return args


def predict_then_measure(run: Run, args: Namespace) -> None:
    """Measure a step alone, choose the link, predict; then measure on that link."""
    sweep = Sweep(Path(__file__), args, FOR_THE_NODES)
    cores = ["--cores-per-rank", str(host.usable_cores() / NODES)]
    with VirtualCluster(NODES) as cluster:
        plan = sweep.on(cluster, None, *cores, "--alone")["plan"]
        alone, own = Alone(**plan["alone"]), [Bucket(**bucket) for bucket in plan["own"]]
        wire = Wire(**plan["wire"])
        sent = sum(bucket.size for bucket in own)
        rate = args.rate or f"{balancing_rate(sent, alone.backward, NODES) / 1e6:.1f}mbit"
        wire = replace(wire, per_byte=seconds_per_byte(parse_rate(rate), NODES))
        report_alone(run, alone, wire, own)
        run.metric("link", parse_rate(rate), "bit/s", "of each node, both ways")
        predicted = predict_variants(alone, wire, own, args.bucket_mb)
        words = ", ".join(f"{1e3 * predicted[name]:.1f} ms {name}" for name in VARIANTS)
        run.print(f"predicted: {words}: a speed-up of {predicted[WITHOUT] / predicted[WITH]:.2f}")
        cluster.rates(rate)
        trace = ["--trace", str(Path(args.trace).absolute())] if args.trace else []
        record = sweep.on(cluster, rate, *cores, *trace)
        if args.trace:
            run.print(f"trace: {args.trace}")
    speed_up = report_measured(run, predicted, record["measured"])
    draw_timeline(run, record["timeline"])
    sound = all(sweep.sound)
    run.check_true("all three give the mean of the ranks' own gradients", sound, "on every rank")
    if args.least_speedup is not None and not args.rate:  # elsewhere there may be little to gain
        run.check_above("speed-up by overlap", speed_up, args.least_speedup, of_time=True)


def measure_ranks(run: Run, args: Namespace, job: Runtime) -> None:
    """The ranks of this job, whatever link they have."""
    refuse_one_rank(job)
    run.print(f"job: {job.world_size} rank(s), {job.backend} on {job.device.type}")
    trainees = replicas(args, job)
    alone = alone_step(args, job)
    steps: dict[str, Callable[[], object]]
    steps = {"alone": alone.run, "beside": alone.run_beside_messages}
    if not args.alone:
        steps |= {name: one.step for name, one in trainees.items()}
    for step in [*steps.values(), *steps.values()]:  # DDP makes its buckets after the first
        step()
    wire = measure_wire(args, job)
    timings = in_turns(steps, 0, args.steps, job)
    unsent, beside = timings.pop("alone"), timings.pop("beside")
    wire = replace(wire, work=alone.message_work(unsent.median, beside.median, wire.latency))
    nothing_sent = alone.medians()
    own = own_buckets(trainees[WITH], nothing_sent)
    report_alone(run, nothing_sent, wire, own)
    run.extra(plan={"alone": vars(nothing_sent), "wire": vars(wire), "own": [vars(b) for b in own]})
    if args.alone:
        return
    check_gradients(run, job, alone.trainee, list(trainees.values()))
    measured = {name: timing.median for name, timing in timings.items()}
    report_measured(run, predict_variants(nothing_sent, wire, own, args.bucket_mb), measured)
    both = {name: trainees[name] for name in (WITH, WITHOUT)}
    timeline = profile_steps(both, job, args.trace)
    draw_timeline(run, timeline)
    run.extra(measured=measured, timeline=timeline)


def alone_step(args: Namespace, job: Runtime) -> LocalStep:
    """The same model and batch without anything sent."""
    runtime.seed_everything(args.seed)
    model = model_from_args(args, job.device)
    batch = own_batch(args, job, model.config.vocab_size, args.batch_size)
    return LocalStep(Trainee(model, model, batch), job)


def report_alone(run: Run, alone: Alone, wire: Wire, own: Sequence[Bucket]) -> None:
    """What the prediction knows."""
    run.metric("gradient", alone.gradient_bytes, "B", f"{len(own)} buckets")
    run.metric("forward", alone.forward, "s", "nothing sent, all ranks at once")
    run.metric("backward", alone.backward, "s")
    run.metric("latency", wire.latency, "s", "of an all-reduce, besides its bytes")
    sent = sum(bucket.size for bucket in own) * wire.per_byte
    run.metric("communication", sent, "s", "of all buckets' bytes")
    work = sum(wire.working(bucket.size) for bucket in own)
    run.metric("work", work, "s", "of a core for communication, while backward stands still")


def report_measured(
    run: Run, predicted: Mapping[str, float], measured: Mapping[str, float]
) -> float:
    """Each variant's step beside its prediction; the measured speed-up."""
    for name in VARIANTS:
        run.compare(f"a step {name}", predicted[name], measured[name], "s")
    speed_up = measured[WITHOUT] / measured[WITH]
    run.compare("speed-up by overlap", predicted[WITHOUT] / predicted[WITH], speed_up)
    return speed_up


def draw_timeline(run: Run, rows: Sequence[dict[str, Any]]) -> None:
    run.figure(
        "timeline", kind="timeline", title="One step with overlap, and one without",
        x_label="time since forward began (ms)", y_label="", series=rows,
    )  # fmt: skip


if __name__ == "__main__":
    script.exit(main)
