"""Topology: recorded matrices of known machines, the groups that follow from them, and /sys.

The matrices in configs/machines/ are what nvidia-smi topo -m printed on
- dgx-h100: a DGX H100 (github.com/vllm-project/vllm/issues/13855), 12 NICs, cut off after NIC5;
- dgx-1-v100: a DGX-1 with V100 (github.com/microsoft/msccl-tools, tests/test_topologies.py);
- 8x-rtx4090-pcie: github.com/NVIDIA/go-gpuallocator/issues/17;
- 4x-a100-pcie: two sockets, NVLink bridges (github.com/NVIDIA/k8s-device-plugin/issues/436);
- 4x-k80-one-socket: Microway, "nvidia-smi: Control Your GPUs", an old driver, copied as spaces.
"""

import json
import random
from itertools import combinations
from pathlib import Path

import pytest

import topology
from distlab.errors import UsageError
from distlab.files import repo_root
from parallelism import machine
from parallelism import topology as placement
from parallelism.machine import Matrix, Node

CHAPTER = repo_root() / "chapter02-gpu-hardware-parallelism"
MACHINES = CHAPTER / "configs" / "machines"


@pytest.fixture
def read():
    return lambda name: placement.parse_matrix((MACHINES / f"{name}.txt").read_text())


def test_dgx_h100(read):
    matrix = read("dgx-h100")
    assert matrix.gpus == tuple(f"GPU{i}" for i in range(8)) and len(matrix.nics) == 12
    assert {matrix.link(a, b) for a, b in combinations(matrix.gpus, 2)} == {"NV18"}
    assert matrix.cores["GPU3"] == "0-55,112-167" and matrix.cores["GPU4"] == "56-111,168-223"
    assert [matrix.numa[gpu] for gpu in matrix.gpus] == list("00001111")
    assert matrix.link("GPU5", "NIC9") == matrix.link("NIC9", "GPU5") == "PXB"  # no row of NIC9
    assert matrix.link("NIC9", "NIC10") == "?"  # neither row was copied


def test_dgx_1(read):
    matrix = read("dgx-1-v100")
    assert matrix.nics == ("mlx5_0", "mlx5_2", "mlx5_1", "mlx5_3")
    assert matrix.link("GPU0", "GPU4") == "NV2" and matrix.link("GPU0", "GPU7") == "SYS"
    assert matrix.cores["GPU7"] == "20-39,60-79" and matrix.numa == {}  # an older driver


def test_pcie_only(read):
    matrix = read("8x-rtx4090-pcie")
    assert {matrix.link(a, b) for a, b in combinations(matrix.gpus, 2)} == {"SYS"}
    assert matrix.link("NIC0", "NIC1") == "PIX" and matrix.link("NIC1", "GPU6") == "PHB"


def test_two_sockets_with_one_bridge(read):
    matrix = read("4x-a100-pcie")
    assert matrix.link("GPU0", "GPU1") == "NV12" and matrix.link("GPU2", "GPU3") == "NODE"
    assert matrix.home("GPU2") == "NUMA node 1: cores 28-55,84-111"


def test_spaces_in_place_of_tabs(read):
    matrix = read("4x-k80-one-socket")
    assert matrix.link("GPU2", "GPU3") == "PIX" and matrix.link("mlx4_0", "GPU0") == "PHB"
    assert matrix.cores["GPU0"] == "0-11"


def test_colours_indentation_and_names_of_nics():
    text = (
        "Topology:\n\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
        "GPU0\t X \tSOC\tPIX\t\t0\t\tN/A\n"
        "GPU1\tSOC\t X \tSYS\t1,3,5\t1\t\tN/A\n"
        "NIC0\tPIX\tSYS\t X \t\t\t\t\n\nNIC Legend:\n\n  NIC0: mlx5_bond_0\n"
    )
    matrix = placement.parse_matrix(text)
    assert matrix.link("GPU0", "GPU1") == "SYS"  # as it is called now
    assert matrix.cores == {"GPU1": "1,3,5"} and matrix.numa == {"GPU0": "0", "GPU1": "1"}
    assert matrix.devices == {"NIC0": "mlx5_bond_0"}
    spaces = "\n".join(" ".join(line.split()) for line in text.replace("\x1b[4m", "").splitlines())
    copied = placement.parse_matrix(spaces)
    assert copied.cores == matrix.cores and copied.numa == matrix.numa


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (
            lambda t: t.replace("NIC8\tNIC9", "NIC8NIC9"),
            "GPU0 has 20 links for 19 columns",
        ),  # as in the issue
        (lambda t: t.replace("NV18", "NVLINK"), "GPU0 has 1 links for 20 columns"),
        (lambda t: t.replace("GPU1\tNV18", "GPU1\tPIX", 1), "from GPU0 to GPU1 is NV18, and back"),
        (lambda t: t.replace("\nGPU7\t", "\n"), "no row of GPU7"),
        (lambda t: "nvidia-smi: command not found", "no line that begins with GPU0"),
    ],
)
def test_a_spoilt_matrix_is_refused(tmp_path, spoil, why):
    path = tmp_path / "matrix.txt"
    path.write_text(spoil((MACHINES / "dgx-h100.txt").read_text()))
    with pytest.raises(UsageError, match=f"--matrix .* is wrong because .*{why}"):
        topology.main(["--matrix", str(path)])


