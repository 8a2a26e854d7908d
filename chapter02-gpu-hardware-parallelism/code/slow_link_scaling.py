"""Scaling on a slow link: what the network leaves of K nodes' speed, predicted and measured.

Every node computes the gradient of its own batch, then one all-reduce averages it, as in data
parallel training without overlap. The batch of a node stays the same, so K nodes do K times the
work: weak scaling. Its efficiency is compute / (compute + all-reduce), and the all-reduce's part
nears 2·bytes·beta however many nodes there are. Strong scaling splits one batch over the nodes: the
compute shrinks by K, the all-reduce does not, so the same link hurts K times as much.

The prediction knows the link's rate, what the hosts add to 4 bytes, and how long one node computes;
never the time of a step with communication. The nodes are namespaces of this machine. Four of them
on two cores would compute at half speed, which real nodes do not; so each computes its gradient
before the clock starts, and in its place sleeps as long as one node, alone, has computed.

Run:
    python chapter02-gpu-hardware-parallelism/code/slow_link_scaling.py --figures build/figures
    torchrun --nproc_per_node=2 chapter02-gpu-hardware-parallelism/code/slow_link_scaling.py

The first makes a virtual cluster for each number of nodes, the second measures the ranks that it
has, computing for real; on real nodes, --link-rate tells it their link.

You should see: efficiency falls at once from one node to two, then less and less; on a link of a
tenth of the rate the all-reduce takes ten times as long; the predicted curves lie on the measured.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distlab import runtime, script
from distlab.cluster.links import parse_rate
from distlab.cluster.sweep import Sweep, here_or_on_nodes, sleeps_s
from distlab.display import side_by_side
from distlab.errors import UsageError
from distlab.figure import two_lines
from distlab.model import add_model_flags, config_from_args, model_from_args
from distlab.run import Run
from distlab.runtime import Runtime
from parallelism.links import Link, Measured, Replica, measure_steps, message_latency

PRESETS = {
    "smoke": {"model": "smoke", "batch_size": 4, "seq_len": 64, "steps": 3,
              "rates": ["100mbit"], "nodes": [1, 2]},
    "laptop": {"model": "laptop", "batch_size": 4, "seq_len": 64, "steps": 3,
               "rates": ["1gbit", "300mbit", "100mbit"], "nodes": [1, 2, 4], "tolerance": 0.15},
    "gpu": {"model": "laptop", "batch_size": 4, "seq_len": 64, "steps": 3,
            "rates": ["1gbit", "300mbit", "100mbit"], "nodes": [1, 2, 4], "tolerance": 0.15},
}  # fmt: skip
FOR_THE_NODES = (
    "preset", "model", "hidden_size", "layers", "heads", "kv_heads", "vocab_size", "batch_size",
    "seq_len", "steps", "seed", "timeout",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    return here_or_on_nodes(parse_args(argv), measure_point, compare_links)


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    runtime.add_runtime_flags(parser)
    add = parser.add_argument
    add("--batch-size", type=script.positive_int, help="sequences of a node, always the same")
    add("--seq-len", type=script.positive_int)
    add("--steps", type=script.positive_int, help="timed steps, after one that is not")
    add("--tolerance", type=script.fraction, help="of the check of the predicted steps, relative")
    add("--link-rate", metavar="RATE", help="with torchrun: every rank's link, 25gbit")
    cluster = parser.add_argument_group("the virtual clusters")
    cluster.add_argument("--rates", nargs="+", metavar="RATE")
    cluster.add_argument("--nodes", nargs="+", type=script.positive_int, metavar="K")
    args = parser.parse_args(argv)
    script.refuse_no_median(args, "steps")
    if not 2 <= max(args.nodes) <= 8:
        raise UsageError(f"--nodes {max(args.nodes)} is no curve; use 2 to 8, such as 1 2 4")
    for rate in args.rates:
        parse_rate(rate, f"--rates {rate}")
    known_link(args)
    config_from_args(args)  # a wrong shape is told before anything starts
    return args


def known_link(args: Namespace, latency: float = 0.0) -> Link | None:
    rate = args.link_rate
    return Link(parse_rate(rate, f"--link-rate {rate}"), 0.0, latency) if rate else None


def measure_point(run: Run, args: Namespace, job: Runtime) -> None:
    """One point of the curve: the ranks of this job, whatever link they have."""
    run.print(f"job: {job.world_size} rank(s), {job.backend} on {job.device.type}")
    link = known_link(args, message_latency(job))
    replica = Replica(model_from_args(args, job.device))
    measured = measure_steps(run, args, job, replica, sleeps_s())
    report_point(run, job, measured, link)


def compare_links(run: Run, args: Namespace) -> None:
    """The whole curve: a virtual cluster for each number of nodes, its links at each rate."""
    sweep = Sweep(Path(__file__), args, FOR_THE_NODES)
    points: list[dict[str, Any]] = []
    several = [(k, rate) for k in sorted(set(args.nodes) - {1}) for rate in args.rates]
    for nodes, rate in run.progress([(1, None), *several], "clusters"):
        points.append({"rate": rate, **sweep.on_nodes(nodes, rate)["point"]})
        sweep.computes_s = points[0]["step"]  # one node's step is all compute
    sound = sweep.sound
    run.check_equal("in every job all ranks hold the same weights", sound, [True] * len(sound))
    report_scaling(run, args, points)


def report_point(run: Run, job: Runtime, measured: Measured, link: Link | None) -> None:
    """One number of nodes on one link: the step, predicted where the link is known."""
    run.metric("gradient", measured.gradient_bytes, "B")
    run.metric(
        "compute", measured.compute, "s", "all ranks at once, or as the node was told to sleep"
    )
    run.metric("all_reduce", measured.all_reduce, "s", "within the step")
    efficiency = 100 * measured.compute / measured.step
    run.metric("efficiency", efficiency, "%", "compute / step")
    all_reduce = None
    if link is not None:
        all_reduce = link.seconds(
            "all_reduce", measured.gradient_bytes, job.world_size, job.backend
        )
        run.compare("a step", measured.compute + all_reduce, measured.step, "s")
    run.extra(point={**vars(measured), "nodes": job.world_size, "predicted_all_reduce": all_reduce})


def report_scaling(run: Run, args: Namespace, points: Sequence[dict[str, Any]]) -> None:
    """The table and the curves of `points`, of which the first is one node alone."""
    one_step = points[0]["step"]  # nothing is sent in it, so it is all compute
    alone, *rows = [row_of({**point, "compute": one_step}) for point in points]
    run.table(
        "scaling",
        ["link", "K", "compute", "all-reduce predicted", "step predicted", "step measured",
         "error %", "efficiency predicted %",
         "efficiency measured %", "strong predicted %"],
        [alone, *rows],
        caption=f"Weak scaling, {points[0]['gradient_bytes']:,} bytes of gradient; ms, medians of "
        f"{args.steps} steps; strong: one node's batch split",
    )  # fmt: skip
    series = []
    for rate in args.rates:
        own = [alone, *(row for row in rows if row[0] == rate)]
        nodes, predicted, measured = ([row[i] for row in own] for i in (1, 7, 8))
        series += two_lines(rate, nodes, measured=measured, predicted=predicted)
    run.figure(
        "scaling", kind="line", title="Weak scaling on a slow link", x_label="nodes",
        y_label="efficiency (%)", series=series,
    )  # fmt: skip
    worst = max(abs(row[6]) for row in rows)
    if args.tolerance is not None:
        limit = 100 * args.tolerance
        run.check_below("the worst error of a predicted step", worst, limit, "%", of_time=True)


def row_of(point: dict[str, Any]) -> list[Any]:
    compute, nodes = point["compute"], point["nodes"]
    all_reduce = point["predicted_all_reduce"] or 0.0  # None: one node without a link
    predicted, step = compute + all_reduce, point["step"]
    split = compute / nodes  # strong scaling: a K-th of the batch for each node
    return [
        point["rate"] or "none", nodes, 1e3 * compute, 1e3 * all_reduce,
        *side_by_side(predicted, step, 1e3), 100 * compute / predicted,
        100 * compute / step, 100 * split / (split + all_reduce),
    ]  # fmt: skip


if __name__ == "__main__":
    script.exit(main)
