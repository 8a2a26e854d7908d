"""A real Slurm on a virtual cluster: Debian's packages, and GPUs as fake generic resources.

`VirtualCluster(nodes=2, slurm=True)` starts munged and slurmd on every node, and slurmctld on the
first. Nothing of the machine's own Slurm is used or disturbed: configuration, key, sockets, state
and logs of each node stand in a folder of its memory, which vanishes with it. The daemons run as
the user who made the cluster, and so do the jobs, which end with the cluster at the latest. A node
that loses its power is down* after half a minute, and its job waits to run again; the first node
takes the queue with it.
"""

import os
import re
import secrets
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from distlab.cluster.availability import find_program, install_line, program
from distlab.cluster.commands import NodeProcess
from distlab.cluster.slurm_conf import CPUS, FOLDER, GPUS, MOST_MINUTES, configuration
from distlab.errors import RunError, Skipped
from distlab.process import Completed

HELP = f"""With --slurm, CMD runs once, on node0: a script, or a shell such as bash, in which sinfo,
srun, sbatch, squeue, scancel and scontrol work. Whatever the machine has, each node has {CPUS} CPUs
and {GPUS} GPUs to be asked for, of which a job learns by CUDA_VISIBLE_DEVICES; a job may take
{MOST_MINUTES} minutes. Jobs run as you, and end with CMD at the latest."""
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "sinfo", "scontrol")
PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client")
CLIENT_VARIABLES = ("SLURM_", "SBATCH_", "SALLOC_", "SRUN_", "SQUEUE_", "SINFO_", "SCANCEL_")
LIMIT_S = 60.0
POLL_S = 0.02
VERSION_LIMIT_S = 10.0
NOBODY = 65534  # whom root is where it may not change its groups, as slurmd of root would
SLURM_CONF = f"{FOLDER}/slurm.conf"
NODE_SCRIPT = Path(__file__).with_name("slurm_node.sh")
# Only ping fails at once while nobody listens: all else asks again a second later.
ALL_IDLE = """
until scontrol ping; do sleep 0.1; done >/dev/null 2>&1
until [ "$(sinfo -h -N -t idle -o %N | sort -u | wc -l)" = "$1" ]; do sleep 0.05; done
"""


def unavailable() -> str | None:
    """None where Slurm is installed, else a sentence that says what is missing and what to do."""
    missing = [name for name in PROGRAMS if find_program(name) is None]
    if not missing:
        return None
    what = "is" if len(missing) == 1 else "are"
    return f"{', '.join(missing)} of Slurm {what} missing; {install_line(PACKAGES)}"


class Nodes(Protocol):
    """What Slurm needs of the cluster that it runs on; `as_user` in a user namespace."""

    names: list[str]

    @property
    def as_user(self) -> bool: ...

    def start(
        self, node: str, command: Sequence[str], env: Mapping[str, str] | None = None
    ) -> NodeProcess: ...

    def run(
        self,
        command: Sequence[str],
        nodes: Sequence[str] | None = None,
        env: Mapping[str, str] | None = None,
        timeout_s: float | None = 60.0,
        echo: bool = False,
    ) -> list[Completed]: ...

    def attach(self, node: str, command: Sequence[str]) -> int: ...


def start(cluster: Nodes) -> "Slurm":
    """Start Slurm on a cluster whose nodes are on, and wait until all of them are idle.

    Raises `Skipped` where Slurm is not installed, and `RunError` when it does not come up.
    """
    if why := unavailable():
        raise Skipped(why)
    slurm = Slurm(cluster)
    for node in cluster.names:
        slurm.power_on(node)
    slurm.wait_until_idle()
    return slurm


