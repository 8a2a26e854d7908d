"""A node's link: addresses, rate, delay and loss, and the lines of ip and tc that make it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from distlab.errors import UsageError

MTU = 1500
RATE_UNITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}  # bits per second, as in tc
DELAY_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
SLOWEST = 1000
QUEUE_S = 50e-3
BRIDGE = "br0"


@dataclass(frozen=True)
class Shape:
    """How a link is slowed, in both directions; of what reaches its node, how long it takes, and
    which share is lost."""

    bits_per_s: float | None = None
    delay_s: float = 0.0
    loss: float = 0.0

    @property
    def impaired(self) -> bool:
        """Whether packets are delayed or lost, which a shaper of rates cannot do."""
        return bool(self.delay_s or self.loss)


def parse_rate(text: str, option: str | None = None) -> float:
    """Bits per second of `100mbit` and the like; a `UsageError` names the `option`."""
    option = option or f"--rate {text}"
    bits_per_s = _quantity(text, RATE_UNITS, option, "rate", "100mbit")
    if bits_per_s < SLOWEST:
        raise UsageError(f"{option} is wrong because a link needs {SLOWEST} bit/s or more")
    return bits_per_s


def parse_delay(text: str) -> float:
    """Seconds of `2ms` and the like. Raises `UsageError`."""
    return _quantity(text, DELAY_UNITS, f"--delay {text}", "time", "2ms")


def parse_loss(text: str) -> float:
    """The share that is lost, of `1%` and the like. Raises `UsageError`."""
    share = _quantity(text, {"%": 0.01}, f"--loss {text}", "share", "1%")
    if share >= 1:
        raise UsageError(f"--loss {text} is wrong because nothing would arrive; use less than 100%")
    return share


def _quantity(text: str, units: Mapping[str, float], option: str, what: str, example: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z%]*)", text.strip().lower())
    if match is None:
        raise UsageError(f"{option} is wrong because it is no {what}; use {example} or the like")
    number, unit = match.groups()
    if unit not in units:
        named = f"{unit} is no known unit" if unit else "it has no unit"
        raise UsageError(f"{option} is wrong because {named}; use one of {', '.join(units)}")
    return float(number) * units[unit]


def name(index: int) -> str:
    return f"node{index}"


def address(index: int) -> str:
    return f"10.77.0.1{index}"


def port(index: int) -> str:
    """The switch's end of a node's link."""
    return f"sw{index}"


def hosts(nodes: int) -> str:
    """/etc/hosts of every node. Its own name gives the address that others reach it by.

    Debian's default, 127.0.1.1, would have every rank wait for others on its own loopback.
    """
    own = ["127.0.0.1 localhost", "::1 localhost"]
    return "\n".join([*own, *(f"{address(i)} {name(i)}" for i in range(nodes)), ""])


def nsswitch(text: str) -> str:
    """The host's nsswitch.conf, but names of machines come from /etc/hosts alone."""
    others = [line for line in text.splitlines() if not line.startswith("hosts:")]
    return "\n".join([*others, "hosts: files", ""])


def switch_lines() -> list[str]:
    return [
        "link set lo up",
        f"link add name {BRIDGE} type bridge stp_state 0 mcast_snooping 0",
        f"link set {BRIDGE} up",
    ]


def plug_lines(index: int, pid: int, bridged: bool) -> list[str]:
    """In the switch: a cable to the node whose first process is `pid`."""
    mac = f"02:00:0a:4d:00:{index:02x}"
    veth = f"type veth peer name eth0 address {mac} netns {pid}"
    master = f" master {BRIDGE}" if bridged else ""
    return [f"link add name {port(index)} {veth}", f"link set {port(index)}{master} up"]


def node_lines(index: int) -> list[str]:
    """In the node."""
    return ["link set lo up", f"addr add {address(index)}/24 dev eth0", "link set eth0 up"]


def packet_line(shape: Shape) -> str:
    """In the node."""
    return f"link set eth0 gso_max_size {largest_packet(shape)}"


def shape_line(device: str, shape: Shape, netem: bool, least_burst_s: float = 0.0) -> str:
    """For tc, at one end of the link: its rate, and with `netem` its delay and loss too."""
    rate = None if shape.bits_per_s is None else tbf(shape.bits_per_s, least_burst_s)
    if not (netem and shape.impaired):
        return f"qdisc replace dev {device} root {rate or 'noqueue'}"
    lost = f" loss {100 * shape.loss:g}%" if shape.loss else ""
    held = f"netem delay {shape.delay_s * 1e6:.0f}us{lost} limit 100000"
    lines = [f"qdisc replace dev {device} root handle 1: {held}"]
    if rate:
        lines.append(f"qdisc replace dev {device} parent 1:1 handle 10: {rate}")
    return "\n".join(lines)


def tbf(bits_per_s: float, least_burst_s: float = 0.0) -> str:
    """A token bucket and the queue before it: see tc-tbf(8)."""
    burst = max(burst_bytes(bits_per_s), bits_per_s / 8 * least_burst_s)
    limit = max(20 * MTU, bits_per_s / 8 * QUEUE_S) + burst
    return f"tbf rate {bits_per_s:.0f}bit burst {burst:.0f}b limit {limit:.0f}b"


def burst_bytes(bits_per_s: float) -> float:
    """What a link may pass at once after a pause, for nothing: 128 KiB from 100 Mbit/s on.

    A larger bucket flatters a short transfer. A smaller one makes the link slower than its rate:
    tokens without room are lost when the kernel's timer is late, and a packet that TCP hands over
    whole, of up to 64 KiB, is cut up by the shaper itself where the bucket does not hold it.
    """
    bytes_per_s = bits_per_s / 8
    return max(3 * MTU, 1e-3 * bytes_per_s, min(10.5e-3 * bytes_per_s, 128 * 2**10))


def largest_packet(shape: Shape) -> int:
    """How large a burst of segments TCP may hand to the link as one packet, in bytes.

    Half of the bucket: it must fit, and there must be room for the tokens that come meanwhile.
    """
    if shape.bits_per_s is None:
        return 65536
    return int(min(65536, max(4096, burst_bytes(shape.bits_per_s) / 2)))
