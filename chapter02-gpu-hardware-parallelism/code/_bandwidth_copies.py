"""Copies between the memories that there are, and the straight line through their times.

A copy of n bytes takes alpha + n / bandwidth: what one transfer costs, and what a byte costs. It is
the model that the collectives are predicted with (`distlab.predict.communication`).
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import permutations

import numpy as np
import torch

from distlab import measure
from distlab.catalog import find_gpu

BLOCK = 2**20 + 7  # no power of two, lest a piece in the wrong place look right


@dataclass(frozen=True)
class Route:
    """From one memory to another. `specified` in bytes/s one way, None where nobody tells."""

    name: str
    source: torch.device
    target: torch.device
    pinned: bool = False  # the host's side is page-locked: the GPU's copy engine reads it itself
    specified: float | None = None


@dataclass
class Transfers:
    """What the copies of one route took."""

    route: Route
    sizes: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    wrong: list[int] = field(default_factory=list)  # sizes whose copy differs from its source

    @property
    def best(self) -> float:
        return max(size / taken for size, taken in zip(self.sizes, self.seconds, strict=True))


def host_routes(device: torch.device) -> list[Route]:
    """Between the host and a GPU, both ways, pinned and pageable; on a CPU within its memory."""
    cpu = torch.device("cpu")
    if device.type == "cpu":
        return [Route("host to host", cpu, cpu)]
    spec = find_gpu(torch.cuda.get_device_name(device))
    one_way = None if spec is None or spec.pcie_bandwidth is None else spec.pcie_bandwidth / 2
    return [
        Route(f"{kind} host to device" if up else f"device to {kind} host",
              cpu if up else device, device if up else cpu, kind == "pinned", one_way)
        for kind in ("pinned", "pageable") for up in (True, False)
    ]  # fmt: skip


def peer_routes() -> list[Route]:
    """From each GPU to each other; over NVLink where both have it, by the data sheet."""
    routes = []
    for a, b in permutations(range(torch.cuda.device_count()), 2):
        spec = find_gpu(torch.cuda.get_device_name(a))
        both_ways = spec and torch.cuda.can_device_access_peer(a, b) and spec.nvlink_bandwidth
        routes.append(
            Route(f"GPU{a} to GPU{b}", torch.device("cuda", a), torch.device("cuda", b),
                  specified=both_ways / 2 if both_ways else None)
        )  # fmt: skip
    return routes


def transfer(route: Route, sizes: Sequence[int], repeats: int) -> Transfers:
    """Copy each size `repeats` times, in turns over the sizes, and look at what has arrived."""
    clock = route.source if route.source.type == "cuda" else route.target
    pairs = {size: _buffers(route, size) for size in sizes}
    copies = {
        str(size): lambda a=source, b=target: b.copy_(a, non_blocking=route.pinned)
        for size, (source, target) in pairs.items()
    }
    with (
        torch.cuda.device(clock) if clock.type == "cuda" else nullcontext()
    ):  # whose events time it
        timings = measure.compare(copies, 2, repeats, clock)
    result = Transfers(route)
    for size, (source, target) in pairs.items():
        result.sizes.append(size)
        result.seconds.append(timings[str(size)].median)
        if not torch.equal(source.cpu(), target.cpu()):
            result.wrong.append(size)
    return result


def _buffers(route: Route, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random bytes at the source, a block of them repeated, and zeros at the target."""
    generator = torch.Generator().manual_seed(size)
    block = torch.randint(256, (min(size, BLOCK),), generator=generator, dtype=torch.uint8)
    content = block.repeat(-(-size // BLOCK))[:size]
    source, target = content.to(route.source), torch.zeros_like(content, device=route.target)
    if route.pinned and route.source.type == "cpu":
        source = source.pin_memory()
    if route.pinned and route.target.type == "cpu":
        target = target.pin_memory()
    return source, target


def fit_line(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """(alpha, beta) that come closest to `seconds` = alpha + beta · size, relative to each time.

    Relative, since an absolute fit would hear only the largest sizes. Neither may be negative.
    """
    taken = np.asarray(seconds)
    rows = np.stack([1 / taken, np.asarray(sizes) / taken], axis=1)
    alpha, beta = np.linalg.lstsq(rows, np.ones(len(taken)), rcond=None)[0]
    if alpha < 0:
        alpha, beta = 0.0, rows[:, 1].sum() / (rows[:, 1] ** 2).sum()
    if beta < 0:
        alpha, beta = rows[:, 0].sum() / (rows[:, 0] ** 2).sum(), 0.0
    return float(alpha), float(beta)
