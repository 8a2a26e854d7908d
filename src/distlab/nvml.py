"""NVIDIA's management library by ctypes: which GPUs there are, without importing torch.

Source: NVML API Reference Guide, https://docs.nvidia.com/deploy/nvml-api/
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

NVML_SUCCESS = 0


@dataclass(frozen=True)
class Gpu:
    """A GPU that this process may use. None where the driver does not tell."""

    name: str
    memory_bytes: int | None
    uuid: str
    compute_capability: str | None  # as in 9.0


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
