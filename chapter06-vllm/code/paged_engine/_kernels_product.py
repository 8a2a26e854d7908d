"""A product with a packed weight, and the two of torch's that stand in for it."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from paged_engine._kernels_build import Native
from paged_engine._kernels_memory import ROOM

MATRIX_UNIT_TOKENS = 16  # from which on bfloat16 instructions beat float32's

Product = Callable[[Tensor], Tensor]


class Linear:
    """A packed weight [out, in], called with x [..., in]; `many` takes over for many rows."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, built: Native, many: Product | None = None
    ) -> None:
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
        self._many = many

    @property
    def is_alone(self) -> bool:
        """Whether it is the compiled product for any number of rows."""
        return self._many is None

    def __call__(self, x: Tensor) -> Tensor:
        *shape, depth = x.shape
        if depth != self.depth:
            raise ValueError(f"x has {depth} columns; the weight takes {self.depth}")
        rows = math.prod(shape)
        if self._many is not None and rows >= MATRIX_UNIT_TOKENS:
            return self._many(x)
        x32 = x.float().contiguous()
        y = torch.empty((*shape, self.columns))
        self._product(
            x32.data_ptr(),
            self.panels.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
            y.data_ptr(),
            rows,
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
    added = None if bias is None else bias.to(weight.dtype)

    def product(x: Tensor) -> Tensor:
        return F.linear(x.to(weight.dtype), weight, added).to(x.dtype)

    return product


def by_onednn(weight: Tensor, bias: Tensor | None) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    added = None if bias is None else bias.to(weight.dtype)

    def product(x: Tensor) -> Tensor:
        narrow = x.to(weight.dtype)
        y = torch.ops.mkldnn._linear_pointwise(narrow, packed, added, "none", [], "")
        return y.to(x.dtype)

    return product
