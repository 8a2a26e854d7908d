"""Several nodes on one machine: `VirtualCluster`, and `lab cluster` on the command line."""

from distlab.cluster import availability
from distlab.cluster import slurm as _slurm
from distlab.cluster.commands import NodeProcess
from distlab.cluster.network import Traffic
from distlab.cluster.recording import flags_for_nodes, record_of
from distlab.cluster.virtual import VirtualCluster

__all__ = [
    "NodeProcess",
    "Traffic",
    "VirtualCluster",
    "flags_for_nodes",
    "record_of",
    "unavailable",
]


def unavailable(slurm: bool = False) -> str | None:
    """None where a virtual cluster, with Slurm if so, can be made, else why not and what to do.

    A script hands the sentence on: `raise Skipped(sentence)`.
    """
    return availability.unavailable() or (_slurm.unavailable() if slurm else None)
