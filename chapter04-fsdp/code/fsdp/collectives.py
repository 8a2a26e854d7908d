"""The two collectives of sharding, in the background, and what they cost on gloo.

gloo's reduce-scatter is an all-reduce of which the rest is thrown away: it sends 2(K-1)/K of the
buffer, where (K-1)/K would do. An all-to-all followed by a sum sends just that, so on gloo it is
what stands behind `Reduction`.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distlab.errors import UsageError

# torch 2.13 renames the two; the old names warn there
ALL_GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def all_gather(whole: Tensor, part: Tensor, group: dist.ProcessGroup | None) -> Any:
    """Begin to fill `whole` [K * n] with the ranks' `part` [n]; `.wait()` ends it."""
    return ALL_GATHER(whole, part, group=group, async_op=True)


class Reduction:
    """The mean over the ranks of `whole` [K * n], on its way: each rank gets its part [n].

    With `scatter` False all get all of it, and `whole` is overwritten.
    """

    def __init__(
        self, whole: Tensor, group: dist.ProcessGroup | None, scatter: bool = True
    ) -> None:
        self.ranks = dist.get_world_size(group)
        self.sent = whole  # kept until it has been sent
        self.addends: Tensor | None = None  # [K, n], to be added here
        if not scatter:
            self.result = whole
            self.work = dist.all_reduce(whole, group=group, async_op=True)
        elif dist.get_backend(group) == "gloo":
            self.addends = torch.empty_like(whole).view(self.ranks, -1)
            self.work = dist.all_to_all_single(
                self.addends.view(-1), whole, group=group, async_op=True
            )
        else:
            self.result = whole.new_empty(whole.numel() // self.ranks)
            self.work = REDUCE_SCATTER(self.result, whole, group=group, async_op=True)

    def wait(self) -> Tensor:
        """The mean; waits for the other ranks, at most the group's timeout."""
        self.work.wait()
        if self.addends is not None:
            self.result = self.addends.sum(0)
        return self.result.div_(self.ranks)


def subgroup_of(size: int, group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """This rank's group among those of `size` neighbours; every rank of the job calls it.

    Raises `UsageError` where `size` does not divide the ranks, or `group` is not all of them.
    """
    ranks = dist.get_world_size()
    if dist.get_world_size(group) != ranks:
        raise UsageError("resharding to a number of ranks needs all ranks in one group")
    if ranks % size:
        fitting = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
        raise UsageError(f"{ranks} ranks cannot be put into groups of {size}; use {fitting}")
    own, _ = dist.new_subgroups(size)
    return own


@torch.no_grad()
def broadcast_from_first(tensors: Iterable[Tensor]) -> None:
    """Give every rank the values of rank 0."""
    for tensor in tensors:
        dist.broadcast(tensor.detach(), src=0)
