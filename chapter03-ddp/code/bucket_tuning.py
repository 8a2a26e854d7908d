"""Bucket size against step time: torch's DDP on links of three speeds, predicted and measured.

DDP all-reduces its gradients in buckets, each as soon as its last gradient is there. A small bucket
starts early, but every one pays a message's latency; a large one waits for its last gradient, and
what it then sends sticks out after backward. One bucket for all overlaps with nothing, and DDP's
first step is such a step: only after it are buckets made, in the order in which gradients arrived.

The prediction knows a step without communication (forward, backward with the moment at which each
gradient arrives, optimizer), the link's rate and the latency of a small message; never a step with
communication. On the unshaped link, which has no rate, the seconds of a byte are measured too.
gloo sends two buckets at a time, so the latency of one hides behind the bytes of the other.

The nodes are namespaces of this machine: two ranks of one thread each, at home on two cores. But
gloo's own threads, which copy and add what is sent, need a core as well. The prediction lets
backward stand still for as long as they work, where there is no core left for them; that is why
hardly anything is gained on the unshaped link, whose all-reduce is all work and no waiting.

Run:
    python chapter03-ddp/code/bucket_tuning.py --figures build/figures
    torchrun --nproc_per_node=2 chapter03-ddp/code/bucket_tuning.py

The first makes a virtual cluster for each link; the second measures the ranks that it has, such as
those of real nodes, to which --link-rate tells their link.

You should see: on the shaped links buckets much smaller than the gradient are the fastest; one
bucket for all is the slowest, and DDP's default, made for larger models, little better. The
smallest buckets cost only where no bytes hide their latency: on the faster links.
"""

import os
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from _bucket_report import report_link, report_tuning
from _bucket_training import (
    LocalStep,
    Trainee,
    check_gradients,
    measure_in_turns,
    measure_wire,
    own_batch,
    refuse_one_rank,
)
from torch.nn.parallel import DistributedDataParallel as DDP

from distlab import host, runtime, script
from distlab.cluster import VirtualCluster, flags_for_nodes, record_of, unavailable
from distlab.cluster.links import parse_rate
from distlab.errors import Skipped, UsageError
from distlab.model import add_model_flags, config_from_args, model_from_args
from distlab.run import Run
from distlab.runtime import Runtime

