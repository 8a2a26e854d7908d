"""Plain `parameter_server.py`: a virtual cluster for each number of workers, and all of it told."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _ps_report import LINK_COLUMNS, RATE_COLUMNS, TRAINING_COLUMNS
from _ps_training import ASYNCHRONOUS, DESIGNS, SYNCHRONOUS, Replica, median

from distlab import data
from distlab.cluster import VirtualCluster, flags_for_nodes, record_of
from distlab.data.loader import Loader
from distlab.model import config_from_args, model_from_args
from distlab.run import Run

SCRIPT = Path(__file__).with_name("parameter_server.py")
FOR_THE_NODES = (
    "preset", "model", "hidden_size", "layers", "heads", "kv_heads", "vocab_size", "corpus",
    "corpus_mb", "seq_len", "batch_size", "steps", "link_steps", "learning_rate",
    "high_learning_rate", "pace", "straggler", "seed", "timeout",
)  # fmt: skip
HEADERS = 0.1  # the most by which a link's bytes may exceed what they carry


def compare_worlds(run: Run, args: Namespace) -> None:
    """One job for each number of workers; what they measured in one table each."""
    compute = one_node_computes(args)
    run.metric("compute", compute, "s", "of a gradient, on one node alone: the nodes sleep so long")
    records = []
    for workers in run.progress(args.workers, "clusters"):
        flags = [*node_flags(args), "--compute", str(compute)]
        with VirtualCluster(workers + 1, args.rate) as cluster:
            records.append(record_of(cluster, SCRIPT, flags, 4 * args.timeout))
    for name, columns in (
        ("links", LINK_COLUMNS), ("training", TRAINING_COLUMNS), ("rates", RATE_COLUMNS)
    ):  # fmt: skip
        jobs = [record["tables"][name]["rows"] for record in records]
        rows = [row for same in zip(*jobs, strict=True) for row in same]  # of one design together
        run.table(name, columns, rows, caption=records[0]["tables"][name]["caption"])
    for name, pair in records[-1]["comparisons"].items():
        run.compare(name, pair["predicted"], pair["measured"], pair["unit"])
    draw(run, args, records)
    check(run, args, records)


def one_node_computes(args: Namespace) -> float:
    """Median seconds of one gradient in this process, on one thread, as on a node."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tokens = data.prepare_from_args(args, config_from_args(args).vocab_size)
    replica = Replica(model_from_args(args, "cpu"), Loader(tokens, args.seq_len, args.batch_size))
    for _ in range(6):
        replica.gradient()
    torch.set_num_threads(threads)
    return median(replica.seconds[1:])


def node_flags(args: Namespace) -> list[str]:
    """This script's flags on a node: those given here, its link, and gloo on its CPU."""
    return [*flags_for_nodes(args, FOR_THE_NODES), "--link-rate", args.rate]


def draw(run: Run, args: Namespace, records: Sequence[dict[str, Any]]) -> None:
    """The loss over time with a straggler, for the most workers."""
    series = [
        {
            "label": curve["design"],
            "x": [seconds for _, seconds, _ in curve["curve"]],
            "y": [loss for _, _, loss in curve["curve"]],
        }
        for curve in records[-1]["curves"]
        if curve["straggler"]
    ]
    run.figure(
        "straggler", kind="line", title=f"{args.workers[-1]} workers, one of them slow",
        x_label="seconds", y_label="validation loss", series=series,
    )  # fmt: skip


def check(run: Run, args: Namespace, records: Sequence[dict[str, Any]]) -> None:
    equal = [all(item["ok"] for item in record["checks"]) for record in records]
    run.check_equal("in every job losses and parameters equal DDP's", equal, [True] * len(equal))
    links, training, rates = (
        [row for record in records for row in as_dicts(record["tables"][name])]
        for name in ("links", "training", "rates")
    )
    excess = [row["busiest link (MB)"] / row["busiest link* (MB)"] - 1 for row in links]
    run.check_below("the busiest link carries what was predicted: headers", max(excess), HEADERS)
    run.check_above("and nothing less", min(excess), -0.01)
    limit = 100 * args.tolerance
    worst = max(abs(row["error %"]) for row in links if row["design"] != ASYNCHRONOUS)
    run.check_below("the worst error of a predicted step", worst, limit, "%")
    worst = max(abs(row["error %"]) for row in training if row["straggler"] == "yes")
    run.check_below("the worst error of a straggler's predicted throughput", worst, limit, "%")

    most = args.workers[-1]
    speed = {
        row["design"]: row["sequences/s"]
        for row in training
        if row["K"] == most and row["straggler"] == "yes"
    }
    gain = speed[ASYNCHRONOUS] / max(speed[design] for design in DESIGNS[:2])
    run.check_above("with a straggler, asynchrony's factor", gain, args.gain)
    loss = {(row["design"], row["a gradient's share"]): row["loss"] for row in rates[-4:]}
    harm = loss[ASYNCHRONOUS, "full"] - loss[SYNCHRONOUS, "mean"]
    run.check_above("what staleness costs at the high rate, in loss", harm, args.harm)


def as_dicts(table: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
