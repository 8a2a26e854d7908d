"""NVIDIA's management library by ctypes: which GPUs there are, without importing torch.

Source: NVML API Reference Guide, https://docs.nvidia.com/deploy/nvml-api/
"""

import ctypes
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations

NVML_SUCCESS = 0
NVML_NVLINK_MAX_LINKS = 18
NVML_NVLINK_DEVICE_TYPE_SWITCH = 2
TOPOLOGY_LEVELS = {10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}  # nvmlGpuTopologyLevel_t


@dataclass(frozen=True)
class Gpu:
    """A GPU that this process may use. None where the driver does not tell."""

    name: str
    memory_bytes: int | None
    uuid: str
    compute_capability: str | None  # as in 9.0


@dataclass(frozen=True)
class GpuLinks:
    """Where the GPUs that this process may use are plugged in, and what joins each pair."""

    addresses: tuple[str | None, ...]  # on the PCI bus, as the kernel writes them: 0000:1b:00.0
    links: dict[tuple[int, int], str]  # by nvidia-smi's names: NV18, PIX, SYS; ? where not told


class NvmlError(Exception):
    """NVML is not installed, or refused a call."""


def visible_gpus() -> tuple[str, list[Gpu]]:
    """The driver's version, and the GPUs that $CUDA_VISIBLE_DEVICES leaves, in its order.

    Raises `NvmlError` where NVML cannot be used.
    """
    with _library() as call:
        driver = _text(lambda buffer, size: call("nvmlSystemGetDriverVersion", buffer, size))
        count = ctypes.c_uint()
        call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        gpus = [_gpu(call, _handle_by_index(call, index)) for index in range(count.value)]
        wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
        if wanted is not None:
            gpus = list(_selected(call, gpus, wanted))
    return driver, gpus


def gpu_links() -> GpuLinks:
    """The GPUs' PCI addresses and the link of each pair (i < j), as `nvidia-smi topo -m` has them.

    Raises `NvmlError` where NVML cannot be used.
    """
    _, gpus = visible_gpus()
    with _library() as call:
        handles = [_handle_by_uuid(call, gpu.uuid) for gpu in gpus]
        return _links(call, handles)


def _links(call: Callable, handles: list[ctypes.c_void_p]) -> GpuLinks:
    addresses = [_pci_address(call, handle) for handle in handles]
    joined = [_nvlinks(call, handle) for handle in handles]
    links = {}
    for i, j in combinations(range(len(handles)), 2):
        direct = joined[i].get(addresses[j] or "", 0)
        switched = min(joined[i]["switch"], joined[j]["switch"])
        bonded = direct or switched
        links[i, j] = f"NV{bonded}" if bonded else _common_ancestor(call, handles[i], handles[j])
    return GpuLinks(tuple(addresses), links)


def _nvlinks(call: Callable, handle: ctypes.c_void_p) -> Counter[str]:
    """How many of a GPU's active NVLinks lead to which PCI address, or to a "switch"."""
    ends: Counter[str] = Counter()
    for link in map(ctypes.c_uint, range(NVML_NVLINK_MAX_LINKS)):
        active, kind, pci = ctypes.c_uint(), ctypes.c_uint(), _Pci()
        state = ("nvmlDeviceGetNvLinkState", handle, link, ctypes.byref(active))
        if not _supported(call, *state) or not active.value:
            continue
        remote = ("nvmlDeviceGetNvLinkRemoteDeviceType", handle, link, ctypes.byref(kind))
        if _supported(call, *remote) and kind.value == NVML_NVLINK_DEVICE_TYPE_SWITCH:
            ends["switch"] += 1
        elif _supported(
            call, "nvmlDeviceGetNvLinkRemotePciInfo_v2", handle, link, ctypes.byref(pci)
        ):
            ends[_as_kernel_writes(pci)] += 1
    return ends


