"""A weight packed for the compiled product, and the memory in which packed weights lie.

A product of one row reads the whole model once, in order. With pages of 4 KiB the processor looks
up an address's page every 64 lines, and its prefetching stops there; with pages of 2 MiB it rarely
does. A weight of a small model is smaller than such a page, so weights lie together in chunks, in
large pages where Linux gives them.
"""

import contextlib
import math
import mmap
import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from paged_engine.native import Native

CHUNK = 32 * 2**20  # bytes; what is never touched takes no memory
ALIGNMENT = 64  # a line of the cache, and the widest vector

Product = Callable[[Tensor], Tensor]


class Linear:
    """A packed weight [out, in], called with x [..., in]."""

    def __init__(self, weight: Tensor, bias: Tensor | None, built: Native) -> None:
        self.columns, self.depth = weight.shape
        kept = weight.detach().contiguous()
        if kept.dtype == torch.float32 and holds_bfloat16(kept):
            kept = kept.bfloat16()
        self.panels = to_panels(kept, built.columns)
        self.bias = None
        if bias is not None:
            self.bias = to_panels(bias.detach().float()[:, None], built.columns)
        name = "linear_bfloat16" if kept.dtype == torch.bfloat16 else "linear_float32"
        self._product = getattr(built.library, name)

    def __call__(self, x: Tensor) -> Tensor:
        *shape, depth = x.shape
        if depth != self.depth:
            raise ValueError(f"x has {depth} columns; the weight takes {self.depth}")
        x32 = x.float().contiguous()
        y = torch.empty((*shape, self.columns))
        self._product(
            x32.data_ptr(),
            self.panels.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
            y.data_ptr(),
            math.prod(shape),
            self.columns,
            self.depth,
            torch.get_num_threads(),
        )
        return y if x.dtype == torch.float32 else y.to(x.dtype)


def holds_bfloat16(weight: Tensor) -> bool:
    """Whether every number of a float32 `weight` is one of bfloat16's, so that nothing is lost."""
    return not (weight.view(torch.int32) & 0xFFFF).any()


def to_panels(weight: Tensor, columns: int) -> Tensor:
    """`weight` [out, in] as [panels, in, columns]; what the last panel lacks is zero."""
    out, depth = weight.shape
    panels, whole = -(-out // columns), out // columns
    packed = ROOM.take((panels, depth, columns), weight.dtype)
    packed[:whole] = weight[: whole * columns].view(whole, columns, depth).transpose(1, 2)
    packed[whole:] = 0
    packed[whole:, :, : out - whole * columns] = weight[whole * columns :].T
    return packed


def by_torch(weight: Tensor, bias: Tensor | None) -> Product:
    """torch's product, in the wider of the two types: a bfloat16 weight is widened each time."""

    def product(x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, weight.dtype)
        added = None if bias is None else bias.to(wide)
        return F.linear(x.to(wide), weight.to(wide), added).to(x.dtype)

    return product


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
