"""Memory for packed weights, in large pages where Linux gives them.

A product of one row reads the whole model once, in order. With pages of 4 KiB the processor looks
up an address's page every 64 lines, and its prefetching stops there; with pages of 2 MiB it rarely
does. A weight of a small model is smaller than such a page, so weights lie together in chunks.
"""

import contextlib
import math
import mmap
import threading

import torch
from torch import Tensor

CHUNK = 32 * 2**20  # bytes; what is never touched takes no memory
ALIGNMENT = 64  # a line of the cache, and the widest vector


class Room:
    """Gives uninitialised tensors out of chunks. A chunk lives as long as its tensors do."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        with self._lock:
            if self._used + size > len(self._chunk):
                with torch.inference_mode(False):  # so that both modes may write to it
                    self._chunk, self._used = _chunk(max(size, CHUNK)), 0
            piece = self._chunk[self._used : self._used + size]
            self._used += -(-size // ALIGNMENT) * ALIGNMENT
        return piece.view(dtype).view(shape)


def _chunk(size: int) -> Tensor:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without large pages: they stay small
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


ROOM = Room()
