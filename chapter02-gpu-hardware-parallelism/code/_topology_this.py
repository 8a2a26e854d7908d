"""This machine's matrix from NVML and the PCIe tree, and its cores shared among ranks."""

import os
from dataclasses import dataclass

import _topology_sysfs as sysfs
from _topology_matrix import Matrix
from _topology_sysfs import Device, Node

from distlab import hardware, host, nvml


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
        sysfs.pci_device(address, f"GPU{index}", "GPU") if address else Device(f"GPU{index}", "GPU")
        for index, address in enumerate(found.addresses)
    ]
    return devices, found.links


def network_devices() -> list[Device]:
    """The devices to send through: those of RDMA, or the plain interfaces where there are none."""
    return sysfs.rdma_devices() or sysfs.interfaces()


def this_matrix() -> Matrix:
    """As nvidia-smi topo -m would print it: the GPUs' links by NVML, the NICs' by the PCIe tree."""
    gpus, between = gpu_devices()
    nics = network_devices()
    links = {(gpus[i].name, gpus[j].name): link for (i, j), link in between.items()}
    cores = {str(node.number): node.cores for node in sysfs.nodes()}
    only = next(iter(cores)) if len(cores) == 1 else None  # then a device need not say which
    for index, nic in enumerate(nics):
        for other in [*gpus, *nics[:index]]:
            links[other.name, nic.name] = sysfs.pcie_link(other, nic)
    numa = {gpu.name: only if gpu.numa is None else str(gpu.numa) for gpu in gpus}
    numa = {name: node for name, node in numa.items() if node is not None}
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
        for node in sysfs.nodes() or [Node(0, f"0-{(os.cpu_count() or 1) - 1}", None, (10,))]
        if (usable := [core for core in sysfs.cpus(node.cores) if core in allowed])
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
