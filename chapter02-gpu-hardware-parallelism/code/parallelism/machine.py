"""A machine: its caches, NUMA nodes and devices from /sys, and the matrix of its links.

Every function of /sys takes the root, so that a test can give it another machine's. What the kernel
does not tell is None. Source: the kernel's Documentation/ABI/testing/sysfs-*.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from distlab import hardware, host, nvml

SYS = Path("/sys")
LANE_RATES = {2.5: 8 / 10, 5.0: 8 / 10, 64.0: 236 / 256}  # else 128/130: what the coding leaves
ETHERNET_UNKNOWN = -1  # what drivers report that have no speed, as a virtual machine's


@dataclass(frozen=True)
class Cache:
    """One level of a core's caches: how large it is, and which cores share one."""

    name: str  # L1d, L2, L3
    size: int
    shared_by: int
    count: int


@dataclass(frozen=True)
class Node:
    """A NUMA node, with its distance to each node: 10 to itself, 20 for twice the latency."""

    number: int
    cores: str
    memory_bytes: int | None
    distances: tuple[int, ...]


@dataclass(frozen=True)
class Device:
    """A device on the PCIe tree, or a network interface that may be without one."""

    name: str
    kind: str
    bits_per_second: float | None = None  # of its port
    state: str = ""
    path: str = ""  # /sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0
    numa: int | None = None
    pcie_bytes_per_second: float | None = None  # one direction, as it is running now

    @property
    def address(self) -> str:
        return Path(self.path).name


def caches(root: Path = SYS) -> list[Cache]:
    """The data caches, from the nearest to the last, as cpu0 has them."""
    found: dict[tuple[str, int, int], set[str]] = {}
    for folder in sorted(root.glob("devices/system/cpu/cpu[0-9]*/cache/index[0-9]*")):
        kind, size = _line(folder / "type"), _line(folder / "size")
        if kind == "Instruction" or not size.endswith("K"):
            continue
        name = f"L{_line(folder / 'level')}" + ("d" if kind == "Data" else "")
        cores = _line(folder / "shared_cpu_list")
        found.setdefault((name, int(size[:-1]) * 2**10, len(cpus(cores))), set()).add(cores)
    return [Cache(*key, count=len(lists)) for key, lists in sorted(found.items())]


def nodes(root: Path = SYS) -> list[Node]:
    """The NUMA nodes; none where the kernel was built without them."""
    found = []
    for folder in root.glob("devices/system/node/node[0-9]*"):
        memory = re.search(r"MemTotal:\s+(\d+) kB", host.read(folder / "meminfo"))
        found.append(
            Node(
                int(folder.name.removeprefix("node")),
                _line(folder / "cpulist"),
                int(memory[1]) * 2**10 if memory else None,
                tuple(map(int, _line(folder / "distance").split())),
            )
        )
    return sorted(found, key=lambda node: node.number)


def interfaces(root: Path = SYS) -> list[Device]:
    """The network interfaces that are a device, virtual ones (bridges, loopback) left out."""
    found = []
    for folder in sorted(root.glob("class/net/*")):
        if not (folder / "device").exists():
            continue
        megabits = _whole(_line(folder / "speed"))
        speed = None if megabits is None or megabits == ETHERNET_UNKNOWN else megabits * 1e6
        found.append(_on_pcie(folder, folder.name, "network", speed, _line(folder / "operstate")))
    return found


def rdma_devices(root: Path = SYS) -> list[Device]:
    """The devices that can read and write another machine's memory: InfiniBand, RoCE, EFA."""
    found = []
    for folder in sorted(root.glob("class/infiniband/*")):
        port = folder / "ports" / "1"
        rate = re.match(r"([\d.]+) Gb/sec", _line(port / "rate"))  # 400 Gb/sec (4X NDR)
        state = _line(port / "state").rpartition(": ")[2].lower()  # 4: ACTIVE
        speed = float(rate[1]) * 1e9 if rate else None
        kind = _line(port / "link_layer") or "RDMA"
        found.append(_on_pcie(folder, folder.name, kind, speed, state))
    return found


