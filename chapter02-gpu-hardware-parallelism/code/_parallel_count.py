"""How much torch's own parallelisms send: a counter of the collectives that DTensor calls."""

from collections import Counter
from typing import Any

import torch.distributed as dist
from torch._ops import OpOverload
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode


class CountCollectives(TorchDispatchMode):
    """Within it, `total` bytes that a ring makes this rank send, in `calls` of each collective.

    It sees what torch dispatches: DTensor's functional collectives, not `torch.distributed`'s.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.total = 0.0
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    @property
    def total_calls(self) -> int:
        return sum(self.calls.values())

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # let DTensor turn itself into collectives first
        if func.namespace == "_c10d_functional":
            self._count(func.name().removeprefix("_c10d_functional::"), *args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, *args: Any) -> None:
        others = (self.world_size - 1) / self.world_size
        if name.startswith("all_reduce"):
            self._add("all_reduce", 2 * others * args[0].nbytes)
        elif name.startswith("reduce_scatter"):
            self._add("reduce_scatter", others * args[0].nbytes)
        elif name.startswith("all_gather"):
            self._add("all_gather", (self.world_size - 1) * args[0].nbytes)
        elif name.startswith("all_to_all"):
            sent = args[2]  # rows to each rank
            self._add("all_to_all", (1 - sent[self.rank] / sum(sent)) * args[0].nbytes)

    def _add(self, collective: str, sent: float) -> None:
        self.calls[collective] += 1
        self.total += sent
