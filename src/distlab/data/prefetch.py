"""A thread that has the next batches ready, copied to a CUDA device beside what runs there."""

import threading
from collections.abc import Callable
from queue import Empty, Full, Queue

import torch

Batch = tuple[torch.Tensor, torch.Tensor]


class Prefetcher:
    """Hands out make(0), make(1), … in order; a thread makes up to `depth` of them ahead.

    For a CUDA `device` a batch goes through page-locked memory, which alone can be copied while
    kernels run, and on a stream of its own; the caller's stream waits for the copy, the host does
    not. An exception in `make` is raised where the batch would have been.
    """

    def __init__(self, make: Callable[[int], Batch], device: torch.device, depth: int) -> None:
        self._make = make
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ready: Queue[Batch | BaseException] = Queue(maxsize=depth)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def __next__(self) -> Batch:
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for tensor in item:
                tensor.record_stream(current)  # its memory is not reused before `current` is past
        return item

    def close(self) -> None:
        """End the thread; what it had ready is dropped."""
        self._done.set()
        while self._thread.is_alive():
            try:
                self._ready.get_nowait()
            except Empty:
                self._thread.join(timeout=0.01)

    def _work(self) -> None:
        count = 0
        while not self._done.is_set():
            try:
                item: Batch | BaseException = self._to_device(self._make(count))
            except Exception as error:
                item = error
            self._put(item)
            if isinstance(item, BaseException):
                return
            count += 1

    def _to_device(self, batch: Batch) -> Batch:
        if self._stream is None:
            return batch
        with torch.cuda.stream(self._stream):
            inputs, targets = (
                tensor.pin_memory().to(self._device, non_blocking=True) for tensor in batch
            )
        return inputs, targets

    def _put(self, item: Batch | BaseException) -> None:
        while not self._done.is_set():
            try:
                return self._ready.put(item, timeout=0.1)
            except Full:
                continue
