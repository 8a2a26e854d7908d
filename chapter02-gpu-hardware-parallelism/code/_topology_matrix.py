"""The matrix that `nvidia-smi topo -m` prints: which link joins each pair of GPUs and NICs."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations, takewhile

UNKNOWN = "?"
SELF = "X"
FAR_TO_NEAR = ("SYS", "NODE", "PHB", "PXB", "PIX")
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
