"""The kernels on the roofline: what each computes and moves by its formula, and as it is counted.

Every kernel works through operands that no cache holds (`hardware.beyond_cache_bytes`): a product
takes one weight matrix after another, as the layers of a model do, and an element-wise kernel one
piece of its arrays after another. What a formula calls bytes moved then really comes from memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from distlab.measure import tensors_in


@dataclass(frozen=True)
class Kernel:
    """One point to be measured. `calls` is how many operators one run starts."""

    name: str
    dtype: torch.dtype
    size: int  # of a product its rows; of an element-wise kernel the elements of a call
    flops: float
    bytes_moved: float
    calls: int
    run: Callable[[], object]
    is_product: bool = False

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes_moved


def random_weights(
    width: int, memory: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Square matrices that fill `memory`, at least one."""
    count = max(1, memory // (width * width * dtype.itemsize))
    return [torch.randn(width, width, device=device).to(dtype) for _ in range(count)]


def product(rows: int, weights: list[Tensor], most_flops: float) -> Kernel:
    """[rows, n] x [n, n] for one weight after another: 2·m·n² FLOPs each, m the rows.

    It reads the weight and the rows and writes as many rows: n² + 2·m·n elements. Of the weights it
    takes no more than `most_flops` allow: what leaves some out is far on the compute side.
    """
    width, dtype, element = len(weights[0]), weights[0].dtype, weights[0].element_size()
    flops, moved = 2.0 * rows * width**2, element * (width**2 + 2 * rows * width)
    used = weights[: max(1, int(most_flops // flops))]
    x = torch.randn(rows, width, device=weights[0].device).to(dtype)
    y = torch.empty_like(x)

    def run() -> None:
        for weight in used:
            torch.mm(x, weight, out=y)

    count = len(used)
    return Kernel("product", dtype, rows, count * flops, count * moved, count, run, True)


def elementwise(name: str, arrays: list[Tensor], piece: int) -> Kernel:
    """A kernel of ELEMENTWISE over three arrays [n], `piece` elements a call."""
    operation, flops, moved, results = ELEMENTWISE[name]
    pieces = list(zip(*(array.split(piece) for array in arrays), strict=True))
    count, element = arrays[0].numel(), arrays[0].element_size()

    def run() -> None:
        for a, b, c in pieces:
            operation(a, b, c)

    moved_bytes = (moved * count + results * len(pieces)) * element
    return Kernel(name, arrays[0].dtype, piece, flops * count, moved_bytes, len(pieces), run)


def _unfused(a: Tensor, b: Tensor, c: Tensor) -> None:
    """a += b·c by two kernels: the product goes to memory and comes back."""
    torch.mul(b, c, out=c)
    a.add_(c)


FUSED, UNFUSED = "fused a += b*c", "unfused a += b*c"
ELEMENTWISE: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], object], int, int, int]] = {
    # the operation; for each element its FLOPs and the elements moved (read or written); and the
    # results that a call writes besides
    "scale a *= s": (lambda a, b, c: a.mul_(1.0), 1, 2, 0),
    "add a += b": (lambda a, b, c: a.add_(b), 1, 3, 0),
    "sum of a": (lambda a, b, c: a.sum(), 1, 1, 1),
    FUSED: (lambda a, b, c: a.addcmul_(b, c), 2, 4, 0),
    UNFUSED: (_unfused, 2, 6, 0),
}
ROOFS = ("scale a *= s", "add a += b", "sum of a")  # the streams that a memory roof is made of


def square(width: int, dtype: torch.dtype, device: torch.device) -> Kernel:
    """One product of square matrices: what a compute roof is made of."""
    return replace(product(width, random_weights(width, 0, dtype, device), 0), name="square")


class CountBytes(TorchDispatchMode):
    """Bytes of the tensors that operators read and write: each argument once, each result once.

    A tensor given as `out` is only written. One updated in place is read and written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        read = tensors_in((args, {k: v for k, v in kwargs.items() if k != "out"}))
        self.bytes += sum(t.numel() * t.element_size() for t in [*read, *tensors_in(results)])
        return results


def counted(kernel: Kernel) -> tuple[int, int]:
    """The FLOPs of products, by torch's counter, and the bytes of all operators of one run."""
    with FlopCounterMode(display=False) as flops, CountBytes() as moved:
        kernel.run()
    return flops.get_total_flops(), moved.bytes
