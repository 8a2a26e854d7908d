"""A device with a size: what a rank may allocate is bounded, and the bound is the system's.

A GPU has so many bytes, and says so when they are used up. A CPU's ranks share a machine that is
much larger than they need, so that nothing ever fails to fit. `device_memory` gives each rank a
memory of its own: on Linux RLIMIT_DATA, which needs no rights and counts what a process maps to
write to (tensors, heap, stacks), beyond what it had mapped when training began. On a GPU it is the
allocator's own limit. What does not fit ends the rank with one line that says what held the bytes.
"""

import ctypes
import gc
import re
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist
from torch import nn

from distlab.display import quantity
from distlab.errors import RunError, UsageError
from distlab.measure import tensor_bytes
from distlab.runtime import Runtime
from distlab.script import NO_MEMORY, Parser, positive_float
from distlab.training.cgroup import MOST

MB = 10**6
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
STACK = 1 << 20  # bytes of a new thread's: each maps all of it at once, and by default 8 MiB
ATTRIBUTES = 256  # bytes, more than any pthread_attr_t
OWN_MAPPING = 1 << 14  # bytes from which an allocation is given back as soon as it is freed
HEADROOM = 64 * MB  # for what is loaded and kept between the refusal and the bound
TRIED = re.compile(r"tried to allocate ([\d.]+) (bytes|[KMG]iB)")
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def add_memory_flag(parser: Parser) -> None:
    """--memory-mb, the size of a rank's device."""
    parser.add_argument(
        "--memory-mb", type=positive_float, metavar="MB",
        help="what a rank may allocate, in 10^6 bytes, beyond what it holds when training begins",
    )  # fmt: skip


class DeviceMemory:
    """What a rank may allocate, and which part of a training step it is in.

    `phase` is for the message of a failure. `watch` names what holds bytes: each kind a function
    that gives its bytes now, by walking tensors' storages.
    """

    def __init__(self, job: Runtime, limit: int | None) -> None:
        self.job, self.limit = job, limit
        self.phase = "the beginning"
        self.kinds: dict[str, Callable[[], int]] = {}
        self.advice = ""
        self.start = allocated(job.device)

    def watch(self, advice: str = "", **kinds: Callable[[], int]) -> Self:
        """Name the kinds of bytes, and what a failure's last sentence advises."""
        self.kinds, self.advice = kinds, advice
        return self

    def used(self) -> int:
        """Bytes allocated since the beginning, whatever they are for."""
        return allocated(self.job.device) - self.start

    def by_kind(self) -> dict[str, int]:
        """The watched kinds' bytes."""
        return {name: count() for name, count in self.kinds.items()}

    def failure(self, error: BaseException) -> RunError:
        """The one line for an allocation that failed."""
        assert self.limit is not None
        kinds = self.by_kind()
        asked = _asked(error)
        rest = max(0, self.limit - sum(kinds.values()) - (asked or 0))
        held = [f"{name} {_mb(size)}" for name, size in kinds.items() if size]
        wanted = f"{_mb(asked)} more were" if asked else "more was"
        return RunError(
            f"rank {self.job.rank}: its {_mb(self.limit)} are used up in {self.phase}, where "
            f"{wanted} needed; {', '.join([*held, f'all else at most {_mb(rest)}'])}"
            + (f"; {self.advice}" if self.advice else "")
        )


def bytes_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Callable[[], int]]:
    """The kinds that every training has: weights, their gradients, the optimizer's state.

    They count what this rank holds: of a sharded tensor its own shard.
    """

    def state() -> list[torch.Tensor]:
        held = [value for state in optimizer.state.values() for value in state.values()]
        return [_local(value) for value in held if isinstance(value, torch.Tensor)]

    def weights() -> list[torch.Tensor]:
        return [_local(parameter.detach()) for parameter in module.parameters()]

    def gradients() -> list[torch.Tensor]:
        there = [parameter.grad for parameter in module.parameters()]
        return [_local(gradient) for gradient in there if gradient is not None]

    return {
        "weights": lambda: tensor_bytes(weights()),
        "gradients": lambda: tensor_bytes(gradients()),
        "optimizer": lambda: tensor_bytes(state()),
    }


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@contextmanager
def device_memory(
    job: Runtime, megabytes: float | None, rehearse: Callable[[], object] = lambda: None
) -> Iterator[DeviceMemory]:
    """Let this rank allocate `megabytes` (10^6 bytes) beyond what it holds now, inside the block.

    None sets no bound. Every rank calls it. `rehearse` does in small what the block will do, so
    that what libraries load and keep at first use is there before. Raises `UsageError` where the
    system has no such bound, and, in place of an allocation's failure, `RunError` with
    `DeviceMemory.failure`'s line.
    """
    if megabytes is None:
        yield DeviceMemory(job, None)
        return
    refuse_system(job.device)
    _refuse_bound(job.device, megabytes)
    _settle(job)
    rehearse()
    gc.collect()
    job.synchronize()
    try:
        with _holes_filled():
            memory = DeviceMemory(job, round(megabytes * MB))
            with _bounded(job.device, memory.start + round(megabytes * MB)):
                yield memory
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
            raise memory.failure(error) from None
        raise


