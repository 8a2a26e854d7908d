"""The kernels on the roofline: what each computes and moves by its formula, and as it is counted.

Every kernel works through operands that no cache holds (`hardware.beyond_cache_bytes`): a product
takes one weight matrix after another, as the layers of a model do, and an element-wise kernel one
piece of its arrays after another. What a formula calls bytes moved then really comes from memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from distlab.display import quantity
from distlab.measure import Timing, tensors_in
from distlab.script import Run


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


OVERHEAD = 0.2  # of the roof below which starting the kernels takes most of the time


@dataclass(frozen=True)
class Roof:
    """Peaks of one type in FLOP/s and bytes/s: measured, and as specified (None: not known)."""

    dtype: torch.dtype
    peak: float
    bandwidth: float
    specified_peak: float | None
    specified_bandwidth: float | None

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def ridge(self) -> float:
        """FLOPs per byte from which on compute is the limit."""
        return self.peak / self.bandwidth

    def height(self, intensity: float) -> float:
        return min(self.peak, intensity * self.bandwidth)


@dataclass(frozen=True)
class Point:
    """A measured kernel below its roof."""

    kernel: Kernel
    timing: Timing
    roof: Roof

    @property
    def seconds(self) -> float:
        """The median."""
        return self.timing.median

    @property
    def flop_rate(self) -> float:
        return self.kernel.flops / self.seconds

    @property
    def ceiling(self) -> float:
        """The roof above it. Element-wise arithmetic is no matrix product and has no such peak:
        torch does it in vectors, of float32 for smaller types. Its roof is the slope alone.
        """
        if self.kernel.is_product:
            return self.roof.height(self.kernel.intensity)
        return self.kernel.intensity * self.roof.bandwidth

    @property
    def share(self) -> float:
        return self.flop_rate / self.ceiling

    @property
    def shares(self) -> list[float]:
        """Of each time."""
        return [self.kernel.flops / taken / self.ceiling for taken in self.timing.samples]

    @property
    def limit(self) -> str:
        if self.share < OVERHEAD:
            return "overhead"
        on_roof = self.kernel.is_product and self.kernel.intensity > self.roof.ridge
        return "compute" if on_roof else "memory"


def show_roofs(run: Run, roofs: Sequence[Roof]) -> None:
    run.table(
        "roofs",
        ["type", "peak, measured", "specified", "bandwidth, measured", "specified", "ridge"],
        [[r.name, quantity(r.peak, "FLOP/s"), quantity(r.specified_peak, "FLOP/s"),
          quantity(r.bandwidth, "B/s"), quantity(r.specified_bandwidth, "B/s"), r.ridge]
         for r in roofs],
        caption="Ridge: FLOPs per byte that a product needs to be limited by compute",
    )  # fmt: skip
    for roof in roofs:
        run.metric(f"ridge_point_{roof.name}", roof.ridge, "FLOP per byte")


def show_points(run: Run, points: Sequence[Point]) -> None:
    run.table(
        "points",
        ["kernel", "type", "size", "FLOPs/byte", "÷ ridge", "FLOP/s", "GB/s", "% of roof"],
        [[p.kernel.name, p.roof.name, p.kernel.size, p.kernel.intensity,
          p.kernel.intensity / p.roof.ridge, quantity(p.flop_rate, "FLOP/s"),
          p.kernel.bytes_moved / p.seconds / 1e9, 100 * p.share] for p in points],
        caption="Size: rows of a product, elements of an element-wise call",
    )  # fmt: skip
    limits: dict[str, list[str]] = {}
    for point in (p for p in points if p.kernel.is_product):
        limits.setdefault(point.limit, []).append(f"{point.kernel.size} rows in {point.roof.name}")
    words = [f"limited by {what}: {', '.join(names)}" for what, names in limits.items()]
    run.print(f"verdict: products {'; '.join(words)}")


def draw(run: Run, roofs: Sequence[Roof], points: Sequence[Point]) -> None:
    intensities = [point.kernel.intensity for point in points]
    first, last = np.log2([min(intensities) / 2, 2 * max(*intensities, *(r.ridge for r in roofs))])
    x = np.logspace(first, last, 64, base=2)
    series = [
        {"label": f"{roof.name} roof", "x": x.tolist(), "y": [roof.height(i) for i in x]}
        for roof in roofs
    ]
    vector = [p for p in points if p.roof is roofs[0] and not p.kernel.is_product]
    groups = {f"{roof.name} products": [p for p in points if p.kernel.is_product and p.roof is roof]
              for roof in roofs}  # fmt: skip
    groups[f"{roofs[0].name} element-wise"] = [
        p
        for p in vector
        if p.kernel.intensity < p.roof.ridge  # else its roof is not the products'
    ]
    series += [
        {"label": label, "points": True, "x": [p.kernel.intensity for p in group],
         "y": [p.flop_rate for p in group]}
        for label, group in groups.items()
    ]  # fmt: skip
    run.figure(
        "roofline", kind="line", log_x=True, log_y=True, series=series,
        title="No kernel is above its roof",
        x_label="arithmetic intensity (FLOPs per byte)", y_label="speed (FLOP/s)",
    )  # fmt: skip
