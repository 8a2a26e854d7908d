"""Are choose_strategy.py's predictions right? The same plans, really run on two virtual nodes.

A small Llama is trained by six plans on two nodes of two ranks each: data parallelism, FSDP,
tensor, pipeline, and pairs of them, from scratch. First every plan must equal one process in its
losses and its weights. Then steps are timed at several speeds of the link between the nodes, and
compared with the cost model's prediction.

Run:
    python chapter02-gpu-hardware-parallelism/code/measure_strategies.py

You should see: with a fast link data parallelism is first, with a slow one a plan that sends little
over it, such as tensor parallelism inside the nodes and a pipeline between them; and the plan that
is predicted to be fastest is measured fastest, or nearly.

The devices are paced: a rank really computes, then sleeps until a device of --device-gflops would
be done, so that four ranks on two processors take the time of four devices. Sending is real.
"""

import argparse
import json
import math
import sys
from dataclasses import asdict
from typing import Any

from distlab import predict, script
from distlab.cluster import VirtualCluster, unavailable
from distlab.cluster.links import parse_rate
from distlab.display import quantity
from distlab.measure import Timing
from distlab.model import ModelConfig
from distlab.predict import TrainingPlan
from distlab.run import Run
from parallelism.cost import Cluster, StepTime, step_time
from parallelism.plans import Candidate, name, ranked

