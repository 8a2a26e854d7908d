"""What the virtual cluster costs and how true its links are.

Run:
    python scripts/bench_cluster.py
    python scripts/bench_cluster.py --preset smoke --json build/cluster.json

You should see: the seconds that clusters of several sizes take to come up and to go, less than one
for four nodes; the seconds of one transfer at several rates beside what the rate predicts; and the
time of a round trip at several delays. Other work on the machine makes fast links slower and short
delays longer, so run it on a quiet one.
"""

import json
import statistics
import sys
import time
from argparse import Namespace

from distlab import predict, script
from distlab.cluster import VirtualCluster, links, probe, unavailable

PRESETS = {
    "smoke": {
        "nodes": [2],
        "rates": ["100mbit"],
        "delays": ["1ms"],
        "megabytes": 0.25,
        "repeats": 3,
    },
    "laptop": {
        "nodes": [2, 4, 8],
        "rates": ["10mbit", "100mbit", "300mbit", "1gbit"],
        "delays": ["200us", "1ms", "2ms", "10ms"],
        "megabytes": 4.0,
        "repeats": 9,
    },
}
PRESETS["gpu"] = PRESETS["laptop"]
LONGEST_START_S = 1.0
PROBE = [sys.executable, "-I", "-S", probe.__file__]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if why := unavailable():
        raise script.Skipped(why)
    with script.run(args) as run:
        starts = {nodes: up_and_down(nodes, args.repeats) for nodes in args.nodes}
        run.table("start", ["nodes", "up s", "down s"], [[n, *both] for n, both in starts.items()])
        run.table(
            "rate",
            ["rate", "delay", "predicted s", "measured s", "measured / predicted"],
            [
                transfer(rate, delay, args.megabytes, args.repeats)
                for delay in (None, args.delays[-1])
                for rate in args.rates
            ],
            f"{args.megabytes} MB from one node to another",
        )
        run.table(
            "delay",
            ["delay", "there and back s", "without delay s"],
            [[delay, *round_trips(delay, args.repeats)] for delay in args.delays],
        )
        if args.preset != "smoke":
            slowest = max(up for nodes, (up, _) in starts.items() if nodes <= 4)
            run.check_below("seconds until 4 nodes are up", slowest, LONGEST_START_S, "s")
    return run.status


def up_and_down(nodes: int, repeats: int) -> tuple[float, float]:
    """Median seconds that a cluster takes to come up, and to go."""
    ups, downs = [], []
    for _ in range(repeats):
        began = time.perf_counter()
        with VirtualCluster(nodes, rate="1gbit"):
            ups.append(time.perf_counter() - began)
            began = time.perf_counter()
        downs.append(time.perf_counter() - began)
    return statistics.median(ups), statistics.median(downs)


def transfer(rate: str, delay: str | None, megabytes: float, repeats: int) -> list:
    """A row: how long a transfer takes at a rate, predicted and measured.

    While the sender waits for the answer to one transfer, its link saves up for the next.
    """
    size = int(megabytes * 1e6)
    bits_per_s = links.parse_rate(rate)
    round_trip = 2 * links.parse_delay(delay or "0s")
    saved = min(links.burst_bytes(bits_per_s) * 8 / bits_per_s, round_trip)
    predicted = size / predict.tcp_goodput(bits_per_s) + round_trip - saved
    with VirtualCluster(2, rate, delay) as cluster:
        measured = median_seconds(cluster, size, repeats)
    return [rate, delay or "none", predicted, measured, measured / predicted]


def round_trips(delay: str, repeats: int) -> tuple[float, float]:
    """Median seconds there and back: with a delay, and on the same cluster without."""
    with VirtualCluster(2, delay=delay) as cluster:
        delayed = median_seconds(cluster, 1, 10 * repeats)
    with VirtualCluster(2) as cluster:
        return delayed, median_seconds(cluster, 1, 10 * repeats)


def median_seconds(cluster: VirtualCluster, size: int, repeats: int) -> float:
    """Of a transfer from node0 to node1, without the first, in which TCP finds its speed."""
    server = cluster.start("node1", [*PROBE, "serve"])
    while "ready" not in server.output():
        time.sleep(0.01)
    command = [*PROBE, "send", "node1", str(size), str(repeats + 1)]
    (client,) = cluster.run(command, nodes=["node0"], timeout_s=300)
    if client.status != 0:
        raise script.RunError(f"the transfer failed: {client.stderr}")
    return statistics.median(json.loads(client.stdout)[1:])


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    parser.add_argument("--nodes", type=script.positive_int, nargs="+", metavar="N")
    parser.add_argument("--rates", nargs="+", metavar="R", help="such as 100mbit")
    parser.add_argument("--delays", nargs="+", metavar="T", help="such as 2ms")
    parser.add_argument("--megabytes", type=script.positive_float, help="sent at once")
    parser.add_argument("--repeats", type=script.positive_int)
    return parser.parse_args(argv)


if __name__ == "__main__":
    script.exit(main)
