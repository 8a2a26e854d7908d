"""What this machine has, whether it computes and communicates rightly, and what chapters lack.

Useful with GPUs and without: it lists GPUs and how they are linked, the CPU and its instructions
for machine learning, memory, disks, NUMA nodes, back ends and versions. Then it tries them: a
matrix product on each device against a float64 reference, and an all-reduce by gloo and by NCCL.

Run:
    python chapter01-introduction/code/check_cuda.py
    python chapter01-introduction/code/check_cuda.py --json build/machine.json

You should see: tables of the hardware and the software, every check ok, and a row for each of the
eleven chapters, ticked or with what it lacks; below it the command that mends each of them.
"""

import importlib.metadata
import platform
import re
import shutil
import subprocess
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from distlab import files, hardware, script
from distlab.display import quantity
from distlab.lab import needs
from distlab.script import Run

PRESETS = {
    "smoke": {"matrix_size": 256},
    "laptop": {"matrix_size": 512},
    "gpu": {"matrix_size": 1024},
}
CPU_FEATURES = {  # by the kernel's name, on x86 and on ARM
    "avx2": "256-bit vectors",
    "avx512f": "512-bit vectors",
    "avx512_vnni": "8-bit products in 512-bit vectors",
    "avx512_bf16": "bfloat16 products in 512-bit vectors",
    "amx_int8": "8-bit matrix tiles",
    "amx_bf16": "bfloat16 matrix tiles",
    "asimd": "128-bit vectors",
    "sve": "scalable vectors",
    "bf16": "bfloat16 products",
    "i8mm": "8-bit matrix products",
}
PACKAGES = ("numpy", "transformers", "tokenizers", "safetensors", "deepspeed", "vllm", "sglang")
COMMAND_LIMIT_S = 20
REDUCE_RANKS = 2


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with script.run(args) as run:
        show_cpu(run)
        show_storage(run)
        show_gpus(run)
        show_software(run)
        for device in devices():
            check_matrix_products(run, device, args.matrix_size)
        check_gloo(run)
        check_nccl(run)
        show_chapters(run)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    parser.add_argument("--matrix-size", type=script.positive_int, help="of the products it tries")
    return parser.parse_args(argv)


def devices() -> list[torch.device]:
    """The CPU and every GPU that torch can use."""
    count = torch.cuda.device_count() if hardware.has_cuda() else 0
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(count))]


def show_cpu(run: Run) -> None:
    machine = hardware.machine()
    flags = set(re.findall(r"^(?:flags|Features)\s*: (.+)$", _read("/proc/cpuinfo"), re.M)[:1])
    present = {word for line in flags for word in line.split()}
    rows = [
        ["model", machine.cpu],
        ["cores this process may use", str(machine.cores)],
        ["memory it may use", f"{machine.memory_bytes / 2**30:.1f} GiB"],
        ["instructions that torch uses", torch.backends.cpu.get_cpu_capability()],
        *([name, what] for name, what in CPU_FEATURES.items() if name in present),
    ]
    for node in sorted(Path("/sys/devices/system/node").glob("node[0-9]*")):
        total = re.search(r"MemTotal:\s+(\d+) kB", _read(node / "meminfo"))
        memory = f", {int(total[1]) / 2**20:.1f} GiB" if total else ""
        rows.append([f"NUMA {node.name}", f"cores {_read(node / 'cpulist').strip()}{memory}"])
    run.table("cpu", ["CPU", ""], rows)


def show_storage(run: Run) -> None:
    rows = []
    for name, place in (
        ("this checkout", files.repo_root()),
        ("token shards and tokenizers", files.cache_dir()),
        ("shared memory between processes", Path("/dev/shm")),
    ):
        existing = next((p for p in (place, *place.parents) if p.exists()), Path("/"))
        usage = shutil.disk_usage(existing)
        rows.append([name, quantity(usage.free, "B"), quantity(usage.total, "B")])
    run.table("storage", ["storage", "free", "of"], rows)


