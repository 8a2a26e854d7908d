"""What this machine is, and its peaks: compute and memory bandwidth, None where unknown.

`machine()` takes milliseconds and does not import torch. A *specified* peak comes from the GPU's
data sheet (`distlab.catalog` names it); a *measured* one from the best that this machine did.
"""

import functools
import importlib.metadata
import importlib.util
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distlab import host, nvml
from distlab.errors import UsageError
from distlab.nvml import Gpu

if TYPE_CHECKING:
    import torch

    from distlab.catalog import GpuSpec

WARMUP, REPEATS = 1, 3
LONGEST_MEASUREMENT = 1.5  # seconds for all runs of one size of a matrix product
DRIVER_FILES = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/dxg")


@dataclass(frozen=True)
class Machine:
    """What a run's record says of where it ran. None where there is none, or none is told."""

    cpu: str
    cores: int  # those that this process may use: affinity and cgroup quota
    memory_bytes: int  # what this process may use: the cgroup's limit, if it is lower
    gpus: tuple[Gpu, ...]
    driver: str | None
    python: str
    torch: str | None
    cuda: str | None  # the version that torch is built for
    nccl: str | None
    os: str

    def __str__(self) -> str:
        return machine_line(self)


def machine() -> Machine:
    """This machine, as this process may use it."""
    driver, gpus = _gpus()
    return Machine(
        cpu=host.cpu_name(),
        cores=host.usable_cores(),
        memory_bytes=host.usable_memory(),
        gpus=gpus,
        driver=driver,
        python=platform.python_version(),
        torch=_version("torch"),
        cuda=_cuda_of_torch(),
        nccl=_version("nvidia-nccl-cu13") or _version("nvidia-nccl-cu12"),
        os=host.operating_system(),
    )


def machine_line(machine: Machine) -> str:
    """One line: `AMD EPYC 7B13, 2 cores, 24 GiB, no GPU; Python 3.11.7, torch 2.13.0+cpu`."""
    cores = f"{machine.cores} core{'s' if machine.cores > 1 else ''}"
    memory = f"{machine.memory_bytes / 2**30:.0f} GiB"
    versions = [f"Python {machine.python}"]
    versions += [f"torch {machine.torch}" if machine.torch else "no torch"]
    if machine.gpus:
        versions += [f"CUDA {machine.cuda}"] if machine.cuda else []
        versions += [f"NCCL {machine.nccl}"] if machine.nccl else []
        versions += [f"driver {machine.driver}"] if machine.driver else []
    where = ", ".join([machine.cpu, cores, memory, _gpus_in_words(machine.gpus)])
    return f"{where}; {', '.join(versions)}"


def _gpus_in_words(gpus: tuple[Gpu, ...]) -> str:
    if not gpus:
        return "no GPU"
    kinds = dict.fromkeys((gpu.name, gpu.memory_bytes) for gpu in gpus)
    words = []
    for name, memory in kinds:
        count = sum((gpu.name, gpu.memory_bytes) == (name, memory) for gpu in gpus)
        size = f" ({memory / 2**30:.0f} GiB)" if memory else ""
        words.append(f"{count} x {name}{size}")
    return " + ".join(words)


def has_cuda() -> bool:
    """Whether torch can compute on a GPU here; cheap where there is no driver."""
    if not driver_present():
        return False
    import torch

    return torch.cuda.is_available()


def default_device() -> str:
    """The device of a script that was not told one: a GPU where there is one."""
    return "cuda" if has_cuda() else "cpu"


def chosen_device(asked: str) -> str:
    """cpu or cuda for a flag's auto, cpu or cuda; `UsageError` for a GPU that is not there."""
    if asked == "cuda" and not has_cuda():
        raise UsageError("--device cuda needs a GPU and there is none; use --device cpu")
    return default_device() if asked == "auto" else asked


def driver_present() -> bool:
    """Whether an NVIDIA driver is loaded."""
    return any(os.path.exists(file) for file in DRIVER_FILES)


