"""The environment variables of what runs on a node, and of a rank that runs without torchrun."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from distlab.host import PROXIES


def node_variables(index: int, names: Sequence[str], env: Mapping[str, str]) -> dict[str, str]:
    """The caller's variables, where the command is, and `env`; a proxy of the host's is out of a
    node's reach.

    The nodes share this machine's cores: as many threads on each as there are cores would wait for
    each other, and a step take twice as long.
    """
    caller = {k: v for k, v in os.environ.items() if k.lower() not in PROXIES}
    threads = max(1, len(os.sched_getaffinity(0)) // len(names))
    return {
        "OMP_NUM_THREADS": str(threads),
        **caller,
        "PATH": path_with_torchrun(caller),
        "NODE_RANK": str(index),
        "NNODES": str(len(names)),
        "HEAD": names[0],
        **env,
    }


def path_with_torchrun(caller: Mapping[str, str]) -> str:
    """The caller's PATH, with this Python's programs first unless an environment is active in it:
    another one than ours, it may be, such as the one that has vLLM."""
    here, path = str(Path(sys.executable).parent), caller.get("PATH", os.defpath)
    known = {here}
    if active := caller.get("VIRTUAL_ENV"):
        known.add(str(Path(active) / "bin"))
    return path if known & set(path.split(os.pathsep)) else f"{here}{os.pathsep}{path}"


def rank_variables(
    rank: int, hosts: Sequence[str], ranks_per_node: int, port: int
) -> dict[str, str]:
    """What torchrun tells a rank of one of `ranks_per_node` on each of `hosts`."""
    variables = {
        "RANK": rank,
        "WORLD_SIZE": len(hosts) * ranks_per_node,
        "LOCAL_RANK": rank % ranks_per_node,
        "LOCAL_WORLD_SIZE": ranks_per_node,
        "GROUP_RANK": rank // ranks_per_node,
        "MASTER_ADDR": hosts[0],
        "MASTER_PORT": port,
    }
    return {name: str(value) for name, value in variables.items()}