def groups_of(matrix, count, size):
    return [
        "".join(gpu.removeprefix("GPU") for gpu in group)
        for group in placement.best_groups(matrix, count, size)
    ]


def test_groups_of_a_dgx_1_keep_to_nvlink(read):
    matrix = read("dgx-1-v100")
    assert groups_of(matrix, 2, 4) == ["0123", "4567"]
    assert groups_of(matrix, 4, 2) == ["03", "12", "47", "56"]  # two links each
    assert matrix.worst(matrix.gpus) == "SYS"
    ring = placement.best_ring(matrix, matrix.gpus)
    assert sorted(ring) == sorted(matrix.gpus)
    assert placement.ring_link(matrix, ring) == "NV2"


def test_a_small_job_gets_the_bridged_pair(read):
    assert groups_of(read("4x-a100-pcie"), 1, 2) == ["01"]
    assert groups_of(read("4x-k80-one-socket"), 2, 2) == ["01", "23"]
    assert groups_of(read("8x-rtx4090-pcie"), 4, 2) == ["01", "23", "45", "67"]


@pytest.mark.parametrize("seed", range(20))
def test_groups_and_rings_are_the_best_of_all(seed):
    draw = random.Random(seed)
    gpus = tuple(f"GPU{i}" for i in range(6))
    kinds = ("SYS", "NODE", "PIX", "NV2", "NV4")
    links = {pair: draw.choice(kinds) for pair in combinations(gpus, 2)}
    matrix = Matrix(gpus, (), links)
    for size in (1, 2, 3, 6):
        groups = placement.best_groups(matrix, 6 // size, size)
        assert sorted(gpu for group in groups for gpu in group) == list(gpus)
        found = placement.worst_of(matrix, groups)
        assert found == placement.best_by_trying_all(matrix, size)
    ring = placement.best_ring(matrix, gpus)
    assert placement.ring_link(matrix, ring) == placement.ring_by_trying_all(matrix, gpus)


def test_nics_and_cores_of_a_gpu(read):
    place, matrix = placement, read("dgx-h100")
    assert [place.nearest_nics(matrix, gpu) for gpu in ("GPU0", "GPU7")] == [["NIC0"], ["NIC11"]]
    assert place.nearest_nics(read("4x-a100-pcie"), "GPU0") == ["mlx5_0", "mlx5_1"]
    assert place.share_of_cores("0-55,112-167", 4, 1) == "14-27,126-139"
    assert place.share_of_cores("0-1", 4, 3) == "0-1"  # too few to divide


def test_the_diagram_shows_the_switch_or_each_link(read):
    switched = placement.mermaid(read("dgx-h100"))
    assert switched.count("===|NV18| NVSwitch") == 8 and "GPU5 ---|PXB| NIC9" in switched
    meshed = placement.mermaid(read("dgx-1-v100"))
    assert meshed.count("===|NV1|") + meshed.count("===|NV2|") == 16
    assert meshed.count("subgraph") == 2


@pytest.mark.parametrize("tp", ["1", "2", "4", "8"])
@pytest.mark.parametrize("name", ["dgx-h100", "dgx-1-v100", "8x-rtx4090-pcie"])
def test_a_run_with_a_matrix(tmp_path, capsys, name, tp):
    flags = ["--matrix", str(MACHINES / f"{name}.txt"), "--tp", tp, "--preset", "smoke"]
    assert topology.main([*flags, "--json", str(tmp_path / "r.json")]) == 0
    record = json.loads((tmp_path / "r.json").read_text())
    assert len(record["tables"]["placement"]["rows"]) == 8
    assert record["figures"]["topology_links"]["kind"] == "matrix"
    assert "verdict: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "flags", "says"),
    [
        ("dgx-1-v100", ["--tp", "2"], "set CUDA_VISIBLE_DEVICES=0,3,1,2,4,7,5,6"),
        ("dgx-1-v100", ["--tp", "8"], "a ring needs no more than NV2: GPU0 GPU3"),
        ("dgx-h100", ["--tp", "16", "--world-size", "32"], "spans 2 machines"),
        ("dgx-h100", ["--tp", "8", "--world-size", "32"], "4 machines are joined by data or"),
        ("4x-a100-pcie", ["--tp", "2"], "farthest pairs of the groups are NV12, NODE"),
        ("8x-rtx4090-pcie", ["--tp", "4"], "without NVLink inside a group prefer"),
    ],
)
def test_verdicts(capsys, name, flags, says):
    assert topology.main(["--matrix", str(MACHINES / f"{name}.txt"), *flags]) == 0
    assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--tp", "3"], "--tp 3 does not divide 8 ranks"),
        (["--world-size", "12"], "--world-size 12 does not fill machines of 8 GPUs"),
        (["--world-size", "48", "--tp", "12"], "--tp 12 does not fill machines of 8 GPUs"),
    ],
)
def test_degrees_that_do_not_fit(flags, why):
    with pytest.raises(UsageError, match=why):
        topology.main(["--matrix", str(MACHINES / "dgx-h100.txt"), *flags])


