"""roofline.py's roofs and points, their tables and their figure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from _roofline_kernels import Kernel

from distlab.display import quantity
from distlab.script import Run

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
    seconds: float
    roof: Roof

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
    ends = np.log2([min(intensities) / 2, 2 * max(*intensities, *(r.ridge for r in roofs))])
    x = np.logspace(*ends, 64, base=2)
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
        x_label="arithmetic intensity (FLOPs per byte)", y_label="FLOP/s",
    )  # fmt: skip