def peak_flops(device: "torch.device", dtype: "torch.dtype") -> float | None:
    """The specified dense peak of matrix products in FLOP/s; None where no data sheet is known."""
    spec = _spec(device)
    return None if spec is None else spec.peak_flops.get(_arithmetic(dtype))


def memory_bandwidth(device: "torch.device") -> float | None:
    """The specified memory bandwidth in bytes/s; None where no data sheet is known."""
    spec = _spec(device)
    return None if spec is None else spec.memory_bandwidth


def measured_peak_flops(
    device: "torch.device", dtype: "torch.dtype", limit_s: float = LONGEST_MEASUREMENT
) -> float:
    """The rate in FLOP/s of the best square matrix product here, sizes up to 2048 (GPU: 8192).

    The median of the repeats of each size counts; a size that would take longer than `limit_s`, as
    it does on a slow machine, is left out. Kept for the life of the process.
    """
    import torch

    key = torch.device(device)
    threads = torch.get_num_threads() if key.type == "cpu" else 0
    return _measure_matmul(key, dtype, threads, limit_s)


def measured_bandwidth(device: "torch.device") -> float:
    """Bytes/s of a copy from memory to memory, reads and writes counted.

    The copy of STREAM (McCalpin 1995, "Memory Bandwidth and Machine Balance"): arrays of four
    times the last-level cache. Kept for the life of the process.
    """
    import torch

    key = torch.device(device)
    return _measure_copy(key, torch.get_num_threads() if key.type == "cpu" else 0)


def beyond_cache_bytes(device: "torch.device") -> int:
    """Bytes of which next to nothing stays in a cache: four times the last level, as STREAM asks.

    At least 64 MiB and at most 256 MiB on a CPU, whatever its cache; 1 GiB on a GPU.
    """
    if device.type == "cuda":
        return 2**30
    return min(max(4 * host.last_level_cache(), 2**26), 2**28)


def _spec(device: "torch.device") -> "GpuSpec | None":
    import torch

    from distlab.catalog import find_gpu

    if torch.device(device).type != "cuda":
        return None
    return find_gpu(torch.cuda.get_device_name(device))


def _arithmetic(dtype: "torch.dtype") -> str:
    """What the catalog calls the arithmetic in which torch multiplies matrices of `dtype`."""
    import torch

    if dtype is torch.float32:
        return "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8"}.get(
        dtype, str(dtype)
    )


@functools.lru_cache
def _measure_matmul(
    device: "torch.device", dtype: "torch.dtype", threads: int, limit_s: float
) -> float:
    import torch

    from distlab.measure import measure

    sizes = (256, 512, 1024, 2048) if device.type == "cpu" else (1024, 2048, 4096, 8192)
    best = 0.0
    for size in sizes:
        flops = 2.0 * size**3
        if best and (WARMUP + REPEATS) * flops / best > limit_s:
            break
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        product = torch.empty_like(a)
        multiply = functools.partial(torch.mm, a, b, out=product)
        best = max(best, flops / measure(multiply, WARMUP, REPEATS, device).median)
    return best


@functools.lru_cache
def _measure_copy(device: "torch.device", threads: int) -> float:
    import torch

    from distlab.measure import measure

    size = beyond_cache_bytes(device)
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * size / measure(lambda: target.copy_(source), WARMUP, REPEATS, device).median


def _gpus() -> tuple[str | None, tuple[Gpu, ...]]:
    """The driver's version and the GPUs; torch is asked only where NVML is missing (Jetson)."""
    if not driver_present():
        return None, ()
    try:
        driver, gpus = nvml.visible_gpus()
        return driver, tuple(gpus)
    except nvml.NvmlError:
        if not has_cuda():
            return None, ()
    import torch

    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return None, tuple(
        Gpu(p.name, p.total_memory, str(p.uuid), f"{p.major}.{p.minor}") for p in found
    )


def _cuda_of_torch() -> str | None:
    """torch.version.cuda, read from its file: importing torch takes seconds."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    match = re.search(
        r"^cuda\b.*= '([^']+)'", host.read(Path(found.origin).with_name("version.py")), re.M
    )
    return match[1] if match else None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
