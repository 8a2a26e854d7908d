"""DDP, ZeRO-1 and every mode of FSDP beside each other: memory, bytes, time on three links, loss.

One model is trained by each strategy on the same batches from the same weights, a rank on each of
four virtual nodes. Held are the weights, gradients and optimizer state, which the formula knows,
and at the step's peak gathered units and activations too. What a step sends is counted at each
node's network interface. Then steps are timed, all strategies in turns, on links of several speeds.

Run:
    python chapter04-fsdp/code/compare_strategies.py --figures build/figures
    python chapter04-fsdp/code/compare_strategies.py --links 1gbit 30mbit --strategies ddp full
    torchrun --nproc_per_node=4 chapter04-fsdp/code/compare_strategies.py

The first two make a virtual cluster for all links; the last measures the ranks that it has.

You should see: the same loss everywhere; state and bytes as the formulas say. No strategy is best
in all: what saves memory sends more. The verdict for each link is computed from the table: the
fastest, and what to take where its peak does not fit.
"""

import os
from argparse import Namespace
from pathlib import Path
from statistics import mean
from typing import Any

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from distlab import predict, runtime, script
from distlab.cluster import VirtualCluster
from distlab.cluster.links import parse_rate
from distlab.cluster.sweep import Sweep, here_or_on_nodes
from distlab.errors import UsageError
from distlab.launch import world_size
from distlab.model import add_model_flags, config_from_args, model_from_args
from distlab.ranks import gathered, in_turns
from distlab.run import Run
from distlab.runtime import Runtime
from distlab.traffic import bytes_sent, reduction_factor
from distlab.training.memory import bytes_of
from fsdp.memory_timeline import MemoryTimeline, gather_buffers, gradient_buffers
from fsdp.strategies import FLOAT, STRATEGIES, Batch, Sizes, Training, own_batch

NODES = 4
UNSHAPED = "unshaped"
PRESETS: dict[str, dict[str, object]] = {
    "smoke": {"model": "smoke", "batch_size": 1, "seq_len": 32, "steps": 3, "repeats": 3,
              "links": [UNSHAPED]},
    "laptop": {"model": "laptop", "hidden_size": 128, "layers": 4, "vocab_size": 1024,
               "batch_size": 1, "seq_len": 64, "steps": 5, "repeats": 5,
               "links": [UNSHAPED, "1gbit", "100mbit"]},
    "gpu": {"model": "gpu", "batch_size": 2, "seq_len": 512, "steps": 5, "repeats": 10,
            "links": [UNSHAPED]},
}  # fmt: skip
FOR_THE_NODES = (
    "preset", "model", "hidden_size", "layers", "heads", "kv_heads", "vocab_size", "batch_size",
    "seq_len", "steps", "repeats", "strategies", "replicas", "seed", "timeout",
)  # fmt: skip
SAME = 1e-4  # losses: Adam makes much of a gradient's last digits
STATE = 0.02  # relative, at most: shards are padded to whole rows
HEADERS = 0.05  # of the bytes sent, at most: packets' headers, and at smoke size small packets
COLUMNS = ["strategy", "state predicted (MB)", "state (MB)", "peak (MB)", "sent predicted (MB)",
           "sent (MB)", "loss"]  # fmt: skip
Found = dict[str, dict[str, float]]  # of each strategy


def main(argv: list[str] | None = None) -> int:
    return here_or_on_nodes(parse_args(argv), measure_here, compare_links)


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    runtime.add_runtime_flags(parser)
    add = parser.add_argument
    add("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES), metavar="NAME",
        help=", ".join(STRATEGIES))  # fmt: skip
    add("--replicas", type=script.positive_int, default=2, help="of the model, for hybrid")
    add("--batch-size", type=script.positive_int, help="sequences of a rank")
    add("--seq-len", type=script.positive_int)
    add("--steps", type=script.positive_int, help="whose last loss is compared")
    add("--repeats", type=script.positive_int, help="timed steps of each strategy")
    add("--links", nargs="+", metavar="RATE", help="of the virtual nodes: 1gbit, or unshaped")
    add("--times-only", action="store_true", help="with torchrun: no memory, bytes and losses")
    args = parser.parse_args(argv)
    ranks = world_size() if "RANK" in os.environ else NODES
    if ranks % args.replicas:
        fitting = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
        raise UsageError(f"--replicas {args.replicas} does not divide {ranks} ranks; use {fitting}")
    script.refuse_no_median(args, "repeats")
    for link in args.links:
        if link != UNSHAPED:
            parse_rate(link, f"--links {link}")
    config_from_args(args)  # a wrong shape is told before anything starts
    return args