def refuse_system(device: torch.device) -> None:
    """Raise `UsageError` where memory cannot be bounded."""
    if device.type == "cpu" and sys.platform != "linux":
        raise UsageError(
            "--memory-mb needs Linux, whose RLIMIT_DATA bounds what a process may write to; "
            "leave it out, or run in a Linux container"
        )


def _refuse_bound(device: torch.device, megabytes: float) -> None:
    """Raise `UsageError` for a bound above the one that this process already has, by `ulimit -d`
    or by the integers of RLIMIT_DATA."""
    if device.type != "cpu":
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = (MOST if hard == resource.RLIM_INFINITY else hard) - allocated(device)
    if megabytes * MB + HEADROOM > most:
        raise UsageError(
            f"--memory-mb {megabytes:g} is more than this process may have, "
            f"{quantity(max(0, most), 'B')} (ulimit -H -d); use less, or leave it out"
        )


def allocated(device: torch.device) -> int:
    """Bytes that this process has on `device`: of a CPU, all that it has mapped to write to."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.findall(r"VmData:\s+(\d+) kB", status)[0]) * 1024
    return 0


@contextmanager
def _bounded(device: torch.device, limit: int) -> Iterator[None]:
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _settle(job: Runtime) -> None:
    """Do first what costs memory once: a step's threads and imports, and the libraries' own pools.

    Threads, which libraries start when they like, get stacks of 1 MiB instead of 8.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        attributes = ctypes.create_string_buffer(ATTRIBUTES)
        libc.pthread_attr_init(attributes)
        libc.pthread_attr_setstacksize(attributes, ctypes.c_size_t(STACK))
        libc.pthread_setattr_default_np(attributes)
    give_back_at_once()
    layer = nn.Linear(64, 64, device=job.device)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    for _ in range(2):
        layer(torch.ones(64, 64, device=job.device)).square().mean().backward()
        for parameter in layer.parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
        optimizer.step()


def give_back_at_once() -> None:
    """Tell glibc to give every larger block back to the system as soon as it is freed.

    By default it keeps more and more for itself, and a bound would be its, not the tensors'.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, OWN_MAPPING)
        libc.mallopt(M_TRIM_THRESHOLD, OWN_MAPPING)


class _Heap(ctypes.Structure):
    """glibc's struct mallinfo."""

    _fields_ = [
        ("before", ctypes.c_int * 3),
        ("hblks", ctypes.c_int),  # blocks with a mapping of their own
        ("after", ctypes.c_int * 6),
    ]


@contextmanager
def _holes_filled() -> Iterator[None]:
    """Take what imports left free in the heap: tensors in there would cost nothing, 6 MB of them.

    Afterwards every block from `OWN_MAPPING` on has a mapping of its own.
    """
    taken: list[int] = []
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo"):  # another libc than glibc
        yield
        return
    libc.mallinfo.restype = _Heap
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    mapped = libc.mallinfo().hblks
    try:
        while not taken or libc.mallinfo().hblks <= mapped:  # other threads may give some back
            taken.append(libc.malloc(OWN_MAPPING))
        libc.free(taken.pop())  # which has a mapping
        yield
    finally:
        for block in taken:
            libc.free(block)


def _asked(error: BaseException) -> int | None:
    """The bytes of the allocation that failed, where the message has them."""
    found = TRIED.search(str(error))
    return round(float(found[1]) * UNITS[found[2]]) if found else None


def _mb(size: float) -> str:
    return quantity(size, "B")