NODES = 2
UNSHAPED = "unshaped"
PRESETS = {
    "smoke": {"model": "smoke", "batch_size": 2, "seq_len": 32, "steps": 3, "tolerance": 20.0,
              "buckets": [0.0625, 0.25, 64.0], "rates": ["300mbit"]},
    "laptop": {"model": "laptop", "hidden_size": 128, "layers": 8, "vocab_size": 1024,
               "batch_size": 4, "seq_len": 64, "steps": 4, "tolerance": 0.25,
               "buckets": [0.0625, 0.25, 0.5, 1.0, 2.0, 4.0, 64.0],
               "rates": [UNSHAPED, "1gbit", "100mbit"]},
    "gpu": {"model": "laptop", "hidden_size": 128, "layers": 8, "vocab_size": 1024,
            "batch_size": 4, "seq_len": 64, "steps": 4, "tolerance": 0.25,
            "buckets": [0.0625, 0.25, 0.5, 1.0, 2.0, 4.0, 64.0],
            "rates": [UNSHAPED, "1gbit", "100mbit"]},
}  # fmt: skip
FOR_THE_NODES = (
    "preset", "model", "hidden_size", "layers", "heads", "kv_heads", "vocab_size", "batch_size",
    "seq_len", "steps", "seed", "timeout", "buckets",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if "RANK" not in os.environ:
        if why := unavailable():
            raise Skipped(why)
        with script.run(args) as run:
            compare_links(run, args)
        return run.status
    with (
        script.run(args) as run,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        measure_link(run, args, job)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    runtime.add_runtime_flags(parser)
    add = parser.add_argument
    add("--batch-size", type=script.positive_int, help="sequences of a rank")
    add("--seq-len", type=script.positive_int)
    add("--steps", type=script.positive_int, help="timed steps of each bucket size")
    add("--buckets", type=script.positive_float, nargs="+", metavar="MIB", help="bucket_cap_mb")
    add("--link-rate", metavar="RATE", help="with torchrun: every rank's link, 25gbit")
    add("--cores-per-rank", type=script.positive_float, help="for computing and for sending")
    cluster = parser.add_argument_group("the virtual clusters")
    cluster.add_argument("--rates", nargs="+", metavar="RATE", help=f"or {UNSHAPED}")
    cluster.add_argument(
        "--tolerance", type=script.positive_float, help="of the check of the predictions, relative"
    )
    args = parser.parse_args(argv)
    if args.steps < 3:
        raise UsageError(f"--steps {args.steps} gives no median; use 3 or more")
    if len(set(args.buckets)) < 2:
        raise UsageError(f"--buckets {args.buckets[0]:g} compares nothing; use 2 sizes or more")
    for rate in args.rates:
        if rate != UNSHAPED:
            parse_rate(rate, f"--rates {rate}")
    if args.link_rate:
        parse_rate(args.link_rate, f"--link-rate {args.link_rate}")
    config_from_args(args)  # a wrong shape is told before anything starts
    return args


def measure_link(run: Run, args: Namespace, job: Runtime) -> None:
    """Every bucket size, on whatever link this job's ranks have."""
    refuse_one_rank(job)
    run.print(f"job: {job.world_size} rank(s), {job.backend} on {job.device.type}")
    caps = [*sorted(set(args.buckets)), None]  # None: DDP's default
    model = model_from_args(args, job.device)
    batch = own_batch(args, job, model.config.vocab_size)
    alone = LocalStep(Trainee(model, model, batch), job)
    trainees = [with_ddp(args, job, batch, cap) for cap in caps]
    steps = [alone.run, alone.run_beside_messages, *(trainee.step for trainee in trainees)]
    for step in steps:  # DDP makes its buckets after the first, when it knows the order of arrival
        step()
    wire = measure_wire(args, job)
    nothing_sent, beside, *timings = measure_in_turns(steps, args.steps, job)
    work = alone.message_work(nothing_sent.median, beside.median, wire.latency)
    wire = replace(wire, work=work)
    check_gradients(run, job, alone.trainee, trainees)
    made = [buckets_made(trainee.wrapped) for trainee in trainees]
    report_link(run, job, caps, timings, alone.medians(), wire, made)


def with_ddp(args: Namespace, job: Runtime, batch: Any, cap_mib: float | None) -> Trainee:
    """The same weights on every rank, by the seed: DDP has nothing to broadcast."""
    runtime.seed_everything(args.seed)
    model = model_from_args(args, job.device)
    ddp = DDP(model, bucket_cap_mb=cap_mib, init_sync=False, gradient_as_bucket_view=True)
    return Trainee(model, ddp, batch)


def buckets_made(ddp: Any) -> list[int]:
    """The bytes of each bucket, as DDP itself tells."""
    return [int(size) for size in ddp._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(",")]


def compare_links(run: Run, args: Namespace) -> None:
    """A virtual cluster for each link."""
    links: dict[str, dict[str, Any]] = {}
    sound: list[bool] = []
    for rate in run.progress(args.rates, "clusters"):
        with VirtualCluster(NODES, None if rate == UNSHAPED else rate) as cluster:
            record = record_of(cluster, Path(__file__), node_flags(args, rate), 3 * args.timeout)
        mbit = None if rate == UNSHAPED else parse_rate(rate) / 1e6
        links[rate] = {**record["link"], "mbit": mbit}
        sound.append(all(check["ok"] for check in record["checks"]))
    run.check_equal("on every link gradients and buckets are as expected", sound,
                    [True] * len(sound))  # fmt: skip
    report_tuning(run, args, links)


def node_flags(args: Namespace, rate: str) -> list[str]:
    """This script's flags on a node: those given here, its link, its share of the cores."""
    flags = flags_for_nodes(args, FOR_THE_NODES)
    flags += ["--cores-per-rank", str(host.usable_cores() / NODES)]
    return flags + (["--link-rate", rate] if rate != UNSHAPED else [])


if __name__ == "__main__":
    script.exit(main)