def show_gpus(run: Run) -> None:
    """The GPUs that the driver shows, what their data sheets say, and how they are linked."""
    machine = hardware.machine()
    if not machine.gpus:
        run.print("no GPU: all scripts run on the CPU, with gloo in place of NCCL")
        return
    if not hardware.has_cuda():
        run.print(f"torch {machine.torch} cannot use this machine's GPUs; one that can comes with")
        run.print("python3 scripts/lab.py --torch cuda doctor")
        return
    rows = []
    for device in devices()[1:]:
        told = torch.cuda.get_device_properties(device)
        rows.append([
            str(device), told.name, f"{told.total_memory / 2**30:.1f} GiB",
            f"{told.major}.{told.minor}", told.multi_processor_count,
            quantity(hardware.peak_flops(device, torch.bfloat16), "FLOP/s"),
            quantity(hardware.memory_bandwidth(device), "B/s"),
        ])  # fmt: skip
    columns = ["GPU", "name", "memory", "capability", "SMs", "bfloat16 peak", "bandwidth"]
    run.table("gpus", columns, rows, caption=f"driver {machine.driver}; peaks as specified")
    if topology := _output_of("nvidia-smi", "topo", "-m"):
        run.print(topology)
        run.extra(topology=topology)


def show_software(run: Run) -> None:
    machine = hardware.machine()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else "no"
    rows = [
        ["system", machine.os],
        ["Python", platform.python_version()],
        ["torch", torch.__version__],
        ["CUDA, as torch was built", torch.version.cuda or "no"],
        ["NCCL", nccl],
        ["gloo", "yes" if dist.is_gloo_available() else "no"],
        ["MPI", "yes" if dist.is_mpi_available() else "no"],
        *([name, _version(name)] for name in PACKAGES),
    ]
    run.table("software", ["software", "version"], rows)


def check_matrix_products(run: Run, device: torch.device, size: int) -> None:
    """|C - AB| <= n eps |A||B|, element by element, for inner products of length n.

    A bound for any order of summation: Higham 2002, Accuracy and Stability of Numerical Algorithms,
    section 3.5. A result beyond it is wrong, not merely rounded.
    """
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(size, size, generator=generator, dtype=torch.float64) for _ in range(2)]
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (matrix.to(dtype) for matrix in exact)
        reference = a.double() @ b.double()
        bound = size * torch.finfo(dtype).eps * (a.double().abs() @ b.double().abs())
        error = (a.to(device) @ b.to(device)).cpu().double() - reference
        run.check_below(
            f"{str(dtype).removeprefix('torch.')} matrix product on {device} is within its bound",
            (error.abs() / bound).max().item(),
            limit=1.0,
        )


def check_gloo(run: Run) -> None:
    """Two ranks, here two threads that talk over the loopback interface, sum 1 + 2."""
    store = dist.HashStore()
    with ThreadPoolExecutor(REDUCE_RANKS) as ranks:
        sums = list(ranks.map(lambda rank: gloo_sum(store, rank), range(REDUCE_RANKS)))
    expected = torch.full_like(sums[0], sum(range(1, REDUCE_RANKS + 1)))
    run.check_equal("gloo all-reduce of two ranks is right", sums, [expected] * REDUCE_RANKS)


def gloo_sum(store: dist.Store, rank: int) -> torch.Tensor:
    limit = timedelta(seconds=COMMAND_LIMIT_S)
    group = dist.ProcessGroupGloo(store, rank, REDUCE_RANKS, limit)
    values = torch.full((1000,), float(rank + 1))
    group.allreduce([values]).wait()  # type: ignore[attr-defined]  # torch's stubs lack it
    return values


def check_nccl(run: Run) -> None:
    """Every GPU brings its number from 1 on; each must end with the sum."""
    gpus = devices()[1:]
    if not gpus or not dist.is_nccl_available():
        return
    values = [torch.full((1000,), float(i + 1), device=gpu) for i, gpu in enumerate(gpus)]
    torch.cuda.nccl.all_reduce(values)
    expected = torch.full((1000,), float(sum(range(1, len(gpus) + 1))))
    run.check_equal(
        f"NCCL all-reduce over {len(gpus)} GPU(s) is right",
        [value.cpu() for value in values], [expected] * len(gpus),
    )  # fmt: skip


def show_chapters(run: Run) -> None:
    wanted = needs.needs()
    found = [need.probe() for need in wanted]
    run.table("chapters", ["chapter", "title", "lacks"], needs.chapter_rows(wanted, found))
    if mending := needs.remedies(wanted, found):
        run.table("remedies", ["missing", "chapters", "the command that mends it"], mending)


def _output_of(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", timeout=COMMAND_LIMIT_S
    )
    return done.stdout if done.returncode == 0 else None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not in this environment"


def _read(path: str | Path) -> str:
    return Path(path).read_text(encoding="utf-8") if Path(path).is_file() else ""


if __name__ == "__main__":
    script.exit(main)
