"""`nvidia-smi topo -m` read and drawn; groups of close GPUs, their rings, NICs and cores."""

import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from itertools import combinations, permutations, takewhile

from distlab import host
from distlab.display import quantity
from distlab.script import Run
from parallelism import machine
from parallelism.machine import SELF, Matrix, closeness, gpu_devices, network_devices

MEANING = {
    "NV#": "# NVLinks bonded together, direct or through an NVSwitch",
    "PIX": "one PCIe switch",
    "PXB": "several PCIe switches, but not the processor",
    "PHB": "PCIe and the processor's host bridge",
    "NODE": "PCIe and two host bridges of one NUMA node",
    "SYS": "PCIe and the link between NUMA nodes",
}
_LINK = re.compile(r"X|NV\d+|PIX|PXB|PHB|NODE|SYS|SOC")
_TERMINAL_CODE = re.compile(r"\x1b\[[0-9;]*m")
_NIC_NAME = re.compile(r"^\s*(NIC\d+): (\S+)\s*$", re.MULTILINE)
_AFFINITIES = ("CPU Affinity", "NUMA Affinity", "GPU NUMA ID")


def parse_matrix(text: str) -> Matrix:
    """Read what `nvidia-smi topo -m` printed: any driver's, with tabs or copied as spaces.

    Rows may be missing (a screen that was cut off). Raises `ValueError` where a row has not as many
    links as the header has names, which is how a copy that lost a tab shows, and where a link is
    not the same from both of its ends.
    """
    lines = _TERMINAL_CODE.sub("", text).splitlines()
    header = next((i for i, line in enumerate(lines) if _is_header(line)), None)
    if header is None:
        raise ValueError("it has no line that begins with GPU0 and names the columns")
    names = lines[header].partition("CPU Affinity")[0].split()
    told = [column for column in _AFFINITIES if column in lines[header]]
    links: dict[tuple[str, str], str] = {}
    cores: dict[str, str] = {}
    numa: dict[str, str] = {}
    for line in lines[header + 1 :]:
        cells = [cell.strip() for cell in (line.split("\t") if "\t" in line else line.split())]
        if not cells or cells[0] not in names:
            continue
        name, row = cells[0], list(takewhile(_LINK.fullmatch, cells[1:]))
        if len(row) != len(names):
            raise ValueError(f"its row of {name} has {len(row)} links for {len(names)} columns")
        for other, link in zip(names, row, strict=True):
            links[name, other] = "SYS" if link == "SOC" else link  # its old name
        rest = cells[1 + len(names) :]
        if "\t" not in line:  # spaces swallow an empty cell; it is the first that may be empty
            rest = [""] * (len(told) - len(rest)) + rest
        for affinity, values in (("CPU Affinity", cores), ("NUMA Affinity", numa)):
            cell = dict(zip(told, rest, strict=False)).get(affinity, "")
            if cell not in ("", "N/A"):
                values[name] = cell
    gpus = tuple(name for name in names if name.startswith("GPU"))
    nics = tuple(name for name in names if not name.startswith("GPU"))
    if missing := [gpu for gpu in gpus if (gpu, gpu) not in links]:
        raise ValueError(f"it has no row of {missing[0]}")
    for (a, b), link in links.items():
        if links.get((b, a), link) != link:
            raise ValueError(f"its link from {a} to {b} is {link}, and back it is {links[b, a]}")
    return Matrix(gpus, nics, links, cores, numa, dict(_NIC_NAME.findall(text)))


def _is_header(line: str) -> bool:
    words = line.split()
    return bool(words) and words[0] == "GPU0" and SELF not in words