class Slurm:
    """Slurm's daemons on the nodes of a cluster; they end when their nodes do."""

    def __init__(self, cluster: Nodes) -> None:
        self.head = cluster.names[0]
        self._cluster = cluster
        self._daemons: dict[str, NodeProcess] = {}
        uid, gid = _user(cluster.as_user)
        # A client is whom it says it is only if munged, which asks the kernel, sees the same user.
        self._become = (
            [program("unshare"), "--user", f"--map-user={uid}", f"--map-group={gid}", "--"]
            if cluster.as_user
            else []
        )
        self._setup = {
            "SLURM_CONF": SLURM_CONF,
            "LAB_FOLDER": FOLDER,
            "LAB_USER": f"{uid}:{gid}",
            "LAB_MUNGE_KEY": secrets.token_hex(64),
            **configuration(cluster.names, uid, _version()),
        }

    def power_on(self, node: str) -> None:
        """Start the daemons of a node that has just been switched on."""
        role = "head" if node == self.head else "node"
        self._daemons[node] = self._cluster.start(
            node, ["sh", str(NODE_SCRIPT), role, *self._become], self._setup
        )

    def command(self, command: Sequence[str]) -> list[str]:
        """What runs `command`, a client of this Slurm, on a node as Slurm's user.

        Where this process is itself a job of a machine's Slurm, the command does not know of it.
        """
        outer = [f"--unset={name}" for name in os.environ if name.startswith(CLIENT_VARIABLES)]
        return ["env", *outer, f"SLURM_CONF={SLURM_CONF}", *self._become, *command]

    def run(
        self,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        timeout_s: float | None = 60.0,
        echo: bool = False,
    ) -> Completed:
        """Run `command`, such as `["srun", "-N2", "hostname"]`, on the head.

        A job that `sbatch` submits goes on after it.
        """
        return self._cluster.run(self.command(command), [self.head], env, timeout_s, echo)[0]

    def attach(self, command: Sequence[str]) -> int:
        """Run `command` on the head with this process's terminal, such as a shell; its status."""
        return self._cluster.attach(self.head, self.command(command))

    def wait_until_idle(self, timeout_s: float = LIMIT_S) -> None:
        """Wait until every node is idle. Raises `RunError` when they are not after `timeout_s`."""
        names = self._cluster.names
        asking = self._cluster.start(
            self.head, self.command(["sh", "-c", ALL_IDLE, "sh", str(len(names))])
        )
        deadline = time.monotonic() + timeout_s
        try:
            while (status := asking.poll()) is None:
                dead = [n for n, daemons in self._daemons.items() if daemons.poll() is not None]
                if dead or time.monotonic() > deadline:
                    why = "do not run" if dead else f"are not ready after {timeout_s:.0f} s"
                    raise RunError(
                        f"Slurm's daemons on {', '.join(dead or names)} {why}: {self._last_words()}"
                    )
                time.sleep(POLL_S)
            if status != 0:
                raise RunError(f"{self.head} cannot ask for Slurm's nodes: {asking.errors()}")
        finally:
            asking.end()

    def _last_words(self) -> str:
        """What the daemons complain about."""
        logs = f"cat {FOLDER}/*.log"
        texts = [daemons.errors() for daemons in self._daemons.values()]
        texts += [done.stdout for done in self._cluster.run(["sh", "-c", logs])]
        lines = [line for text in texts for line in text.splitlines()]
        fatal = [line for line in lines if "fatal" in line]
        return "; ".join(dict.fromkeys(fatal or lines[-3:])) or "they say nothing"


def _user(as_user: bool) -> tuple[int, int]:
    """The user and group that the daemons and the jobs run as."""
    if as_user and os.geteuid() == 0:
        return NOBODY, NOBODY
    return os.geteuid(), os.getegid()


def _version() -> tuple[int, ...]:
    """Slurm's version: (22, 5) for `slurm-wlm 22.05.8`."""
    command = [program("slurmctld"), "-V"]
    told = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", timeout=VERSION_LIMIT_S
    ).stdout
    found = re.search(r"(\d+)\.(\d+)", told)
    if found is None:
        raise RunError(f"slurmctld -V names no version: {told.strip()!r}")
    return int(found[1]), int(found[2])