def _common_ancestor(call: Callable, a: ctypes.c_void_p, b: ctypes.c_void_p) -> str:
    level = ctypes.c_uint()
    if not _supported(call, "nvmlDeviceGetTopologyCommonAncestor", a, b, ctypes.byref(level)):
        return "?"
    return TOPOLOGY_LEVELS.get(level.value, "PIX")  # 0: two GPUs on one board


def _pci_address(call: Callable, handle: ctypes.c_void_p) -> str | None:
    pci = _Pci()
    told = _supported(call, "nvmlDeviceGetPciInfo_v3", handle, ctypes.byref(pci))
    return _as_kernel_writes(pci) if told else None


def _as_kernel_writes(pci: "_Pci") -> str:
    return f"{pci.domain:04x}:{pci.bus:02x}:{pci.device:02x}.0"


def _selected(call: Callable, gpus: list[Gpu], wanted: str) -> Iterator[Gpu]:
    """What CUDA makes of the variable: the entries up to the first that names no device."""
    for entry in filter(None, (part.strip() for part in wanted.split(","))):
        if entry.startswith("MIG-"):
            yield _gpu(call, _handle_by_uuid(call, entry))
            continue
        if entry.isdecimal():
            named = gpus[int(entry) : int(entry) + 1]
        else:
            named = [gpu for gpu in gpus if gpu.uuid.startswith(entry)][:1]
        if not named:
            return
        yield named[0]


@contextmanager
def _library() -> Iterator[Callable]:
    """NVML, initialised: a function that calls one of its functions and raises on its errors."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        raise NvmlError(f"NVML is not installed: {error}") from error

    def call(function: str, *arguments: object) -> None:
        status = getattr(library, function)(*arguments)
        if status != NVML_SUCCESS:
            raise NvmlError(f"{function} returned {status}")

    call("nvmlInit_v2")
    try:
        yield call
    finally:
        library.nvmlShutdown()


def _handle_by_index(call: Callable, index: int) -> ctypes.c_void_p:
    handle = ctypes.c_void_p()
    call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
    return handle


def _handle_by_uuid(call: Callable, uuid: str) -> ctypes.c_void_p:
    handle = ctypes.c_void_p()
    call("nvmlDeviceGetHandleByUUID", ctypes.c_char_p(uuid.encode()), ctypes.byref(handle))
    return handle


class _Pci(ctypes.Structure):
    """nvmlPciInfo_t: where a device is on the PCI bus."""

    _fields_ = [
        ("busIdLegacy", ctypes.c_char * 16),
        *((name, ctypes.c_uint) for name in ("domain", "bus", "device", "id", "subsystem")),
        ("busId", ctypes.c_char * 32),
    ]


class _Memory(ctypes.Structure):
    """nvmlMemory_t, in bytes."""

    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


def _gpu(call: Callable, handle: ctypes.c_void_p) -> Gpu:
    memory = _Memory()
    major, minor = ctypes.c_int(), ctypes.c_int()
    return Gpu(
        name=_text(lambda buffer, size: call("nvmlDeviceGetName", handle, buffer, size)),
        memory_bytes=memory.total
        if _supported(call, "nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
        else None,
        uuid=_text(lambda buffer, size: call("nvmlDeviceGetUUID", handle, buffer, size)),
        compute_capability=f"{major.value}.{minor.value}"
        if _supported(
            call,
            "nvmlDeviceGetCudaComputeCapability",
            handle,
            ctypes.byref(major),
            ctypes.byref(minor),
        )
        else None,
    )


def _supported(call: Callable, function: str, *arguments: object) -> bool:
    """Call; False where this device has no answer (unified memory has no size of its own)."""
    try:
        call(function, *arguments)
    except NvmlError:
        return False
    return True


def _text(read: Callable[[ctypes.Array, ctypes.c_uint], None]) -> str:
    buffer = ctypes.create_string_buffer(96)  # NVML_DEVICE_NAME_V2_BUFFER_SIZE, the largest used
    read(buffer, ctypes.c_uint(len(buffer)))
    return buffer.value.decode()
