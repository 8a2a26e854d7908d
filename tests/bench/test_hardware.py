"""What the machine is: usable cores and memory, one line of words, peaks that are never guessed."""

import dataclasses
import os
import resource
import subprocess
import sys

import pytest
import torch

from distlab import hardware, host, nvml
from distlab.catalog import GPUS
from distlab.nvml import Gpu

CPU = torch.device("cpu")
H200 = Gpu("NVIDIA H200", 150_754_820_096, "GPU-aaaa", "9.0")


@pytest.fixture
def files(monkeypatch):
    """Files of the system, as a test sets them; all others are missing."""
    contents: dict[str, str] = {}
    monkeypatch.setattr(host, "read", lambda path: contents.get(str(path), ""))
    return contents


def test_machine_leaves_torch_alone():
    code = (
        "import sys; from distlab import hardware; print(hardware.machine());"
        "print('torch' in sys.modules or hardware.driver_present())"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    line, torch_loaded = output.stdout.splitlines()
    assert "core" in line and f"torch {torch.__version__}" in line
    assert hardware.driver_present() or torch_loaded == "False"


def test_machine_knows_torch_without_importing_it():
    machine = hardware.machine()
    assert machine.torch == torch.__version__
    assert machine.cuda == torch.version.cuda
    assert len(machine.gpus) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_machine_line():
    machine = hardware.Machine(
        "AMD EPYC 7B13", 2, 24 * 2**30, (), None, "3.11.7", "2.13.0+cpu", None, None, "Debian 12"
    )
    assert hardware.machine_line(machine) == (
        "AMD EPYC 7B13, 2 cores, 24 GiB, no GPU; Python 3.11.7, torch 2.13.0+cpu"
    )
    with_gpus = dataclasses.replace(
        machine, gpus=(H200, H200), driver="580.1", torch="2.13.0", cuda="13.0", nccl="2.27.7"
    )
    assert "2 x NVIDIA H200 (140 GiB)" in hardware.machine_line(with_gpus)
    assert hardware.machine_line(with_gpus).endswith("CUDA 13.0, NCCL 2.27.7, driver 580.1")


def test_cores_are_limited_by_the_quota_of_an_enclosing_group(files, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    files["/proc/self/cgroup"] = "0::/pod/container\n"
    assert host.usable_cores() == 16
    files["/sys/fs/cgroup/pod/container/cpu.max"] = "max 100000\n"
    files["/sys/fs/cgroup/pod/cpu.max"] = "350000 100000\n"
    assert host.usable_cores() == 3
    files["/sys/fs/cgroup/cpu.max"] = "50000 100000\n"
    assert host.usable_cores() == 1  # half a core is still one to count with


@pytest.mark.parametrize(
    ("variables", "direct"),
    [
        ({"HTTPS_PROXY": "http://proxy:1"}, "127.0.0.1,localhost,::1"),
        (
            {"all_proxy": "socks5://proxy:1", "NO_PROXY": "inside.example,localhost"},
            "inside.example,localhost,127.0.0.1,::1",
        ),
        ({"NO_PROXY": "inside.example"}, None),
    ],
)
def test_a_proxy_is_not_asked_for_this_machine(variables, direct, monkeypatch):
    for name in list(os.environ):
        if name.lower() in ("no_proxy", *host.PROXIES):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    host.reach_itself()
    assert os.environ.get("no_proxy") == direct


def test_limits_of_control_groups_version_1(files, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    files["/proc/self/cgroup"] = "4:memory:/job\n2:cpu,cpuacct:/job\n"
    files["/sys/fs/cgroup/cpu/job/cpu.cfs_quota_us"] = "400000\n"
    files["/sys/fs/cgroup/cpu/job/cpu.cfs_period_us"] = "100000\n"
    files["/sys/fs/cgroup/cpu/cpu.cfs_quota_us"] = "-1\n"
    files["/sys/fs/cgroup/cpu/cpu.cfs_period_us"] = "100000\n"
    files["/sys/fs/cgroup/memory/job/memory.limit_in_bytes"] = str(2**28)
    assert host.usable_cores() == 4
    assert host.usable_memory() == 2**28


def test_memory_is_limited_by_the_group(files):
    files["/proc/self/cgroup"] = "0::/pod\n"
    unlimited = host.usable_memory()
    files["/sys/fs/cgroup/pod/memory.max"] = "max\n"
    assert host.usable_memory() == unlimited
    files["/sys/fs/cgroup/pod/memory.max"] = "268435456\n"
    assert host.usable_memory() == 2**28


def test_open_files_are_allowed_up_to_the_hard_limit():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    hard = before[1] if before[1] != resource.RLIM_INFINITY else 2**20
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
        assert host.allow_open_files(100) == 200
        assert host.allow_open_files(240) == 240
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (240, before[1])
        assert hard <= host.allow_open_files(2**62 if hard == before[1] else hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(
    ("file", "text", "name"),
    [
        ("/proc/cpuinfo", "model name\t: Intel(R) Xeon(R) CPU @ 2.20GHz\n", "Intel Xeon @ 2.20GHz"),
        ("/proc/cpuinfo", "model name\t: AMD EPYC 9654 96-Core Processor\n", "AMD EPYC 9654"),
        ("/proc/device-tree/model", "Raspberry Pi 5 Model B\0", "Raspberry Pi 5 Model B"),
    ],
)
def test_cpu_name(files, file, text, name):
    files[file] = text
    assert host.cpu_name() == name


@pytest.mark.parametrize(
    ("wanted", "uuids"),
    [("", []), ("1,0", ["GPU-b", "GPU-a"]), ("0,7,1", ["GPU-a"]), ("GPU-b", ["GPU-b"]), ("-1", [])],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(wanted, uuids):
    gpus = [Gpu("NVIDIA L4", None, uuid, None) for uuid in ("GPU-a", "GPU-b")]
    chosen = nvml._selected(lambda *_: None, gpus, wanted)
    assert [gpu.uuid for gpu in chosen] == uuids


class FakeNvml:
    """Three GPUs: 0 and 1 are joined by `direct` NVLinks, or by `switched` through a switch.

    GPU 2 has no NVLink, shares a PCIe switch with GPU 1, and is on the other socket of GPU 0.
    """

    def __init__(self, direct: int = 0, switched: int = 0) -> None:
        self.ends = [1] * direct + ["switch"] * switched

    def __call__(self, function: str, *arguments) -> None:
        getattr(self, function)(*(getattr(each, "_obj", each) for each in arguments))

    def nvmlDeviceGetPciInfo_v3(self, gpu, pci):
        pci.bus = 0x1B + gpu

    def nvmlDeviceGetNvLinkState(self, gpu, link, active):
        if gpu == 2:
            raise nvml.NvmlError("not supported")
        active.value = link.value < len(self.ends)

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, gpu, link, kind):
        kind.value = 2 if self.ends[link.value] == "switch" else 0

    def nvmlDeviceGetNvLinkRemotePciInfo_v2(self, gpu, link, pci):
        pci.bus = 0x1B + (1 - gpu)

    def nvmlDeviceGetTopologyCommonAncestor(self, a, b, level):
        level.value = {(0, 2): 50, (1, 2): 10, (0, 1): 30}[a, b]


@pytest.mark.parametrize(
    ("nvml_of", "between_0_and_1"),
    [(FakeNvml(direct=4), "NV4"), (FakeNvml(switched=18), "NV18"), (FakeNvml(), "PHB")],
)
def test_links_between_gpus_are_named_as_nvidia_smi_names_them(nvml_of, between_0_and_1):
    found = nvml._links(nvml_of, [0, 1, 2])
    assert found.addresses == ("0000:1b:00.0", "0000:1c:00.0", "0000:1d:00.0")
    assert found.links == {(0, 1): between_0_and_1, (0, 2): "SYS", (1, 2): "PIX"}


def test_a_gpu_that_is_not_named_has_no_specified_peak(monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    cuda = torch.device("cuda", 0)
    assert hardware.peak_flops(cuda, torch.bfloat16) == GPUS["h200"].peak_flops["bf16"]
    assert hardware.peak_flops(cuda, torch.float32) == GPUS["h200"].peak_flops["fp32"]
    assert hardware.peak_flops(cuda, torch.float64) is None
    assert hardware.memory_bandwidth(cuda) == GPUS["h200"].memory_bandwidth
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200 PCIe")
    assert hardware.peak_flops(cuda, torch.bfloat16) is None
    assert hardware.memory_bandwidth(cuda) is None


def test_float32_counts_as_tf32_only_where_torch_uses_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    cuda = torch.device("cuda", 0)
    assert hardware.peak_flops(cuda, torch.float32) == GPUS["h200"].peak_flops["tf32"]


def test_a_cpu_has_measured_peaks_only():
    assert hardware.peak_flops(CPU, torch.float32) is None
    assert hardware.memory_bandwidth(CPU) is None
    assert 1e8 < hardware.measured_peak_flops(CPU, torch.float32) < 1e14
    assert 1e8 < hardware.measured_bandwidth(CPU) < 1e13
    assert 2**26 <= hardware.beyond_cache_bytes(CPU) <= 2**28
    first, again = (hardware.measured_peak_flops(CPU, torch.float32) for _ in range(2))
    assert first == again  # kept: measured again it would differ in some digit