def measure_here(run: Run, args: Namespace, job: Runtime) -> None:
    """The ranks of this job: every strategy's loss, memory and bytes once, and its time."""
    shape = (args.replicas, job.world_size // args.replicas)
    mesh = init_device_mesh(job.device.type, shape, mesh_dim_names=("replicate", "shard"))
    batch = own_batch(args, job, args.batch_size)
    trainings: dict[str, Training] = {}
    found: Found = {name: {} for name in args.strategies}
    for name in args.strategies:
        runtime.seed_everything(args.seed)
        model = model_from_args(args, job.device)
        sizes = Sizes.of(model, job.world_size, args.replicas, reduction_factor(job.backend))
        trainings[name] = STRATEGIES[name].begin(model, mesh)
        if not args.times_only:
            found[name] = costs(args, job, name, trainings[name], sizes, batch)
    steps = {name: lambda own=own: own.step(batch) for name, own in trainings.items()}
    for name, timing in in_turns(steps, 1, args.repeats, job).items():
        found[name]["step"] = timing.median
    if args.times_only:
        run.table("steps", ["strategy", "step (ms)"],
                  [[name, 1e3 * own["step"]] for name, own in found.items()])  # fmt: skip
    else:
        report(run, found, {"here": {name: own["step"] for name, own in found.items()}})
    run.extra(strategies=found)


def costs(
    args: Namespace, job: Runtime, name: str, training: Training, sizes: Sizes, batch: Batch
) -> dict[str, float]:
    """What a strategy comes to, and needs: the mean of the ranks, of the peak the largest."""
    losses = [training.step(batch).item() for _ in range(args.steps)]
    sharded = any(isinstance(p, DTensor) for p in training.model.parameters())
    buffers = {"gathered": gather_buffers(training.model, lambda: training.step(batch))}
    if not sharded:
        buffers["gradients"] = gradient_buffers(training.model)  # DDP's buckets, which it keeps
    state = sum(count() for count in bytes_of(training.model, training.own_optimizer).values())
    training.optimizer.zero_grad()
    with MemoryTimeline(training.model, training.own_optimizer, buffers) as timeline:
        training.step(batch)
    peak = int(sum(timeline.by_kind().values()).max())
    strategy = STRATEGIES[name]
    everyone = gathered((losses[-1], state, bytes_sent(lambda: training.step(batch), job)))
    loss, held, sent = (mean(values) for values in zip(*everyone, strict=True))
    formula = predict.model_state(
        sizes.whole / FLOAT, "fp32", "adamw", strategy.stage, strategy.shards(sizes)
    )
    known = {
        "state predicted": formula.total, "state": held, "peak": max(gathered(peak)),
        "sent predicted": strategy.sent(sizes), "loss": loss,
    }  # fmt: skip
    if job.local_world_size == 1:  # else the loopback has what ranks of a node send
        known["sent"] = sent
    return known


def compare_links(run: Run, args: Namespace) -> None:
    """Virtual nodes, a rank on each: all costs on the first link, then times on the others."""
    sweep = Sweep(Path(__file__), args, FOR_THE_NODES)
    found: Found = {}
    times: dict[str, dict[str, float]] = {}
    only: list[str] = []  # the first time all is measured
    with VirtualCluster(NODES) as cluster:
        for link in run.progress(args.links, "links"):
            cluster.rates(None if link == UNSHAPED else link)
            now: Found = sweep.on(cluster, None, *only)["strategies"]
            only = ["--times-only"]
            found = found or now
            times[link] = {name: own["step"] for name, own in now.items()}
    report(run, found, times)


def report(run: Run, found: Found, times: dict[str, dict[str, float]]) -> None:
    """The table of all strategies, its checks, and for each link what to take."""
    mb = ("state predicted", "state", "peak", "sent predicted", "sent")
    rows: list[list[Any]] = [
        [name, *(own[key] / 1e6 if key in own else None for key in mb), own["loss"],
         *(1e3 * of_link[name] for of_link in times.values())]
        for name, own in found.items()
    ]  # fmt: skip
    run.table(
        "strategies", [*COLUMNS, *(f"step, {link} (ms)" for link in times)], rows,
        caption="of a rank; state: weights, gradients, optimizer; steps in turns, medians",
    )  # fmt: skip
    losses = [own["loss"] for own in found.values()]
    run.check_below("losses differ at most by", max(losses) - min(losses), SAME)
    for what, limit in (("state", STATE), ("sent", HEADERS)):
        both = [(own[f"{what} predicted"], own[what]) for own in found.values() if what in own]
        if both:
            worst = max(abs(formula / counted - 1) for formula, counted in both)
            run.check_below(f"error of the bytes of {what}, the largest", worst, limit)
    for link, seconds in times.items():
        run.print(f"verdict: {link}: {recommended(found, seconds)}")
    draw(run, found, times)


def recommended(found: Found, seconds: dict[str, float]) -> str:
    """The fastest, why, and what to take where its peak does not fit, and so on."""
    first, *slower = sorted(seconds, key=seconds.__getitem__)
    least = min(found, key=lambda name: found[name]["sent predicted"])
    why = "and sends least" if first == least else f"though {least} sends less"
    told = [f"{first} is the fastest ({1e3 * seconds[first]:.0f} ms) {why}"]
    last = first
    for name in slower:
        if found[name]["peak"] < found[last]["peak"]:
            less, more = 1e-6 * found[name]["peak"], 1e-6 * found[last]["peak"]
            told.append(f"{name} has a peak of {less:.1f} MB instead of {more:.1f}, in "
                        f"{seconds[name] / seconds[first]:.2f} x the time")  # fmt: skip
            last = name
    return "; ".join(told)


def draw(run: Run, found: Found, times: dict[str, dict[str, float]]) -> None:
    """Time over memory: each strategy on every link, one above the other."""
    series = [
        {"label": name, "x": [own["peak"] / 1e6] * len(times),
         "y": [1e3 * of_link[name] for of_link in times.values()]}
        for name, own in found.items()
    ]  # fmt: skip
    run.figure(
        "strategies", kind="scatter", title="Links, from the bottom up: " + ", ".join(times),
        x_label="peak of a rank (MB)", y_label="step (ms)", log_y=True, series=series,
    )  # fmt: skip


if __name__ == "__main__":
    script.exit(main)
