"""paged_attention.py's count of gathered bytes, and its table of times."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distlab.measure import Timing
from distlab.script import Run


class _Gathered(TorchDispatchMode):
    """Sums the bytes of what index_select takes out, as torch dispatches it."""

    bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.index_select.default:
            self.bytes += output.nbytes
        return output


def gathered_bytes(function: Callable[[], Tensor]) -> int:
    with _Gathered() as seen:
        function()
    return seen.bytes


def show_times(
    run: Run, timings: Mapping[Any, Timing], tokens: Mapping[str, tuple[int, int]]
) -> None:
    """`timings` by (mix, way), and for each mix the tokens that a padded batch and a paged read."""
    rows, ratios, padding = [], {}, {}
    for mix, (padded, real) in tokens.items():
        dense, paged = timings[mix, "dense"].median, timings[mix, "paged"].median
        ratios[mix], padding[mix] = dense / paged, padded / real
        rows.append([mix, padded, real, padding[mix], 1e3 * dense, 1e3 * paged, ratios[mix]])
    run.table(
        "times",
        ["lengths", "padded tokens", "tokens", "padding", "dense ms", "paged ms", "dense / paged"],
        rows,
        caption="One decode step of one layer",
    )
    run.compare(
        "dense over paged at mixed lengths, from the padding and the price at equal lengths",
        ratios["equal"] * padding["mixed"], ratios["mixed"],
    )  # fmt: skip
