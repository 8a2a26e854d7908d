"""A product with a packed weight, and torch's, which stands in for it."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from paged_engine._kernels_build import Native
from paged_engine._kernels_memory import ROOM

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