NODES, PER_NODE = 2, 2
CONFIG = ModelConfig(
    vocab_size=256, hidden_size=96, intermediate_size=256, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False,
)  # fmt: skip
DEGREES = [  # tp, pp, ZeRO stage; the rest of the four ranks is data parallel
    (1, 1, 0), (1, 1, 3), (2, 1, 0), (2, 2, 0), (1, 2, 0), (1, 4, 0),
]  # fmt: skip
PRESETS = {
    "smoke": {  # one step of milliseconds, maybe on a busy machine, proves no order
        "rates": ["1gbit"], "repeats": 1, "seq_len": 16, "device_gflops": 1.0,
    },
    "laptop": {
        "rates": ["1gbit", "100mbit", "30mbit"], "repeats": 8, "seq_len": 64,
        "device_gflops": 1.0, "within": 0.1,
    },
    "gpu": {
        "rates": ["1gbit", "100mbit", "30mbit"], "repeats": 8, "seq_len": 64,
        "device_gflops": 1.0, "within": 0.1,
    },
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if reason := unavailable():
        raise script.Skipped(reason)
    plans = four_rank_plans(args)
    with script.run(args) as run:
        describe(run, args)
        speeds = []
        with VirtualCluster(nodes=NODES) as nodes:
            for rate in args.rates:
                for node in nodes.names:
                    nodes.rate(node, rate)
                answer = run_ranks(nodes, plans, args, prove=rate == args.rates[0])
                if answer["proofs"]:
                    check_proofs(run, plans, answer["proofs"])
                cluster = cluster_of(args, parse_rate(rate), answer["links"])
                speeds.append(AtSpeed(parse_rate(rate), plans, cluster, answer))
        report(run, speeds, args.within)
    return run.status


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = script.Parser(__doc__, PRESETS)
    parser.add_argument("--rates", nargs="+", metavar="RATE", help="of each node's link: 100mbit")
    parser.add_argument("--repeats", type=script.positive_int, help="steps of each plan")
    parser.add_argument("--seq-len", type=script.positive_int)
    parser.add_argument("--device-gflops", type=script.positive_float, help="of a paced device")
    parser.add_argument(
        "--within",
        type=script.positive_float,
        help="how much slower than the fastest is right; not given, as at smoke size: not judged",
    )
    parser.add_argument("--seed", type=script.seed, default=0)
    parser.add_argument("--timeout", type=script.positive_float, default=60.0)
    args = parser.parse_args(argv)
    for rate in args.rates:
        parse_rate(rate, f"--rates {rate}")
    return args


def four_rank_plans(args: argparse.Namespace) -> list[TrainingPlan]:
    """Four sequences a step, one to a micro-batch."""
    gpus = NODES * PER_NODE
    return [
        TrainingPlan(
            gpus, tp, pp, zero, "fp32", "sgd", args.seq_len, micro_batch=1, accumulation=tp * pp
        )
        for tp, pp, zero in DEGREES
    ]


def describe(run: Run, args: argparse.Namespace) -> None:
    parameters = predict.total_parameters(CONFIG.architecture)
    run.print(
        f"model of {quantity(parameters, 'params')} on {NODES} nodes x {PER_NODE} ranks, "
        f"{NODES * PER_NODE} sequences of {args.seq_len} tokens a step; every rank is paced to "
        f"{quantity(args.device_gflops * 1e9, 'FLOP/s')}"
    )


def run_ranks(
    nodes: VirtualCluster, plans: list[TrainingPlan], args: argparse.Namespace, prove: bool
) -> dict[str, Any]:
    """What rank 0 of `parallelism.strategy_worker` answers; `RunError` where a rank failed."""
    task = {
        "config": asdict(CONFIG),
        "plans": [asdict(plan) for plan in plans],
        "global_batch": NODES * PER_NODE,
        "seq_len": args.seq_len,
        "device_flops": args.device_gflops * 1e9,
        "prove": prove,
        "repeats": args.repeats,
        "seed": args.seed,
        "timeout_s": args.timeout,
    }
    ended = nodes.run_ranks(
        [sys.executable, "-m", "parallelism.strategy_worker", json.dumps(task)],
        ranks_per_node=PER_NODE,
        env={"OMP_NUM_THREADS": "1"},
        timeout_s=2 * args.timeout,
    )
    for rank, one in enumerate(ended):
        if one.status:
            last = (one.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise script.RunError(f"rank {rank} ended with status {one.status}: {last}")
    return json.loads(ended[0].stdout)


def check_proofs(run: Run, plans: list[TrainingPlan], proofs: list[dict[str, Any]]) -> None:
    """Every plan trains the model of one process, and sends what the formula says."""
    losses, alone = ([proof[key] for proof in proofs] for key in ("losses", "alone"))
    run.check_close("losses of two steps, every plan and one process", losses, alone, 1e-5)
    weight = max(proof["weight_difference"] for proof in proofs)
    run.check_below("weights after them, every plan and one process", weight, 1e-5)
    sent, expected = [], []
    for plan, proof in zip(plans, proofs, strict=True):
        times = plan.accumulation if plan.zero == 3 else 1
        nbytes = 4 * proof["parameters"]
        expected.append(times * predict.data_parallel_bytes(nbytes, plan.data_parallel, plan.zero))
        sent.append(proof["dp_bytes"])
    run.check_equal("bytes sent for data parallelism, every plan", sent, expected)


def cluster_of(args: argparse.Namespace, rate: float, links: dict[str, float]) -> Cluster:
    """The cost model's cluster: latencies as measured here, the outer rate as shaped."""
    return Cluster(
        gpus=NODES * PER_NODE,
        gpus_per_node=PER_NODE,
        ports=1,
        flops=args.device_gflops * 1e9,
        memory_bandwidth=math.inf,
        memory=math.inf,
        inner=(links["near_s"], 1 / links["near_rate"]),
        outer=(links["far_s"], 1 / predict.tcp_goodput(rate)),
        hidden=frozenset({"PP"}),  # the steps here sum gradients when all is computed
        hierarchical=False,
    )


class AtSpeed:
    """The plans at one speed of the link between the nodes: predicted beside measured."""

    def __init__(
        self, rate: float, plans: list[TrainingPlan], cluster: Cluster, answer: dict[str, Any]
    ) -> None:
        a = CONFIG.architecture
        self.link = quantity(rate, "bit/s")
        self.plans = plans
        self.times = [step_time(a, plan, cluster) for plan in plans]
        self.timings = [Timing(tuple(samples)) for samples in answer["seconds"]]
        self.measured = [timing.median for timing in self.timings]
        self.late = answer["late"]
        order = ranked(
            Candidate(plan, predict.training_memory(a, plan), time)
            for plan, time in zip(plans, self.times, strict=True)
        )
        self.first = plans.index(order[0].plan)
        self.fastest = min(range(len(plans)), key=self.measured.__getitem__)


def report(run: Run, speeds: list[AtSpeed], within: float | None) -> None:
    """All predictions and measurements, and whether the plans predicted first were good choices."""
    rows = [
        [at.link, *row(plan, time, seconds)]
        for at in speeds
        for plan, time, seconds in zip(at.plans, at.times, at.measured, strict=True)
    ]
    columns = ["link", "plan", "predicted", "measured", "error", "bubble", "TP", "PP", "DP"]
    run.table("plans", columns, rows, "a step of each plan; predicted parts of it")
    for at in speeds:
        run.print(
            f"verdict: at {at.link} {name(at.plans[at.first])} is predicted first, and "
            f"{name(at.plans[at.fastest])} is measured fastest; real computing was late by "
            f"{quantity(at.late, 's')} in all"
        )
    for at in speeds:
        predicted, measured = at.times[at.first].total, at.measured[at.first]
        run.compare(f"at {at.link} a step of the plan predicted first", predicted, measured, "s")
    if within is None:
        return
    for at in speeds:
        first = at.timings[at.first]
        run.check_within(
            f"at {at.link} the plan predicted first, relative to the fastest",
            {
                f"that to {name(plan)}": first.ratios(timing)
                for plan, timing in zip(at.plans, at.timings, strict=True)
            },
            1 + within,
            any_size=True,
        )


def row(plan: TrainingPlan, time: StepTime, measured: float) -> list[Any]:
    parts = (time.bubble, time.tp, time.pp, time.dp)
    return [
        name(plan),
        quantity(time.total, "s"),
        quantity(measured, "s"),
        f"{100 * (time.total / measured - 1):+.0f} %",
        *(quantity(part, "s") for part in parts),
    ]


if __name__ == "__main__":
    script.exit(main)