def test_no_file():
    with pytest.raises(UsageError, match="--matrix nowhere.txt cannot be read"):
        topology.main(["--matrix", "nowhere.txt"])


def test_this_machine(tmp_path, capsys):
    flags = ["--preset", "smoke", "--mermaid", str(tmp_path / "links.mmd")]
    assert topology.main([*flags, "--figures", str(tmp_path)]) == 0
    assert (tmp_path / "links.mmd").read_text().startswith("flowchart TB\n")
    assert "NUMA node" in capsys.readouterr().out


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.fixture
def server(tmp_path) -> Path:
    """A /sys of two sockets: a GPU and a NIC below one PCIe switch, a NIC on the other socket."""
    cpu, pci = "devices/system/cpu", "devices/pci0000:00/0000:00:01.0"
    switch = f"{pci}/0000:01:00.0"
    other = "devices/pci0000:80/0000:80:01.0/0000:81:00.0"
    for core in range(4):
        siblings = f"{core % 2},{core % 2 + 2}"
        cache = f"{cpu}/cpu{core}/cache"
        write(tmp_path, {
            f"{cpu}/cpu{core}/topology/thread_siblings_list": siblings,
            f"{cache}/index0/level": "1", f"{cache}/index0/type": "Data",
            f"{cache}/index0/size": "48K", f"{cache}/index0/shared_cpu_list": siblings,
            f"{cache}/index1/level": "1", f"{cache}/index1/type": "Instruction",
            f"{cache}/index1/size": "32K", f"{cache}/index1/shared_cpu_list": siblings,
            f"{cache}/index3/level": "3", f"{cache}/index3/type": "Unified",
            f"{cache}/index3/size": "36864K", f"{cache}/index3/shared_cpu_list": siblings,
        })  # fmt: skip
    for node, distances in enumerate(("10 21", "21 10")):
        folder = f"devices/system/node/node{node}"
        write(tmp_path, {
            f"{folder}/cpulist": f"{node},{node + 2}\n", f"{folder}/distance": f"{distances}\n",
            f"{folder}/meminfo": f"Node {node} MemTotal:       1048576 kB\n",
        })  # fmt: skip
    for path, numa in ((f"{switch}/0000:02:00.0/0000:03:00.0", 0),
                       (f"{switch}/0000:02:01.0/0000:04:00.0", 0),
                       (f"{pci}/0000:01:00.1", 0), (other, 1)):  # fmt: skip
        write(tmp_path, {
            f"{path}/numa_node": f"{numa}\n", f"{path}/current_link_speed": "16.0 GT/s PCIe\n",
            f"{path}/current_link_width": "16\n",
        })  # fmt: skip
    write(tmp_path, {
        "class/infiniband/mlx5_0/ports/1/rate": "400 Gb/sec (4X NDR)\n",
        "class/infiniband/mlx5_0/ports/1/state": "4: ACTIVE\n",
        "class/infiniband/mlx5_0/ports/1/link_layer": "InfiniBand\n",
        "class/net/eth0/speed": "-1\n", "class/net/eth0/operstate": "up\n",
        "class/net/lo/operstate": "unknown\n",
    })  # fmt: skip
    (tmp_path / "class/infiniband/mlx5_0/device").symlink_to(
        tmp_path / f"{switch}/0000:02:01.0/0000:04:00.0"
    )
    (tmp_path / "class/net/eth0/device").symlink_to(tmp_path / other)
    (tmp_path / "bus/pci/devices").mkdir(parents=True)
    gpu = tmp_path / f"{switch}/0000:02:00.0/0000:03:00.0"
    (tmp_path / "bus/pci/devices/0000:03:00.0").symlink_to(gpu)
    return tmp_path


