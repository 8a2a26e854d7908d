"""Tables and figures of topology.py, and its verdict in words."""

from argparse import Namespace
from collections.abc import Sequence

import _topology_sysfs as sysfs
from _topology_matrix import SELF, Matrix, closeness
from _topology_placement import best_ring, ring_link, worst_of
from _topology_this import gpu_devices, network_devices

from distlab import host
from distlab.display import quantity
from distlab.script import Run

MOST_CORES = 256  # a picture of more is no longer read
SHARES = {  # what two cores share, by what the kernel calls the list; the closest first
    "thread_siblings_list": "one core",
    "cluster_cpus_list": "a cluster",
    "die_cpus_list": "a die",
    "package_cpus_list": "a socket",
}


def show_host(run: Run) -> None:
    """Caches, cores and NUMA nodes."""
    threads = sysfs.cores_by_thread()
    cores = " + ".join(f"{n} cores of {k} thread{'s' * (k > 1)}" for k, n in threads.items())
    run.print(f"machine: {host.cpu_name()}: {cores or 'cores unknown'}")
    run.table(
        "caches",
        ["data cache", "size", "shared by cores", "how many"],
        [[c.name, f"{c.size / 2**10:,.0f} KiB", c.shared_by, c.count] for c in sysfs.caches()]
        or [["unknown", "unknown", None, None]],
    )
    nodes = sysfs.nodes()
    run.table(
        "numa",
        ["NUMA node", "cores", "memory", "distance to each node"],
        [[str(n.number), n.cores, _gib(n.memory_bytes), " ".join(map(str, n.distances))]
         for n in nodes] or [["unknown", "unknown", "unknown", "unknown"]],
        caption="Memory of a node at distance 20 is twice as far as a core's own, at 10",
    )  # fmt: skip


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"


def show_devices(run: Run) -> None:
    """GPUs and network devices: where they are plugged in, and how fast their two sides are."""
    devices = [*gpu_devices()[0], *network_devices()]
    run.table(
        "devices",
        ["device", "kind", "PCI address", "NUMA node", "PCIe, one way", "port", "state"],
        [[d.name, d.kind, d.address or "unknown",
          "unknown" if d.numa is None else str(d.numa),
          quantity(d.pcie_bytes_per_second, "B/s"),
          "—" if d.kind == "GPU" else quantity(d.bits_per_second, "bit/s"), d.state or "—"]
         for d in devices] or [["none"] + ["—"] * 6],
        caption="PCIe as it runs now: an idle GPU runs its link slower than it can",
    )  # fmt: skip


def verdict(matrix: Matrix, groups: Sequence[Sequence[str]], args: Namespace) -> str:
    """What the groups' links are, whether a ring does better, and what to set to get them."""
    worst = worst_of(matrix, groups)
    size = len(groups[0])
    many = "groups" if len(groups) > 1 else "group"
    each = [matrix.worst(group) for group in groups]
    words = [f"{len(groups)} tensor-parallel {many} of {size} on a machine, {_over(worst)}"]
    if len(set(each)) > 1:
        words.append(f"the farthest pairs of the groups are {', '.join(each)}: the slowest sets "
                     "the pace")  # fmt: skip
    rings = [best_ring(matrix, group) for group in groups]
    ring = min((ring_link(matrix, ring) for ring in rings), key=closeness) if size > 1 else worst
    if closeness(ring) > closeness(worst):
        words.append(f"a ring needs no more than {ring}: {' '.join(rings[0])}, which NCCL finds")
    in_order = [matrix.gpus[i * size : (i + 1) * size] for i in range(len(groups))]
    if worst_of(matrix, in_order) != worst:
        order = ",".join(gpu.removeprefix("GPU") for group in groups for gpu in group)
        words.append(
            f"in the GPUs' own order a group would have {worst_of(matrix, in_order)}: "
            f"set CUDA_VISIBLE_DEVICES={order}"
        )
    if args.tp > size:
        words.append(
            f"a group of {args.tp} spans {args.tp // size} machines, and every layer's all-reduce "
            f"goes over the network: use --tp {size}, and pipeline or data parallelism above it"
        )
    elif args.world_size > len(matrix.gpus):
        machines = args.world_size // len(matrix.gpus)
        words.append(f"the {machines} machines are joined by data or pipeline parallelism only")
    if not ring.startswith("NV") and ring != SELF:
        words.append("without NVLink inside a group prefer data or pipeline parallelism")
    return "; ".join(words)


def _over(link: str) -> str:
    return "one GPU each" if link == SELF else f"no pair farther than {link}"


def draw_matrix(run: Run, matrix: Matrix) -> None:
    run.figure(
        "topology_links", kind="matrix",
        title="The links between this machine's GPUs and NICs",
        x_label="to", y_label="from",
        series=[
            {"label": a, "x": list(matrix.names),
             "y": [_shade(matrix.link(a, b)) for b in matrix.names],
             "text": [matrix.link(a, b) for b in matrix.names]}
            for a in matrix.names
        ],
    )  # fmt: skip


def _shade(link: str) -> int:
    """0 for the farthest link, one more for each closer kind, whatever the number of NVLinks."""
    return 6 if link == SELF else min(closeness(link), 5)


def draw_cores(run: Run) -> None:
    """Which cores are how close, for a machine without GPUs."""
    cores = [core for node in sysfs.nodes() for core in sysfs.cpus(node.cores)][:MOST_CORES]
    if not cores:
        return
    folder = sysfs.SYS / "devices/system/cpu"
    near = {
        core: [set(sysfs.cpus(host.read(folder / f"cpu{core}/topology/{file}").strip()))
               for file in SHARES]
        for core in cores
    }  # fmt: skip
    words = [*SHARES.values(), "the machine"]
    series = []
    for core in cores:
        levels = [
            next((i for i, group in enumerate(near[core]) if other in group), len(SHARES))
            for other in cores
        ]
        series.append({"label": str(core), "x": [str(other) for other in cores],
                       "y": [len(SHARES) - level for level in levels],
                       "text": [words[level] for level in levels]})  # fmt: skip
    run.figure(
        "topology_cores", kind="matrix", title="What two cores share", x_label="core",
        y_label="core", series=series,
    )  # fmt: skip
