"""A script that measures the ranks that it has or, started plain, itself on virtual clusters.

    def main(argv=None):
        return here_or_on_nodes(parse_args(argv), measure_ranks, compare_links)

    def compare_links(run, args):
        sweep = Sweep(Path(__file__), args, FOR_THE_NODES)
        records = [sweep.on_nodes(2, rate) for rate in run.progress(args.rates, "clusters")]
        run.check_equal("every job is sound", sweep.sound, [True] * len(records))

The nodes run the same script by the same flags, gloo on their CPU, and --link-rate tells it their
link; so a reader with several machines runs it there by torchrun, and gets one point of the curve.

Nodes that share this machine's cores would compute more slowly than real ones. A sweep that is told
how long one node computes has them sleep that long instead (`sleeps_s` says so to the node): by a
variable, since no reader should set it.
"""

import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distlab import runtime, script
from distlab.cluster.availability import unavailable
from distlab.cluster.recording import flags_for_nodes, record_of
from distlab.cluster.virtual import VirtualCluster
from distlab.errors import Skipped
from distlab.run import Run
from distlab.runtime import Runtime

TIMEOUTS = 4  # of a process group, that a job on the nodes may take
SLEEPS = "LAB_NODE_SLEEPS_S"


def here_or_on_nodes(
    args: Namespace,
    measure_ranks: Callable[[Run, Namespace, Runtime], None],
    use_clusters: Callable[[Run, Namespace], None],
) -> int:
    """The status of a run: of this job's ranks under a launcher, else one that makes clusters.

    Raises `Skipped` where no virtual cluster can be made.
    """
    if "RANK" not in os.environ:
        if why := unavailable():
            raise Skipped(why)
        with script.run(args) as run:
            use_clusters(run, args)
        return run.status
    with (
        script.run(args) as run,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        measure_ranks(run, args, job)
    return run.status


def sleeps_s() -> float | None:
    """Seconds that a rank sleeps in place of computing a step; None: it computes."""
    return float(os.environ[SLEEPS]) if SLEEPS in os.environ else None


@dataclass
class Sweep:
    """Runs of `script` on the nodes of clusters, with `args`' values of `names`."""

    script: Path
    args: Namespace
    names: Sequence[str]
    computes_s: float | None = None  # of one node alone: once known, the nodes sleep so long
    sound: list[bool] = field(default_factory=list)  # of each run: whether all its checks held
    ranks_per_node: int = 1

    def on_nodes(self, nodes: int, rate: str | None, *flags: str) -> dict[str, Any]:
        """Rank 0's record on so many new nodes, whose links have `rate`, or are not shaped."""
        with VirtualCluster(nodes, rate) as cluster:
            return self.on(cluster, rate, *flags)

    def on(self, cluster: VirtualCluster, rate: str | None, *flags: str) -> dict[str, Any]:
        """The same on a cluster that is there, whose links are as the caller has made them."""
        told = [*flags_for_nodes(self.args, self.names), *flags]
        if rate is not None:
            told += ["--link-rate", rate]
        env = {} if self.computes_s is None else {SLEEPS: str(self.computes_s)}
        record = record_of(
            cluster,
            self.script,
            told,
            TIMEOUTS * self.args.timeout,
            env=env,
            ranks_per_node=self.ranks_per_node,
        )
        self.sound.append(all(check["ok"] for check in record["checks"]))
        return record