def mermaid(matrix: Matrix) -> str:
    """The machine as a Mermaid flowchart: NUMA nodes, the GPUs and NICs in them, and the links."""
    lines = ["flowchart TB"]
    homes = dict.fromkeys(matrix.home(gpu) for gpu in matrix.gpus)
    for index, home in enumerate(homes):
        members = [gpu for gpu in matrix.gpus if matrix.home(gpu) == home]
        members += [nic for nic in matrix.nics if _beside(matrix, nic, members)]
        lines.append(f'  subgraph node{index}["{home}"]')
        lines += [f'    {name}["{matrix.devices.get(name, name)}"]' for name in members]
        lines.append("  end")
    between = {matrix.link(a, b) for a, b in combinations(matrix.gpus, 2)}
    if len(matrix.gpus) > 2 and len(between) == 1 and min(between).startswith("NV"):
        lines += [f"  {gpu} ===|{min(between)}| NVSwitch" for gpu in matrix.gpus]
    else:
        lines += [
            f"  {a} ===|{matrix.link(a, b)}| {b}"
            for a, b in combinations(matrix.gpus, 2)
            if closeness(matrix.link(a, b)) > closeness("PHB")
        ]
    lines += [
        f"  {gpu} ---|{matrix.link(gpu, nic)}| {nic}"
        for gpu in matrix.gpus
        for nic in matrix.nics
        if closeness(matrix.link(gpu, nic)) > closeness("PHB")
    ]
    return "\n".join(lines) + "\n"


def _beside(matrix: Matrix, nic: str, gpus: list[str]) -> bool:
    return any(closeness(matrix.link(gpu, nic)) > closeness("SYS") for gpu in gpus)


Joined = Callable[[str, str], bool]


def best_groups(matrix: Matrix, count: int, size: int) -> list[tuple[str, ...]]:
    """`count` disjoint groups of `size` GPUs whose farthest link is as close as can be.

    Of equally good choices it is the first in the GPUs' order, so that ranks keep their order
    where nothing is gained by another.
    """
    levels = {matrix.link(a, b) for a, b in combinations(matrix.gpus, 2)} if size > 1 else {"X"}
    for level in sorted(levels, key=closeness, reverse=True):
        found = _disjoint_groups(matrix.gpus, count, size, _at_least(matrix, level))
        if found is not None:
            return found
    raise ValueError(f"{len(matrix.gpus)} GPUs are too few for {count} groups of {size}")


def _at_least(matrix: Matrix, level: str) -> Joined:
    return lambda a, b: closeness(matrix.link(a, b)) >= closeness(level)


def _disjoint_groups(
    free: Sequence[str], count: int, size: int, joined: Joined
) -> list[tuple[str, ...]] | None:
    """`count` groups of `free` in which all pairs are joined, or None; by trial."""
    if count == 0:
        return []
    if len(free) < count * size:
        return None
    first, rest = free[0], free[1:]
    near = [gpu for gpu in rest if joined(first, gpu)]
    for mates in combinations(near, size - 1):
        if all(joined(a, b) for a, b in combinations(mates, 2)):
            others = [gpu for gpu in rest if gpu not in mates]
            if (found := _disjoint_groups(others, count - 1, size, joined)) is not None:
                return [(first, *mates), *found]
    return _disjoint_groups(rest, count, size, joined)


def worst_of(matrix: Matrix, groups: Sequence[Sequence[str]]) -> str:
    """The farthest link inside any of the groups."""
    return min((matrix.worst(group) for group in groups), key=closeness)


def best_by_trying_all(matrix: Matrix, size: int) -> str:
    """The farthest link of the best grouping of all GPUs, by trying every one: only for a few."""
    return max(
        (worst_of(matrix, groups) for groups in _groupings(matrix.gpus, size)), key=closeness
    )


def _groupings(gpus: Sequence[str], size: int) -> list[list[tuple[str, ...]]]:
    if not gpus:
        return [[]]
    return [
        [(gpus[0], *mates), *others]
        for mates in combinations(gpus[1:], size - 1)
        for others in _groupings([gpu for gpu in gpus[1:] if gpu not in mates], size)
    ]


