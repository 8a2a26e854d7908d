"""Fast links inside the nodes, a slow one between them: which way to shard, and from which rate on.

Two nodes of two ranks each. DDP sends every gradient around a ring of all ranks, 1.5 n bytes over
each node's link for n bytes of parameters; fully sharded, the parameters go around too, 3 n and
more. Hybrid sharding gathers and reduces inside a node, where bytes are cheap, and sends between
the nodes an all-reduce of each rank's shard: n bytes. So the slow link wants hybrid sharding; on a
fast one what it does more inside the node costs more than it saves between them.

    step = inside + calls * latency + bytes / rate

`inside` is measured: a step with nothing between the nodes, which is one process's for DDP,
`fully_shard` on one rank for full, and on a node's ranks for hybrid. The latency is a small
message's, the rate the link's: no step that crosses the link is used to predict one. Nothing is
taken to overlap: `fully_shard` waits for gloo, and DDP has a single bucket here.

Run:
    python chapter04-fsdp/code/hybrid_links.py

It makes a virtual cluster. On real nodes, with torchrun and --link-rate, it measures their link.

You should see: bytes over a node's link as the formulas say; hybrid first on a slow link and DDP on
a fast one, with the rate between them predicted, and confirmed at a rate on either side of it; and
full never first: what it buys is memory, a quarter of DDP's, where hybrid takes half.
"""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from distlab import measure, predict, runtime, script
from distlab.cluster import VirtualCluster
from distlab.cluster.links import burst_bytes, parse_rate
from distlab.cluster.sweep import Sweep, here_or_on_nodes
from distlab.display import side_by_side
from distlab.errors import UsageError
from distlab.model import Llama, add_model_flags, config_from_args, model_from_args
from distlab.ranks import gathered, in_turns
from distlab.run import Run
from distlab.runtime import Runtime
from distlab.traffic import bytes_sent, reduction_factor
from fsdp.strategies import Sizes, Training, own_batch, replicate, shard

NODES, PER_NODE = 2, 2
LAPTOP = {"model": "laptop", "batch_size": 1, "seq_len": 64, "repeats": 5, "rates": ["300mbit"],
          "sides": [0.4, 2.5], "tolerance": 0.15}  # fmt: skip
PRESETS: dict[str, dict[str, object]] = {
    "smoke": {"model": "smoke", "batch_size": 1, "seq_len": 32, "repeats": 3, "rates": [],
              "sides": [2.5]},
    "laptop": LAPTOP, "gpu": LAPTOP,  # the virtual nodes compute on their CPU
}  # fmt: skip
FOR_THE_NODES = (
    "preset", "model", "hidden_size", "layers", "heads", "kv_heads", "vocab_size", "batch_size",
    "seq_len", "repeats", "seed", "timeout",
)  # fmt: skip
MODES = ("ddp", "hybrid", "full")
HEADERS = 0.04  # of the bytes sent, at most: at smoke size, where packets are small
SAME = 1e-5  # losses
SMALL = 256  # numbers in a message whose time is all latency
COLUMNS = ["link (Mbit/s)", "mode", "sent by a node (MB)", "inside (ms)",
           "predicted (ms)", "measured (ms)", "error (%)"]  # fmt: skip
Parts = Mapping[str, Mapping[str, float]]  # of each mode


def main(argv: list[str] | None = None) -> int:
    return here_or_on_nodes(parse_args(argv), measure_link, compare_links)


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    runtime.add_runtime_flags(parser)
    add = parser.add_argument
    add("--batch-size", type=script.positive_int, help="sequences of a rank")
    add("--seq-len", type=script.positive_int)
    add("--repeats", type=script.positive_int, help="timed steps of each mode")
    add("--tolerance", type=script.fraction, help="of the predicted steps, relative")
    add("--link-rate", metavar="RATE", help="with torchrun: of each node's link, 25gbit")
    add("--rates", nargs="*", metavar="RATE", help="of the virtual nodes' links")
    add("--sides", nargs="*", type=script.positive_float, metavar="X",
        help="more rates: so many times the one at which the best mode changes")  # fmt: skip
    args = parser.parse_args(argv)
    script.refuse_no_median(args, "repeats")
    for rate in args.rates:
        parse_rate(rate, f"--rates {rate}")
    if args.link_rate:
        parse_rate(args.link_rate, f"--link-rate {args.link_rate}")
    config_from_args(args)  # a wrong shape is told before anything starts
    return args


def measure_link(run: Run, args: Namespace, job: Runtime) -> None:
    """The ranks of this job: each mode's step, and the parts of its prediction."""
    nodes, local = job.world_size // job.local_world_size, job.local_world_size
    if nodes == 1 or local == 1:
        raise UsageError(f"{nodes} node(s) of {local} rank(s): hybrid needs 2 and 2 or more; "
                         "leave torchrun out for virtual nodes")  # fmt: skip
    mesh = init_device_mesh(job.device.type, (nodes, local), mesh_dim_names=("replicate", "shard"))
    lonely = init_device_mesh(job.device.type, (job.world_size, 1), mesh_dim_names=("all", "one"))

    def new() -> Llama:
        runtime.seed_everything(args.seed)
        return model_from_args(args, job.device)

    plain, ddp = new(), new()
    trainings = {
        "ddp": training(ddp, replicate(ddp)), "hybrid": training(shard(new(), mesh)),
        "full": training(shard(new(), None)), "ddp, inside": training(plain),
        "hybrid, inside": training(shard(new(), mesh["shard"])),
        "full, inside": training(shard(new(), lonely["one"])),
    }  # fmt: skip
    batch = own_batch(args, job, args.batch_size)
    steps = {name: lambda own=own: own.step(batch) for name, own in trainings.items()}
    timings = in_turns(steps, 1, args.repeats, job)
    losses = [steps[mode]() for mode in MODES]
    run.check_close("all modes have the same loss", losses[1:], [losses[0]] * 2, SAME)
    sizes = Sizes.of(plain, job.world_size, nodes, reduction_factor(job.backend))
    parts = {
        mode: {"inside": timings[f"{mode}, inside"].median, "measured": timings[mode].median, **own}
        for mode, own in over_the_link(args, job, sizes, mesh.get_group("replicate")).items()
    }
    run.table("modes", COLUMNS, rows_of(parts, args.link_rate))
    if args.link_rate is None:
        sent = {mode: max(gathered(bytes_sent(steps[mode], job))) for mode in MODES}
        worst = max(abs(parts[mode]["sent"] / sent[mode] - 1) for mode in MODES)
        run.check_below("error of the bytes over a node's link", worst, HEADERS)
    run.extra(parts=parts)


