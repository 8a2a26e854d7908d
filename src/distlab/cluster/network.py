"""The links of a cluster's nodes and the switch between them, made with ip and tc."""

import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from distlab.cluster import links
from distlab.cluster.commands import say
from distlab.cluster.delays import FASTEST, JITTER_S, DelaySwitch, kernel_has_netem
from distlab.cluster.links import Shape
from distlab.cluster.world import World
from distlab.errors import RunError


@dataclass(frozen=True)
class Traffic:
    """Bytes that went over a node's link, headers included.

    The kernel hands over a burst of packets as one large packet, whose headers count once.
    """

    sent: int
    received: int


class Network:
    """A link for each node that is plugged in, of the shape that `shapes` gives the node."""

    def __init__(self, world: World, shapes: Mapping[str, Shape]) -> None:
        self.shapes = dict(shapes)
        self.netem: bool | None = None  # not asked yet
        self._world = world
        self._ports = {name: links.port(index) for index, name in enumerate(shapes)}
        self._pids: dict[str, int] = {}  # of a process on each node that is plugged in
        self._shaped: set[str] = set()
        self._switch: DelaySwitch | None = None

    def build(self) -> None:
        """Make the switch that nodes are plugged in to."""
        self._world.administer("ip", links.switch_lines())

    def plug_in(self, pids: Mapping[str, int]) -> None:
        """Connect nodes, given by the pid of a process of each, to the switch."""
        indexes = {name: list(self._ports).index(name) for name in pids}
        bridged = self._switch is None
        lines = [links.plug_lines(indexes[name], pid, bridged) for name, pid in pids.items()]
        self._world.administer("ip", [line for both in lines for line in both])
        self._pids.update(pids)
        self._on_each("ip", {name: links.node_lines(indexes[name]) for name in pids})
        self._reshape(list(pids))

    def unplug(self, name: str) -> None:
        """Take a node's link away: nothing that the node still sends gets out."""
        self._world.administer("ip", [f"link delete {self._ports[name]}"])
        del self._pids[name]
        self._shaped.discard(name)

    def shape(self, name: str, shape: Shape) -> None:
        """Give a node's link another shape, at once if it is plugged in."""
        self.shapes[name] = shape
        if name in self._pids:
            self._reshape([name])

    def set_link(self, name: str, state: str) -> None:
        """Set the switch's end of a link up or down."""
        self._world.administer("ip", [f"link set {self._ports[name]} {state}"])

    def traffic(self, name: str) -> Traffic:
        """What went over a node's link since it was plugged in."""
        for line in (
            Path(f"/proc/{self._world.pid}/net/dev").read_text(encoding="utf-8").splitlines()
        ):
            device, _, counts = line.partition(":")
            if device.strip() == self._ports[name]:  # the switch receives what the node sends
                columns = counts.split()
                return Traffic(sent=int(columns[0]), received=int(columns[8]))
        raise RunError(f"{name} has no link")

    def close(self) -> None:
        """To be called when the world has ended."""
        if self._switch:
            self._switch.close()

    def _reshape(self, names: Sequence[str]) -> None:
        """Give links their shapes: rates at both ends, delays where they leave the switch."""
        if any(shape.impaired for shape in self.shapes.values()):
            self._make_impairment_possible()
        shaped = [n for n in names if n in self._shaped or self.shapes[n] != Shape()]
        self._shaped.update(shaped)
        netem, jitter_s = bool(self.netem), JITTER_S if self._switch else 0.0
        outer = [links.shape_line(self._ports[n], self.shapes[n], netem, jitter_s) for n in shaped]
        self._world.administer("tc", outer)
        rates = {n: replace(self.shapes[n], delay_s=0.0, loss=0.0) for n in shaped}
        self._on_each("ip", {n: [links.packet_line(rates[n])] for n in shaped})
        self._on_each("tc", {n: [links.shape_line("eth0", rates[n], netem)] for n in shaped})
        if self._switch:
            shapes = {n: self.shapes[n] for n in self._pids}
            self._switch.configure(
                {self._ports[n]: (shape.delay_s, shape.loss) for n, shape in shapes.items()}
            )

    def _make_impairment_possible(self) -> None:
        """Have the switch in user space replace the kernel's where that has no netem."""
        if self.netem is None:
            self.netem = kernel_has_netem(self._world)
        if self.netem:
            return
        if self._switch is None:
            ports = [self._ports[name] for name in self._pids]
            self._world.administer("ip", [f"link set {port} nomaster" for port in ports])
            self._switch = DelaySwitch(self._world)
        limit = links.parse_rate(FASTEST)
        if any((shape.bits_per_s or 0) > limit for shape in self.shapes.values()):
            say(
                f"warning: this kernel has no netem, so packets are delayed or lost in user space, "
                f"which carries about {FASTEST} a node; choose such a rate or less",
                sys.stderr,
            )

    def _on_each(self, tool: str, lines: Mapping[str, Sequence[str]]) -> None:
        """Carry out lines of ip or tc on several nodes at once."""

        def on(name: str) -> None:
            self._world.administer(tool, lines[name], self._pids[name])

        with ThreadPoolExecutor() as pool:
            list(pool.map(on, lines))
