"""Measure properly: warm up, repeat, give the median and its spread, never a single shot."""

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distlab.display import quantity


@dataclass(frozen=True)
class Timing:
    """The samples of one measured thing, in seconds."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.samples))

    @property
    def q1(self) -> float:
        return float(np.percentile(self.samples, 25))

    @property
    def q3(self) -> float:
        return float(np.percentile(self.samples, 75))

    def ratios(self, twin: "Timing") -> list[float]:
        """Each sample over its twin's, measured in the same turn: what slowed both cancels."""
        return [own / other for own, other in zip(self.samples, twin.samples, strict=True)]

    def __str__(self) -> str:
        spread = f"{quantity(self.q1, 's')} to {quantity(self.q3, 's')}"
        return f"{quantity(self.median, 's')} (quartiles {spread}, n={len(self.samples)})"


def measure(
    function: Callable[[], object],
    warmup: int = 3,
    repeats: int = 10,
    device: torch.device | str | None = None,
) -> Timing:
    """Call `function` `warmup` times unmeasured, then `repeats` times, each timed.

    On a CUDA `device` each call is timed by CUDA events, so queueing ahead is not mistaken for
    speed. Raises `ValueError` for fewer than three repeats: a median of two is no median.
    """
    return compare({"it": function}, warmup, repeats, device)["it"]


def compare(
    functions: Mapping[str, Callable[[], object]],
    warmup: int = 3,
    repeats: int = 10,
    device: torch.device | str | None = None,
    before: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time several functions side by side, in turns (A B C, A B C …).

    A machine's speed drifts; what is timed in turns drifts together, so the ratio of two medians
    holds where the medians themselves do not. `before`, such as a job's barrier, is called ahead of
    each timed call and not timed.
    """
    if repeats < 3:
        raise ValueError(f"{repeats} repeats give no median; use at least 3")
    timer = _cuda_timer if torch.device(device or "cpu").type == "cuda" else _wall_timer
    for function in functions.values():
        for _ in range(warmup):
            function()
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            if before is not None:
                before()
            samples[name].append(timer(function))
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _wall_timer(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _cuda_timer(function: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each counted once, however many views it has.

    A tensor in oneDNN's own layout is opaque: it has no storage that could be asked. Each such
    tensor is counted by its numbers, as if nothing were padded or shared.
    """
    storages: dict[int, int] = {}
    for tensor in tensors:
        if is_opaque(tensor):
            storages[tensor._cdata] = tensor.nbytes
            continue
        storage = tensor.untyped_storage()
        begin = storage.data_ptr()
        storages[begin] = max(storage.nbytes(), storages.get(begin, 0))
    storages.pop(0, None)  # empty, or on the meta device
    return sum(storages.values())


def is_opaque(tensor: torch.Tensor) -> bool:
    """Whether oneDNN has packed `tensor` in a layout that only it knows (as `.to_mkldnn()`)."""
    return tensor.is_mkldnn


class PeakMemory:
    """Peak memory inside a `with` block, in bytes, above what was in use before it.

    On CUDA it is the allocator's peak, exact. On a CPU it is the process's resident set, sampled
    every millisecond by a thread. That depends on what ran before: pages that the allocator kept
    are used again unseen, so measure what is large, and in a process that has not held as much.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.bytes = 0

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return self
        self._process = psutil.Process(os.getpid())
        self._before = self._peak = self._process.memory_info().rss
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
            return
        self._done.set()
        self._sampler.join()
        self._sample_once()
        self.bytes = self._peak - self._before

    def _sample(self) -> None:
        while not self._done.wait(0.001):
            self._sample_once()

    def _sample_once(self) -> None:
        self._peak = max(self._peak, self._process.memory_info().rss)


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made inside a `with` block that still live, and their peak: exact.

    Every operator's outputs pass through here, those of the backward pass too, and a finalizer
    tells when a storage is freed. What a kernel allocates for itself is not seen, nor what compiled
    code allocates. `device` leaves out other devices' tensors. Opaque ones count as in
    `tensor_bytes`.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.made: list[torch.Tensor] = []  # by the last operator, views left out
        self._kind = None if device is None else torch.device(device).type
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        read = {_holder(tensor)._cdata for tensor in tensors_in((args, kwargs))}
        self.made = [t for t in tensors_in(outputs) if _holder(t)._cdata not in read]
        for tensor in self.made:
            self._watch(tensor)
        self.peak = max(self.peak, self.bytes)
        return outputs

    def _watch(self, tensor: torch.Tensor) -> None:
        holder = _holder(tensor)
        if holder._cdata in self._alive or self._kind not in (None, tensor.device.type):
            return
        size = holder.nbytes if isinstance(holder, torch.Tensor) else holder.nbytes()
        self._alive.add(holder._cdata)
        self.bytes += size
        weakref.finalize(holder, self._forget, holder._cdata, size)

    def _forget(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.bytes -= size


def _holder(tensor: torch.Tensor) -> torch.Tensor | torch.UntypedStorage:
    """What holds the numbers of `tensor`: its storage, or itself where there is none to be seen."""
    return tensor if is_opaque(tensor) else tensor.untyped_storage()


def tensors_in(values: Any) -> list[torch.Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
