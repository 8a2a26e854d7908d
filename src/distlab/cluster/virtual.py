"""Several nodes on one machine, with addresses, hostnames and links that can be slow or cut."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from distlab.cluster import links
from distlab.cluster.commands import NodeProcess, attached, finish
from distlab.cluster.links import Shape
from distlab.cluster.network import Network, Traffic
from distlab.cluster.slurm import Slurm
from distlab.cluster.slurm import start as start_slurm
from distlab.cluster.variables import node_variables, rank_variables
from distlab.cluster.world import World
from distlab.errors import UsageError
from distlab.process import Completed

MOST_NODES = 64
FIRST_PORT = 29500


class VirtualCluster:
    """Nodes as namespaces of this machine, which see its files and share its processors.

    `rate` limits each node's link in both directions, `delay` is the time that a packet takes from
    one node to another, `slow` maps a node to a rate of its own, `loss` is the share of the packets
    to a node that do not arrive. The nodes are called node0, node1, and so on; they are up within
    the `with` block, and gone after it, however it is left, even by SIGKILL of this process.

    Raises `UsageError` for wrong arguments, and `Skipped` where the machine can make no cluster.
    """

    def __init__(
        self,
        nodes: int,
        rate: str | None = None,
        delay: str | None = None,
        slow: Mapping[str, str] | None = None,
        slurm: bool = False,
        loss: str | None = None,
    ) -> None:
        if not 1 <= nodes <= MOST_NODES:
            raise UsageError(
                f"--nodes {nodes} is wrong because a cluster has 1 to {MOST_NODES} nodes"
            )
        self.names = [links.name(index) for index in range(nodes)]
        everyone = Shape(
            None if rate is None else links.parse_rate(rate),
            0.0 if delay is None else links.parse_delay(delay),
            0.0 if loss is None else links.parse_loss(loss),
        )
        self._shapes = dict.fromkeys(self.names, everyone)
        for name, own in (slow or {}).items():
            self._index(name, f"--slow {name}={own}")
            bits_per_s = links.parse_rate(own, f"--slow {name}={own}")
            self._shapes[name] = replace(everyone, bits_per_s=bits_per_s)
        self.slurm: Slurm | None = None  # while the cluster is up, if it was asked for
        self._with_slurm = slurm
        self._pids: dict[str, int] = {}  # of the first process of each node that is on
        self._processes: list[NodeProcess] = []
        self._next_port = FIRST_PORT

    def __enter__(self) -> Self:
        files = {"/etc/hosts": links.hosts(len(self.names))}
        if (nsswitch := Path("/etc/nsswitch.conf")).exists():
            files[str(nsswitch)] = links.nsswitch(nsswitch.read_text(encoding="utf-8"))
        self._world = World(files)
        self._network = Network(self._world, self._shapes)
        try:
            self._network.build()
            self._boot(self.names)
            if self._with_slurm:
                self.slurm = start_slurm(self)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()

    @property
    def as_user(self) -> bool:
        """Whether the cluster lives in a user namespace, since this user may make no other."""
        return self._world.as_user

    def run(
        self,
        command: Sequence[str],
        nodes: Sequence[str] | None = None,
        env: Mapping[str, str] | None = None,
        timeout_s: float | None = 60.0,
        echo: bool = False,
    ) -> list[Completed]:
        """Run `command` on every node, or those named, at once; how it ended on each.

        A command that runs after `timeout_s` is ended and has status 124; nothing that a command
        started is left. `echo` prints what they write as they write it, with the node's name.
        """
        group = uuid.uuid4().hex
        return finish(
            [
                self._start(node, command, env or {}, node, echo, group)
                for node in self._chosen(nodes)
            ],
            group,
            timeout_s,
        )

    def run_ranks(
        self,
        command: Sequence[str],
        nodes: Sequence[str] | None = None,
        ranks_per_node: int = 1,
        env: Mapping[str, str] | None = None,
        timeout_s: float | None = 120.0,
        echo: bool = False,
    ) -> list[Completed]:
        """Run `command` once for each rank, with the variables that torchrun sets; as `run`.

        It needs no agent on each node, so a job starts in half of torchrun's time.
        """
        group = uuid.uuid4().hex
        hosts = self._chosen(nodes)
        self._next_port += 1  # the last job's may still be closing
        processes = []
        for rank in range(len(hosts) * ranks_per_node):
            place, local_rank = divmod(rank, ranks_per_node)
            label = hosts[place] + (f".{local_rank}" if ranks_per_node > 1 else "")
            torchrun = rank_variables(rank, hosts, ranks_per_node, self._next_port)
            variables = {**torchrun, **(env or {})}
            processes.append(self._start(hosts[place], command, variables, label, echo, group))
        return finish(processes, group, timeout_s)

    def start(
        self,
        node: str,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        echo: bool = False,
    ) -> NodeProcess:
        """Start `command` on a node and go on; it ends with the cluster at the latest."""
        process = self._start(node, command, env or {}, node, echo)
        self._processes.append(process)
        return process

    def attach(
        self, node: str, command: Sequence[str], env: Mapping[str, str] | None = None
    ) -> int:
        """Run `command` on a node with this process's terminal, such as a shell; its status."""
        return attached(self._enter(node), command, self.environment(node, env or {}))

    def rate(self, node: str, rate: str | None, delay: str | None = None) -> None:
        """Change a node's link while jobs run: its rate both ways, None for as fast as it goes.

        `delay` is how long what reaches the node takes, None for as it was.
        """
        self._index(node)
        bits_per_s = None if rate is None else links.parse_rate(rate)
        before = self._network.shapes[node].delay_s
        delay_s = before if delay is None else links.parse_delay(delay)
        shape = replace(self._network.shapes[node], bits_per_s=bits_per_s, delay_s=delay_s)
        self._network.shape(node, shape)

    def rates(self, rate: str | None) -> None:
        """Change every node's link alike, as `rate`."""
        for node in self.names:
            self.rate(node, rate)

    def cut(self, node: str) -> None:
        """Pull the cable of a node's link: packets get lost, and nobody is told."""
        self._check_on(node)
        self._network.set_link(node, "down")

    def heal(self, node: str) -> None:
        """Plug the cable of a node's link in again."""
        self._check_on(node)
        self._network.set_link(node, "up")

    def power_off(self, node: str) -> None:
        """Cut a node's power: all its processes end at once, and its peers hear no goodbye."""
        self._check_on(node)
        self._network.unplug(node)
        self._world.ask(kill=node)
        del self._pids[node]

    def power_on(self, node: str) -> None:
        """Start a node again after `power_off`; nothing runs on it but Slurm's daemons, if any."""
        self._index(node)
        if node not in self._pids:
            self._boot([node])
            if self.slurm:
                self.slurm.power_on(node)

    def traffic(self, node: str) -> Traffic:
        """What went over a node's link since it was switched on."""
        self._check_on(node)
        return self._network.traffic(node)

    def environment(self, node: str, env: Mapping[str, str]) -> dict[str, str]:
        """What a command on a node has for variables: the caller's, where it is, and `env`."""
        return node_variables(self._index(node), self.names, env)

    def _start(
        self,
        node: str,
        command: Sequence[str],
        env: Mapping[str, str],
        label: str,
        echo: bool,
        group: str = "",
    ) -> NodeProcess:
        variables = self.environment(node, env)
        return NodeProcess(self._enter(node), command, variables, label, echo, group)

    def _enter(self, node: str) -> list[str]:
        self._check_on(node)
        return self._world.enter(self._pids[node])

    def _chosen(self, nodes: Sequence[str] | None) -> list[str]:
        """The nodes named, or all that are on."""
        if nodes is None:
            return [name for name in self.names if name in self._pids]
        for name in nodes:
            self._check_on(name)
        return list(nodes)

    def _boot(self, names: Sequence[str]) -> None:
        """Switch nodes on and plug them in."""
        pids = {name: self._world.ask(boot=name)["pid"] for name in names}
        self._pids.update(pids)
        self._network.plug_in(pids)

    def _check_on(self, node: str) -> None:
        self._index(node)
        if node not in self._pids:
            raise UsageError(f"{node} is off; use power_on({node!r}) first")

    def _index(self, name: str, option: str | None = None) -> int:
        if name not in self.names:
            raise UsageError(
                f"{option or f'the node {name}'} is wrong because the cluster has no {name}; "
                f"use one of {', '.join(self.names)}"
            )
        return self.names.index(name)

    def _close(self) -> None:
        self._world.close()
        self._network.close()
        for process in self._processes:
            process.join()
        self._pids.clear()