def pci_device(address: str, name: str, kind: str, root: Path = SYS) -> Device:
    """The device at `address`, as 0000:1b:00.0: where in the tree it is plugged in, and how."""
    return _at(root / "bus/pci/devices" / address, name, kind)


def _on_pcie(folder: Path, name: str, kind: str, speed: float | None, state: str) -> Device:
    return _at(folder / "device", name, kind, speed, state)


def _at(link: Path, name: str, kind: str, speed: float | None = None, state: str = "") -> Device:
    path = link.resolve()
    while path.name.startswith("virtio"):  # the PCIe device is what holds the virtio device
        path = path.parent
    numa = _whole(_line(path / "numa_node"))
    rate = re.match(r"([\d.]+) GT/s", _line(path / "current_link_speed"))
    width = _whole(_line(path / "current_link_width"))
    return Device(
        name,
        kind,
        speed,
        state,
        str(path),
        None if numa == -1 else numa,
        pcie_bytes_per_second(float(rate[1]), width) if rate and width else None,
    )


def pcie_bytes_per_second(gigatransfers: float, lanes: int) -> float:
    """What a PCIe link carries in one direction, before its packets' headers take their share.

    GT/s a lane, one bit each, less the line coding: 8b/10b up to 5 GT/s, 128b/130b from 8, FLITs of
    236 in 256 bytes from 64. Source: PCI Express Base Specification, revisions 1.0 to 6.0.
    """
    return gigatransfers * 1e9 / 8 * lanes * LANE_RATES.get(gigatransfers, 128 / 130)


def pcie_link(a: Device, b: Device) -> str:
    """The link between two devices by nvidia-smi's names, from their places in the PCIe tree.

    As NCCL measured it (pciDistance in src/misc/topo.cc, version 2.4): by what the paths share.
    """
    first, second = Path(a.path).parts, Path(b.path).parts
    shared = next(
        (i for i, (x, y) in enumerate(zip(first, second, strict=False)) if x != y),
        min(len(first), len(second)),
    )
    roots = [part for part in first[:shared] if part.startswith("pci")]
    if not roots:  # not even the root complex
        return "NODE" if a.numa is not None and a.numa == b.numa else "SYS"
    bridges = shared - first.index(roots[0]) - 1
    if bridges == 0:
        return "PHB"
    return "PIX" if max(len(first), len(second)) - shared <= 2 else "PXB"


def cpus(text: str) -> list[int]:
    """The numbers in a list as 0-3,8: of cores or of nodes."""
    numbers: list[int] = []
    for piece in filter(None, text.split(",")):
        low, _, high = piece.partition("-")
        numbers += range(int(low), int(high or low) + 1)
    return numbers


def cores_by_thread(root: Path = SYS) -> Counter[int]:
    """How many physical cores have how many hardware threads: {2: 56} is 56 cores of two."""
    siblings = {
        _line(file)
        for file in root.glob("devices/system/cpu/cpu[0-9]*/topology/thread_siblings_list")
    }
    return Counter(len(cpus(text)) for text in siblings if text)


def _line(path: Path) -> str:
    return host.read(path).strip()


def _whole(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?\d+", text) else None


UNKNOWN = "?"
SELF = "X"
FAR_TO_NEAR = ("SYS", "NODE", "PHB", "PXB", "PIX")


@dataclass(frozen=True)
class Matrix:
    """GPUs, NICs and their links; `cores` and `numa` of a GPU are missing where not told."""

    gpus: tuple[str, ...]
    nics: tuple[str, ...]
    links: Mapping[tuple[str, str], str]
    cores: Mapping[str, str] = field(default_factory=dict)  # GPU0: 0-55,112-167
    numa: Mapping[str, str] = field(default_factory=dict)  # GPU0: 0
    devices: Mapping[str, str] = field(default_factory=dict)  # NIC0: mlx5_0

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.gpus, *self.nics)

    def link(self, a: str, b: str) -> str:
        """The link between two; a row that was cut off is read from the other's."""
        if a == b:
            return SELF
        return self.links.get((a, b)) or self.links.get((b, a)) or UNKNOWN

    def home(self, gpu: str) -> str:
        """The NUMA node that a GPU is plugged into, in words, and its cores."""
        return f"NUMA node {self.numa.get(gpu, UNKNOWN)}: cores {self.cores.get(gpu, UNKNOWN)}"

    def worst(self, names: Iterable[str]) -> str:
        """The farthest link between any two of `names`; X where there is only one."""
        pairs = [self.link(a, b) for a, b in combinations(names, 2)]
        return min(pairs, key=closeness, default=SELF)


