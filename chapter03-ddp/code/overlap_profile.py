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

import os
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from _bucket_model import Alone, Bucket, Wire, balancing_rate, seconds_per_byte
from _bucket_training import (
    LocalStep,
    Trainee,
    check_gradients,
    measure_in_turns,
    measure_wire,
    own_batch,
    refuse_one_rank,
)
from _overlap_report import draw_timeline, report_alone, report_measured, report_prediction
from _overlap_timeline import profile_steps
from _overlap_variants import (
    VARIANTS,
    WITH,
    WITHOUT,
    own_buckets,
    predict_variants,
    replicas,
)

from distlab import files, host, runtime, script
from distlab.cluster import VirtualCluster, flags_for_nodes, record_of, unavailable
from distlab.cluster.links import parse_rate
from distlab.errors import Skipped, UsageError
from distlab.model import add_model_flags, config_from_args, model_from_args
from distlab.run import Run
from distlab.runtime import Runtime

NODES = 2
PRESETS = {
    "smoke": {"model": "smoke", "batch_size": 4, "seq_len": 64, "steps": 3, "bucket_mb": 0.1,
              "least_speedup": 0.05},
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
    args = parse_args(argv)
    if "RANK" not in os.environ:
        if why := unavailable():
            raise Skipped(why)
        with script.run(args) as run:
            predict_then_measure(run, args)
        return run.status
    with (
        script.run(args) as run,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        measure_ranks(run, args, job)
    return run.status


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
    if args.steps < 3:
        raise UsageError(f"--steps {args.steps} gives no median; use 3 or more")
    for flag, rate in (("--rate", args.rate), ("--link-rate", args.link_rate)):
        if rate:
            parse_rate(rate, f"{flag} {rate}")
    if args.trace:
        files.refuse_unwritable_file("--trace", args.trace)
    config_from_args(args)  # a wrong shape is told before anything starts
    return args


def predict_then_measure(run: Run, args: Namespace) -> None:
    """Measure a step alone, choose the link, predict; then measure on that link."""
    script_file, limit = Path(__file__), 3 * args.timeout
    with VirtualCluster(NODES) as cluster:
        plan = record_of(cluster, script_file, [*node_flags(args), "--alone"], limit)["plan"]
        alone, own = Alone(**plan["alone"]), [Bucket(**bucket) for bucket in plan["own"]]
        wire = Wire(**plan["wire"])
        sent = sum(bucket.size for bucket in own)
        rate = args.rate or f"{balancing_rate(sent, alone.backward, NODES) / 1e6:.1f}mbit"
        wire = replace(wire, per_byte=seconds_per_byte(parse_rate(rate), NODES))
        report_alone(run, alone, wire, own)
        run.metric("link", parse_rate(rate), "bit/s", "of each node, both ways")
        predicted = predict_variants(alone, wire, own, args.bucket_mb)
        report_prediction(run, predicted)
        for node in cluster.names:
            cluster.rate(node, rate)
        flags = [*node_flags(args), "--link-rate", rate]
        if args.trace:
            flags += ["--trace", str(Path(args.trace).absolute())]
        record = record_of(cluster, script_file, flags, limit)
        if args.trace:
            run.print(f"trace: {args.trace}")
    speed_up = report_measured(run, predicted, record["measured"])
    draw_timeline(run, record["timeline"])
    sound = all(check["ok"] for check in record["checks"])
    run.check_true("all three give the mean of the ranks' own gradients", sound, "on every rank")
    if not args.rate:  # on another link there may be little to gain
        run.check_above("speed-up by overlap", speed_up, args.least_speedup)


def measure_ranks(run: Run, args: Namespace, job: Runtime) -> None:
    """The ranks of this job, whatever link they have."""
    refuse_one_rank(job)
    run.print(f"job: {job.world_size} rank(s), {job.backend} on {job.device.type}")
    trainees = replicas(args, job)
    alone = alone_step(args, job)
    steps = [alone.run, alone.run_beside_messages]
    if not args.alone:
        steps += [one.step for one in trainees.values()]
    for step in steps + steps:  # DDP makes its buckets after the first
        step()
    wire = measure_wire(args, job)
    unsent, beside, *timings = measure_in_turns(steps, args.steps, job)
    wire = replace(wire, work=alone.message_work(unsent.median, beside.median, wire.latency))
    nothing_sent = alone.medians()
    own = own_buckets(trainees[WITH], nothing_sent)
    report_alone(run, nothing_sent, wire, own)
    run.extra(plan={"alone": vars(nothing_sent), "wire": vars(wire), "own": [vars(b) for b in own]})
    if args.alone:
        return
    check_gradients(run, job, alone.trainee, list(trainees.values()))
    measured = {name: timing.median for name, timing in zip(VARIANTS, timings, strict=True)}
    report_measured(run, predict_variants(nothing_sent, wire, own, args.bucket_mb), measured)
    both = {name: trainees[name] for name in (WITH, WITHOUT)}
    timeline = profile_steps(both, job, args.trace)
    draw_timeline(run, timeline)
    run.extra(measured=measured, timeline=timeline)


def alone_step(args: Namespace, job: Runtime) -> LocalStep:
    """The same model and batch without anything sent."""
    runtime.seed_everything(args.seed)
    model = model_from_args(args, job.device)
    local = Trainee(model, model, own_batch(args, job, model.config.vocab_size))
    return LocalStep(local, job)


def node_flags(args: Namespace) -> list[str]:
    """This script's flags on a node: those given here, and its share of the cores."""
    cores = str(host.usable_cores() / NODES)
    return [*flags_for_nodes(args, FOR_THE_NODES), "--cores-per-rank", cores]


if __name__ == "__main__":
    script.exit(main)
