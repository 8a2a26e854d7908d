"""A cable is pulled: nobody is told, packets get lost, and every rank waits in the same collective.

Two nodes of a virtual cluster train, and in the middle the link of node1 goes down. TCP keeps
trying for a quarter of an hour, so neither side sees an error: the only end is the process group's
timeout, which torch sets to 30 minutes for gloo unless the script says otherwise.

Run (it makes its own nodes, so it needs no torchrun):
    python chapter03-ddp/code/faults/dead_link.py
    python chapter03-ddp/code/faults/dead_link.py --fix

You should see: some steps, the cut, nothing until the timeout, then an error on each rank, status
1. With --fix the cable is plugged in again: TCP repeats what was lost, and training goes on.
"""

import os
import sys
import time
from argparse import Namespace
from pathlib import Path

from torch.nn.functional import cross_entropy

from ddp import fault
from distlab import ranks, script
from distlab.cluster import VirtualCluster, unavailable
from distlab.errors import RunError, Skipped
from distlab.run import Run
from distlab.runtime import Runtime

COMPUTE_S = 0.05  # of a step: so long a larger model would compute
CUT_AT, HEAL_AFTER_S = "step 10", 0.5
START_S = 60.0
PRESETS = {name: {"steps": 30} for name in ("smoke", "laptop", "gpu")}


def main(argv: list[str] | None = None) -> int:
    args = fault.parser(__doc__, **PRESETS).parse_args(argv)
    if "RANK" in os.environ:
        return fault.run(args, train)
    if why := unavailable():
        raise Skipped(why)
    with script.run(args) as run:
        cut_a_link(run, args)
    return run.status


def train(run: Run, args: Namespace, job: Runtime) -> None:
    model = fault.replica(job)
    optimizer = fault.sgd(model.parameters())
    for step in range(1, args.steps + 1):
        inputs, targets = fault.examples(job.rank, step, job.device)
        time.sleep(COMPUTE_S)
        loss = cross_entropy(model(inputs), targets)
        loss.backward()  # the mistake is none of the program's: what it sends gets lost
        optimizer.step()
        optimizer.zero_grad()
        run.print(f"sample: step {step}, loss {loss:.3f}")
    run.check_equal("all ranks hold the same weights", ranks.distinct(model.parameters()), 1)


def cut_a_link(run: Run, args: Namespace) -> None:
    """Start a rank on each of two nodes, and cut the second one's link when both are training."""
    command = [sys.executable, str(Path(__file__)), "--steps", str(args.steps)]
    command += ["--device", "cpu", "--timeout", str(args.timeout)]
    common = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "LAB_RECORD_DIR": ""}
    common |= {"MASTER_ADDR": "node0", "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1"}
    with VirtualCluster(2) as cluster:
        ranks = [
            cluster.start(node, command, {**common, "RANK": str(rank)}, echo=True)
            for rank, node in enumerate(cluster.names)
        ]
        until = time.monotonic() + START_S
        while CUT_AT not in ranks[0].output():
            if time.monotonic() > until or ranks[0].poll() is not None:
                raise RunError("the nodes did not train: " + ranks[0].errors().strip()[-200:])
            time.sleep(0.01)
        cluster.cut("node1")
        run.print("sample: the link of node1 is cut")
        if args.fix:
            time.sleep(HEAL_AFTER_S)
            cluster.heal("node1")
            run.print("sample: it is plugged in again")
        statuses = [rank.wait(args.timeout + START_S) for rank in ranks]
    run.check_equal("both ranks finish", statuses, [0, 0])


if __name__ == "__main__":
    script.exit(main)