def best_ring(matrix: Matrix, group: Sequence[str]) -> tuple[str, ...]:
    """The order of `group` whose farthest link between neighbours, ends included, is closest.

    A ring all-reduce uses no other links, so a ring may be fast where not all pairs are.
    """
    if len(group) < 4:  # all orders have the same neighbours
        return tuple(group)
    levels = {matrix.link(a, b) for a, b in combinations(group, 2)}
    for level in sorted(levels, key=closeness, reverse=True):
        if ring := _extend((group[0],), group, _at_least(matrix, level)):
            return ring
    raise AssertionError("at the farthest link every order is a ring")


def _extend(path: tuple[str, ...], group: Sequence[str], joined: Joined) -> tuple[str, ...] | None:
    if len(path) == len(group):
        return path if joined(path[-1], path[0]) else None
    for gpu in (gpu for gpu in group if gpu not in path and joined(path[-1], gpu)):
        if (ring := _extend((*path, gpu), group, joined)) is not None:
            return ring
    return None


def ring_link(matrix: Matrix, ring: Sequence[str]) -> str:
    """The farthest link between neighbours of a ring."""
    return min((matrix.link(a, b) for a, b in zip(ring, [*ring[1:], ring[0]], strict=True)),
               key=closeness)  # fmt: skip


def ring_by_trying_all(matrix: Matrix, group: Sequence[str]) -> str:
    """The best ring's farthest link, by trying every order: only for a few."""
    orders = ((group[0], *rest) for rest in permutations(group[1:]))
    return max((ring_link(matrix, order) for order in orders), key=closeness)


def nearest_nics(matrix: Matrix, gpu: str) -> list[str]:
    """The NICs that no other is closer than; none where the matrix names none."""
    best = max((closeness(matrix.link(gpu, nic)) for nic in matrix.nics), default=None)
    return [nic for nic in matrix.nics if closeness(matrix.link(gpu, nic)) == best]


def share_of_cores(cores: str, parts: int, index: int) -> str:
    """The `index`-th of `parts` equal shares of a list as 0-55,112-167, each range divided.

    The second range holds the hardware threads of the first's cores, so a share keeps both. A list
    too short to divide is shared whole.
    """
    shares = []
    for low, high in map(_ends, cores.split(",")):
        each = (high - low + 1) // parts
        if each == 0:
            return cores
        first = low + index * each
        shares.append(str(first) if each == 1 else f"{first}-{first + each - 1}")
    return ",".join(shares)


def _ends(piece: str) -> tuple[int, int]:
    low, _, high = piece.partition("-")
    return int(low), int(high or low)


MOST_CORES = 256  # a picture of more is no longer read
SHARES = {  # what two cores share, by what the kernel calls the list; the closest first
    "thread_siblings_list": "one core",
    "cluster_cpus_list": "a cluster",
    "die_cpus_list": "a die",
    "package_cpus_list": "a socket",
}


def show_host(run: Run) -> None:
    """Caches, cores and NUMA nodes."""
    threads = machine.cores_by_thread()
    cores = " + ".join(f"{n} cores of {k} thread{'s' * (k > 1)}" for k, n in threads.items())
    run.print(f"machine: {host.cpu_name()}: {cores or 'cores unknown'}")
    run.table(
        "caches",
        ["data cache", "size", "shared by cores", "how many"],
        [[c.name, f"{c.size / 2**10:,.0f} KiB", c.shared_by, c.count] for c in machine.caches()]
        or [["unknown", "unknown", None, None]],
    )
    nodes = machine.nodes()
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
        title="The links between the GPUs and NICs",
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
    cores = [core for node in machine.nodes() for core in machine.cpus(node.cores)][:MOST_CORES]
    if not cores:
        return
    folder = machine.SYS / "devices/system/cpu"
    near = {
        core: [set(machine.cpus(host.read(folder / f"cpu{core}/topology/{file}").strip()))
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