def closeness(link: str) -> int:
    """A number that is larger for a closer link: SYS < NODE < PHB < PXB < PIX < NV1 < NV2 …"""
    if link == SELF:
        return 10_000
    if link.startswith("NV"):
        return 100 + int(link[2:])
    return FAR_TO_NEAR.index(link) if link in FAR_TO_NEAR else -1


@dataclass(frozen=True)
class CpuRank:
    """Where a rank without a GPU computes."""

    node: int
    cores: str
    threads: int


def gpu_devices() -> tuple[list[Device], dict[tuple[int, int], str]]:
    """The GPUs that this process may use, and the link of each pair; none without NVML."""
    if not hardware.driver_present():
        return [], {}
    try:
        found = nvml.gpu_links()
    except nvml.NvmlError:  # a Jetson: its GPU is on no PCI bus
        return [], {}
    devices = [
        pci_device(address, f"GPU{index}", "GPU") if address else Device(f"GPU{index}", "GPU")
        for index, address in enumerate(found.addresses)
    ]
    return devices, found.links


def network_devices() -> list[Device]:
    """The devices to send through: those of RDMA, or the plain interfaces where there are none."""
    return rdma_devices() or interfaces()


def this_matrix() -> Matrix:
    """As nvidia-smi topo -m would print it: the GPUs' links by NVML, the NICs' by the PCIe tree."""
    gpus, between = gpu_devices()
    nics = network_devices()
    links = {(gpus[i].name, gpus[j].name): link for (i, j), link in between.items()}
    cores = {str(node.number): node.cores for node in nodes()}
    only = next(iter(cores)) if len(cores) == 1 else None  # then a device need not say which
    for index, nic in enumerate(nics):
        for other in [*gpus, *nics[:index]]:
            links[other.name, nic.name] = pcie_link(other, nic)
    homes = {gpu.name: only if gpu.numa is None else str(gpu.numa) for gpu in gpus}
    numa = {name: node for name, node in homes.items() if node is not None}
    return Matrix(
        tuple(gpu.name for gpu in gpus),
        tuple(nic.name for nic in nics),
        links,
        {name: cores[node] for name, node in numa.items() if node in cores},
        numa,
    )


def cpu_ranks(count: int) -> list[CpuRank]:
    """`count` ranks in order over the NUMA nodes, each with an equal share of its node's cores."""
    allowed = _allowed_cores()
    homes = [
        (node.number, usable)
        for node in nodes() or [Node(0, f"0-{(os.cpu_count() or 1) - 1}", None, (10,))]
        if (usable := [core for core in cpus(node.cores) if core in allowed])
    ]
    ranks = []
    for index, (node, cores) in enumerate(homes):
        here = count // len(homes) + (index < count % len(homes))
        each = max(1, len(cores) // max(here, 1))
        for rank in range(here):
            start = rank * each % len(cores)
            mine = cores[start : start + each]
            ranks.append(CpuRank(node, _as_list(mine), len(mine)))
    return ranks


def _allowed_cores() -> set[int]:
    """The cores of this process' affinity; the first ones where its quota has fewer."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = sorted(affinity(0)) if affinity else list(range(os.cpu_count() or 1))
    return set(cores[: host.usable_cores()])


def _as_list(cores: list[int]) -> str:
    """As the kernel writes it: 0-3,8."""
    pieces: list[list[int]] = []
    for core in cores:
        if pieces and core == pieces[-1][-1] + 1:
            pieces[-1].append(core)
        else:
            pieces.append([core])
    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in pieces)