def test_what_sys_tells(server):
    assert [(c.name, c.size, c.shared_by, c.count) for c in machine.caches(server)] == [
        ("L1d", 48 * 1024, 2, 2), ("L3", 36 * 2**20, 2, 2)
    ]  # fmt: skip
    first, second = machine.nodes(server)
    assert (first.cores, first.memory_bytes, first.distances) == ("0,2", 2**30, (10, 21))
    assert second.number == 1
    assert machine.cores_by_thread(server) == {2: 2}
    [nic] = machine.rdma_devices(server)
    assert (nic.bits_per_second, nic.state, nic.kind, nic.numa) == (4e11, "active", "InfiniBand", 0)
    [eth] = machine.interfaces(server)  # lo is no device
    assert eth.bits_per_second is None and eth.address == "0000:81:00.0" and eth.numa == 1


def test_links_by_the_places_on_the_bus(server):
    gpu = machine.pci_device("0000:03:00.0", "GPU0", "GPU", server)
    [nic], [eth] = machine.rdma_devices(server), machine.interfaces(server)
    assert machine.pcie_link(gpu, nic) == machine.pcie_link(nic, gpu) == "PIX"
    assert machine.pcie_link(gpu, eth) == "SYS"
    tree = "/sys/devices/pci0000:00"

    def at(path: str, numa: int | None = 0):
        return machine.Device("d", "network", path=path, numa=numa)

    deep = at(
        f"{tree}/0000:00:01.0/0000:01:00.0/0000:02:00.0/0000:03:00.0/0000:04:00.0/0000:05:00.0"
    )
    near = at(f"{tree}/0000:00:01.0/0000:01:00.0/0000:02:01.0/0000:09:00.0")
    assert machine.pcie_link(deep, near) == "PXB"
    assert machine.pcie_link(deep, at(f"{tree}/0000:00:02.0/0000:0a:00.0")) == "PHB"
    assert (
        machine.pcie_link(deep, at("/sys/devices/pci0000:40/0000:40:01.0/0000:41:00.0")) == "NODE"
    )
    unknown = at("/sys/devices/pci0000:40/0000:40:01.0/0000:41:00.0", None)
    assert machine.pcie_link(deep, unknown) == "SYS"


def test_a_machine_that_tells_nothing(tmp_path):
    assert not machine.caches(tmp_path) and not machine.nodes(tmp_path)
    assert not machine.interfaces(tmp_path) and not machine.rdma_devices(tmp_path)


@pytest.mark.parametrize(
    ("rate", "lanes", "gigabytes"),
    [(8.0, 16, 15.75), (16.0, 16, 31.5), (32.0, 16, 63.0), (2.5, 1, 0.25)],
)
def test_pcie_rates(rate, lanes, gigabytes):
    found = machine.pcie_bytes_per_second(rate, lanes) / 1e9
    assert found == pytest.approx(gigabytes, rel=1e-3)


def test_ranks_share_the_cores_of_two_sockets(monkeypatch):
    nodes = [Node(0, "0-3,8-11", None, (10, 21)), Node(1, "4-7,12-15", None, (21, 10))]
    monkeypatch.setattr(machine, "nodes", lambda: nodes)
    monkeypatch.setattr(machine, "_allowed_cores", lambda: set(range(16)))
    assert [(r.node, r.cores, r.threads) for r in machine.cpu_ranks(4)] == [
        (0, "0-3", 4), (0, "8-11", 4), (1, "4-7", 4), (1, "12-15", 4)
    ]  # fmt: skip
    assert [r.node for r in machine.cpu_ranks(3)] == [0, 0, 1]
    assert sorted(r.cores for r in machine.cpu_ranks(16)) == sorted(map(str, range(16)))
    assert len(machine.cpu_ranks(20)) == 20  # more ranks than cores: some share
