"""Router and workers on three virtual nodes: a link that becomes slow, and a node without power.

On one machine a dead worker's kernel closes its connections. Where a machine loses its power nobody
says anything, and a slow cable looks like a slow worker. So the router stands on node0, the workers
on node1 and node2. Clients stream answers without a pause while node1's link gets slow, and later
while node2's power is cut.

What the cut costs is known beforehand: a worker that is silent for --hang-after is asked for a
token, and when that has not come after --probe-timeout, its streams go on elsewhere:

    slowest answer <= time of an answer + hang-after + probe-timeout + what is computed again

Nobody who gives requests out in turns knows of a slow link; who counts those in hand sends fewer
there.

Run:
    python chapter07-sglang/code/router_nodes.py

You should see: no failed request and no cut stream in any phase; in turns half of all requests on
the slow link, by load fewer; and the node in use again when it is back.
"""

import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from distlab import script
from distlab.cluster.availability import unavailable
from distlab.cluster.commands import NodeProcess
from distlab.cluster.virtual import VirtualCluster
from distlab.errors import RunError
from distlab.run import Run
from distlab.script import Skipped
from distlab.service import await_that
from llm_router import contenders

PRESETS = {"smoke": {"seconds": 4.0}, "laptop": {"seconds": 12.0}, "gpu": {"seconds": 20.0}}
NODES = ("node1", "node2")
ROUTER, WORKERS = "http://node0:8220", [f"http://{node}:8231" for node in NODES]
CLIENTS, TOKENS, ANSWER_S = 12, 20, 0.4
HANG_AFTER_S, PROBE_TIMEOUT_S = 0.5, 1.0  # router.py's
SLOW = "200kbit"
BODY = {"model": "fake", "max_tokens": TOKENS, "temperature": 0, "stream": True}
LIMIT_S = 30.0  # of a request, of a start
COLUMNS = ["phase", "answers/s", "p50, s", "slowest, s", "failed or cut", "at node1, %",
           "at node2, %"]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.drive:
        print(json.dumps(uvloop.run(drive(args.seconds))))
        return 0
    if why := unavailable():
        raise Skipped(why)
    with script.run(args) as run:
        seen = {policy: measure(run, args, policy) for policy in ("round_robin", "least_loaded")}
        show(run, seen)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    parser.add_argument("--seconds", type=script.seconds, help="of load in each phase")
    parser.add_argument("--drive", action="store_true", help="be the clients, on node0")
    return parser.parse_args(argv)


def measure(run: Run, args: Namespace, policy: str) -> dict[str, dict[str, Any]]:
    """What the clients of one router saw, in each phase."""
    seen: dict[str, dict[str, Any]] = {}
    with VirtualCluster(1 + len(NODES), delay="1ms") as cluster:
        for node in NODES:
            start_worker(cluster, node)
        router = [str(Path(__file__).with_name("router.py")), "--policy", policy]
        start(cluster, "node0", [*router, "--host", "0.0.0.0", "--port", "8220",
                                 "--workers", *WORKERS])  # fmt: skip

        def phase(name: str, meanwhile: Callable[[], object] = lambda: None) -> None:
            clients = start(cluster, "node0", [__file__, "--drive", "--seconds", f"{args.seconds}"])
            time.sleep(args.seconds / 4)
            meanwhile()
            if clients.wait(args.seconds + LIMIT_S):
                raise RunError(f"the clients ended with an error: {clients.errors()[-500:]}")
            seen[name] = json.loads(clients.output().splitlines()[-1])
            run.print(f"{policy}: {name}")

        phase("all is well")
        cluster.rate("node1", SLOW)
        phase("node1's link is slow")
        cluster.rate("node1", None)
        phase("node2's power is cut", lambda: cluster.power_off("node2"))
        cluster.power_on("node2")
        start_worker(cluster, "node2")
        phase("node2 is back")
    return seen


def start_worker(cluster: VirtualCluster, node: str) -> None:
    start(cluster, node, ["-m", "llm_router.fake_worker", "--host", "0.0.0.0", "--port", "8231",
                          "--decode-ms", f"{1000 * ANSWER_S}"])  # fmt: skip


def start(cluster: VirtualCluster, node: str, command: list[str]) -> NodeProcess:
    """A Python command on a node, once it has said that it is there."""
    process = cluster.start(node, [sys.executable, *command])

    def alive() -> None:
        if process.poll() is not None:
            raise RunError(f"{command[0]} on {node} ended at once: {process.errors()[-500:]}")

    await_that(process.output, LIMIT_S, f"{command[0]} on {node} did not start", alive)
    return process


async def drive(seconds: float) -> dict[str, Any]:
    """Clients without a pause: what they saw, and how many requests each worker got."""
    before = counts()

    async def begun() -> None:
        print("begun", flush=True)

    outcomes = await contenders.load(ROUTER, BODY, CLIENTS, seconds, begun, LIMIT_S)
    took = [outcome.seconds for outcome in outcomes]
    return {
        "rate": len(outcomes) / seconds, "p50": float(np.median(took)), "slowest": max(took),
        "lost": sum(not outcome.complete for outcome in outcomes),
        "shares": [now - then for now, then in zip(counts(), before, strict=True)],
    }  # fmt: skip


def counts() -> list[int]:
    """Requests that each worker has had; one that is gone has had none."""
    had = []
    for url in WORKERS:
        try:
            had.append(int(contenders.call(url + "/stats", limit_s=2.0)["requests"]))
        except OSError:
            had.append(0)
    return had


def show(run: Run, seen: dict[str, dict[str, dict[str, Any]]]) -> None:
    for policy, phases in seen.items():
        rows = []
        for name, one in phases.items():
            shares = [100 * max(0, n) / max(1, sum(one["shares"])) for n in one["shares"]]
            off = "cut" in name  # its counter is gone with it
            rows.append([name, one["rate"], one["p50"], one["slowest"], one["lost"],
                         *([None, None] if off else shares)])  # fmt: skip
        run.table(policy, COLUMNS, rows,
                  caption=f"{policy}; {CLIENTS} clients, streams of {TOKENS} events")  # fmt: skip
        run.check_equal(
            f"{policy}: lost answers", [one["lost"] for one in phases.values()], [0] * 4
        )
        back = phases["node2 is back"]["shares"]
        run.check_above(f"{policy}: requests of the node that is back", back[1], 0)
    cut = seen["least_loaded"]["node2's power is cut"]["slowest"]
    predicted = 2 * ANSWER_S + HANG_AFTER_S + PROBE_TIMEOUT_S
    run.compare("slowest_answer_of_the_cut", predicted, cut, "s")
    turns, load = (seen[name]["node1's link is slow"]["shares"] for name in seen)
    run.check_below("share of the slow link by load, to that in turns",
                    (load[0] / sum(load)) / (turns[0] / sum(turns)), 1.0, of_time=True)  # fmt: skip


if __name__ == "__main__":
    script.exit(main)