def training(model: Llama, wrapped: Any = None) -> Training:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return Training(model, wrapped or model, optimizer)


def over_the_link(
    args: Namespace, job: Runtime, sizes: Sizes, between: dist.ProcessGroup
) -> dict[str, dict[str, float]]:
    """Of each mode the bytes over a node's link, and the number and latency of what is called.

    Of a ring of all ranks one is a node's last: what a rank sends is what goes over the link.
    Between the nodes each rank of a node has its own all-reduce, of its shard.
    """
    units = config_from_args(args).num_hidden_layers + 1
    whole = torch.zeros(SMALL * job.world_size, device=job.device)
    part = torch.zeros(SMALL, device=job.device)

    def seconds(message: Any) -> float:
        return max(gathered(measure.measure(message, 3, 9, job.device).median))

    reduced = seconds(lambda: dist.all_reduce(part))
    collected = seconds(lambda: dist.all_gather_into_tensor(whole, part))
    averaged = seconds(lambda: dist.all_reduce(part, group=between))
    gathers = 2 * units - 1
    return {
        "ddp": {"sent": sizes.all_reduced(sizes.whole, sizes.ranks), "calls": 1,
                "latency": reduced},
        "hybrid": {"sent": sizes.all_reduced(sizes.whole, sizes.replicas), "calls": units,
                   "latency": units * averaged},
        "full": {"sent": sizes.sharded(sizes.ranks), "calls": gathers + units,
                 "latency": gathers * collected + units * reduced},
    }  # fmt: skip


def predicted(part: Mapping[str, float], bits_per_s: float) -> float:
    """Seconds of a step. A shaped link passes its bucket at once after a pause (tc-tbf(8))."""
    rate = predict.tcp_goodput(bits_per_s)
    saved = min(part["calls"] * burst_bytes(bits_per_s), rate * part["inside"])
    return part["inside"] + part["latency"] + max(0.0, part["sent"] - saved) / rate


def rows_of(parts: Parts, rate: str | None) -> list[list[Any]]:
    rows: list[list[Any]] = []
    bits = None if rate is None else parse_rate(rate)
    for mode, part in parts.items():
        shown: list[Any] = [None, 1e3 * part["measured"], None]
        if bits is not None:
            shown = [*side_by_side(predicted(part, bits), part["measured"], 1e3)]
        rows.append([bits and bits / 1e6, mode, part["sent"] / 1e6, 1e3 * part["inside"], *shown])
    return rows


def compare_links(run: Run, args: Namespace) -> None:
    """Virtual nodes: without a rate first, then at --rates, then on either side of the change."""
    sweep = Sweep(Path(__file__), args, FOR_THE_NODES, ranks_per_node=PER_NODE)
    rows: list[list[Any]] = []
    with VirtualCluster(NODES) as cluster:

        def measured(rate: str | None) -> Parts:
            cluster.rates(rate)
            parts: Parts = sweep.on(cluster, rate)["parts"]
            rows.extend(rows_of(parts, rate))
            return parts

        free = measured(None)
        change = best_changes(free)
        sides = [] if change is None else [f"{change * x / 1e6:.0f}mbit" for x in args.sides]
        rates = [*args.rates, *sides]
        several = {rate: measured(rate) for rate in run.progress(rates, "links")}
    run.check_equal("losses and bytes are as expected on every link", all(sweep.sound), True)
    caption = f"medians of {args.repeats} in turns; link —: not shaped, and no prediction"
    run.table("links", COLUMNS, rows, caption)
    worst = max((abs(row[-1]) for row in rows if row[-1] is not None), default=0.0)
    if args.tolerance is not None:
        limit = 100 * args.tolerance
        run.check_below("the worst error of a predicted step", worst, limit, "%", of_time=True)
    run.metric("the best mode changes at", change, "bit/s", "predicted")
    for rate in sides:
        parts, bits = several[rate], parse_rate(rate)
        guess = min(MODES, key=lambda mode: predicted(parts[mode], bits))
        best = min(MODES, key=lambda mode: parts[mode]["measured"])
        run.print(f"verdict: {rate}: {best} is the fastest, predicted is {guess}")
        over = parts[guess]["measured"] / parts[best]["measured"]
        run.check_below(f"the predicted best at {rate}, over the best", over, 1.05, of_time=True)


def best_changes(parts: Parts) -> float | None:
    """The link's rate above which another mode is predicted to be the fastest, bit/s."""
    rates = np.geomspace(1e6, 1e11, 5001)
    best = [min(MODES, key=lambda m: predicted(parts[m], rate)) for rate in rates]
    changes = [i for i in range(1, len(best)) if best[i] != best[i - 1]]
    return float(rates[changes[-1]]) if changes else None


if __name__ == "__main__":
    script.exit(main)
