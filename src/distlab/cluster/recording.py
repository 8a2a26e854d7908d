"""Run a script on the nodes of a virtual cluster, and read the record it writes."""

import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distlab import record
from distlab.cluster.virtual import VirtualCluster
from distlab.errors import RunError

CHECK_FAILED = 1
# The nodes share this machine's cores, and what they measure goes into the record of who asked.
RANK_VARIABLES = {"OMP_NUM_THREADS": "1", "LAB_RECORD_DIR": ""}


def flags_for_nodes(args: Namespace, names: Sequence[str]) -> list[str]:
    """The flags of a script that runs itself on the nodes: those in `names` that are set in `args`,
    for gloo on the nodes' CPU."""
    flags = ["--backend", "gloo", "--device", "cpu"]
    for name in names:
        if (value := getattr(args, name)) is not None:
            values = value if isinstance(value, list) else [value]
            flags += [f"--{name.replace('_', '-')}", *map(str, values)]
    return flags


def record_of(
    cluster: VirtualCluster,
    script: Path,
    flags: Sequence[str],
    timeout_s: float,
    nodes: Sequence[str] | None = None,
    env: Mapping[str, str] | None = None,
    ranks_per_node: int = 1,
) -> dict[str, Any]:
    """Run `script` on the nodes; rank 0's record. A check of its own that fails is in the record.

    `env` are more variables, for what no reader sets and no flag should offer.
    Raises `RunError` with the last line that a rank wrote when it fails otherwise.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "record.json"
        command = [sys.executable, str(script), *flags, "--json", str(file)]
        ranks = cluster.run_ranks(
            command, nodes, ranks_per_node, {**RANK_VARIABLES, **(env or {})}, timeout_s
        )
        for rank, done in enumerate(ranks):
            if done.status not in (0, CHECK_FAILED) or not file.exists():
                words = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()
                raise RunError(
                    f"rank {rank} of {script.name} ended with status {done.status}: {words[-1]}"
                )
        return record.load(file)
