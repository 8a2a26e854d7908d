"""An all-reduce's time from the link alone: rates, delays and nodes, predicted and measured.

For each link and number of nodes a virtual cluster is made on this machine, with real addresses
and shaped links, and `allreduce_microbench.py` runs in it, a rank on each node. Its prediction
knows the rate, the delay and the bucket of the link, and what the hosts add to a message of 4
bytes; no time of the sizes that it predicts. `lab cluster` makes such a cluster for any command.
Where the kernel cannot delay packets, a switch in user space does, for links of up to 1 Gbit/s.
Measured is the lower quartile of the calls: what else the machine does can only add to a time.
Where the machine is a virtual one whose cores its host takes away now and then, a cluster is made
again, up to --rounds times in all, and the fastest time of a size counts.

Run:
    python chapter02-gpu-hardware-parallelism/code/allreduce_links.py
    python chapter02-gpu-hardware-parallelism/code/allreduce_links.py --links 300mbit,5ms --nodes 3

You should see: the time falls with the rate, not with the number of nodes; a delay costs the more
the smaller the message is and the more nodes there are; and the predictions are within 10 %.
"""

import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import psutil

from distlab import script
from distlab.cluster import VirtualCluster, record_of, unavailable
from distlab.cluster.links import burst_bytes, parse_delay, parse_rate
from distlab.errors import Skipped, UsageError
from distlab.run import Run

PRESETS = {
    "smoke": {"links": ["100mbit", "100mbit,2ms"], "nodes": [2], "max_mib": 1, "rounds": 1},
    "laptop": {"links": ["1gbit", "100mbit", "1gbit,2ms", "100mbit,2ms"], "nodes": [2, 4],
               "max_mib": 16, "rounds": 4, "tolerance": 0.1},
    "gpu": {"links": ["1gbit", "100mbit", "1gbit,2ms", "100mbit,2ms"], "nodes": [2, 4],
            "max_mib": 16, "rounds": 4, "tolerance": 0.1},
}  # fmt: skip
MOST_STOLEN = 0.01  # of the cores' time: at 0.05 an all-reduce over 1 Gbit/s took a quarter longer
MICROBENCH = Path(__file__).with_name("allreduce_microbench.py")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if why := unavailable():
        raise Skipped(why)
    with script.run(args) as run:
        compare_links(run, args)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    parser.add_argument("--links", nargs="+", metavar="LINK", help="1gbit, or 1gbit,2ms")
    parser.add_argument("--nodes", nargs="+", type=script.positive_int, metavar="K")
    parser.add_argument("--max-mib", type=script.positive_int, help="sizes are 1, 4, … to this")
    parser.add_argument("--rounds", type=script.positive_int, help="where cores are taken away")
    parser.add_argument("--tolerance", type=script.fraction, help="of the check, relative")
    parser.add_argument("--timeout", type=script.positive_float, default=120.0, help="of a job, s")
    args = parser.parse_args(argv)
    if wrong := [nodes for nodes in args.nodes if not 2 <= nodes <= 8]:
        raise UsageError(f"--nodes {wrong[0]} is wrong because a ring needs 2; use 2 to 8")
    for link in args.links:
        split_link(link)
    return args


def split_link(text: str) -> tuple[str, str | None]:
    """The rate, and the delay if there is one, of `1gbit` or `1gbit,2ms`."""
    rate, _, delay = text.partition(",")
    parse_rate(rate, f"--links {text}")
    if delay:
        parse_delay(delay)
    return rate, delay or None


def compare_links(run: Run, args: Namespace) -> None:
    """Measure every link with every number of nodes, and check the worst prediction."""
    jobs = [(link, nodes) for link in args.links for nodes in args.nodes]
    rows, made = [], 0
    for link, nodes in run.progress(jobs, "links"):
        rounds = undisturbed(link, nodes, args)
        made += len(rounds)
        rows += [min(same, key=lambda row: row[5]) for same in zip(*rounds, strict=True)]
    run.print(f"clusters made: {made} for {len(jobs)}; again where the host took cores away")
    run.table(
        "links",
        ["link", "K", "MiB", "wrong elements", "predicted (ms)", "measured (ms)", "error (%)"],
        rows,
        caption="gloo's all-reduce; predicted from the link's rate and delay",
    )
    draw(run, rows, args.tolerance)
    run.check_equal("no wrong element", sum(row[3] for row in rows), 0)
    worst = max(abs(row[-1]) for row in rows)
    if args.tolerance is not None:
        run.check_below(
            "the worst error of a prediction", worst, 100 * args.tolerance, "%", of_time=True
        )


def undisturbed(link: str, nodes: int, args: Namespace) -> list[list[list[Any]]]:
    """The rows of one cluster after another, until the machine had its cores for one of them."""
    rounds = []
    for _ in range(args.rounds):
        stolen, begun = steal_s(), time.monotonic()
        rounds.append(measured(link, nodes, args))
        lost = (steal_s() - stolen) / (time.monotonic() - begun) / psutil.cpu_count()
        if lost < MOST_STOLEN:
            break
    return rounds


def steal_s() -> float:
    """Seconds for which a hypervisor has kept this machine's cores from it, of all cores together;
    0 where there is none."""
    return getattr(psutil.cpu_times(), "steal", 0.0)


def measured(link: str, nodes: int, args: Namespace) -> list[list[Any]]:
    """A row of the table for each size, measured on a cluster of its own."""
    rate, delay = split_link(link)
    burst = round(burst_bytes(parse_rate(rate)))
    flags = [
        "--preset", args.preset, "--backend", "gloo", "--device", "cpu",
        "--min-bytes", "1M", "--max-bytes", f"{args.max_mib}M", "--factor", "4",
        "--link-rate", rate, "--link-burst", str(burst),
        *(["--link-delay", delay] if delay else []),
    ]  # fmt: skip
    with VirtualCluster(nodes, rate, delay) as cluster:
        table = record_of(cluster, MICROBENCH, flags, args.timeout)["tables"]["all_reduce"]
    lines = [dict(zip(table["columns"], cells, strict=True)) for cells in table["rows"]]
    return [
        [
            link.replace(",", " + "), nodes, line["size (B)"] // 2**20, line["#wrong"],
            line["predicted (us)"] / 1e3, line["quartile (us)"] / 1e3, line["error (%)"],
        ]
        for line in lines
    ]  # fmt: skip


def draw(run: Run, rows: list[list[Any]], tolerance: float | None) -> None:
    """Every prediction's error over the time that it is of."""
    series = []
    for nodes in dict.fromkeys(row[1] for row in rows):
        own = [row for row in rows if row[1] == nodes]
        errors = [row[-1] for row in own]
        series.append({"label": f"{nodes} nodes", "x": [row[5] for row in own], "y": errors})
    ends = [] if tolerance is None else [100 * tolerance, -100 * tolerance]
    run.figure(
        "links", kind="scatter", title="An all-reduce predicted from its link", log_x=True,
        x_label="measured (ms)", y_label="error of the prediction (%)", series=series,
        lines=[{"label": f"{end:+g} %", "y": end} for end in ends],
    )  # fmt: skip


if __name__ == "__main__":
    script.exit(main)
