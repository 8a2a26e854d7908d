"""Buckets: flat buffers in which the gradients of several parameters travel as one message."""

import math
from collections.abc import Iterable
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distlab.errors import RunError

T = TypeVar("T", bound=Tensor)


class Bucket:
    """Parameters whose gradients travel together.

    `flat` is [their gradients, one after another | for each the number of ranks that have it].
    """

    def __init__(self, parameters: list[nn.Parameter], names: list[str], share: float) -> None:
        self.parameters, self.names, self.share = parameters, names, share
        sizes = [parameter.numel() for parameter in parameters]
        one = parameters[0]
        self.flat = torch.zeros(sum(sizes) + len(sizes), dtype=one.dtype, device=one.device)
        *pieces, self.counts = self.flat.split([*sizes, len(sizes)])
        self.views = [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]
        self.begin_round()

    def begin_round(self) -> None:
        self.arrived = [False] * len(self.parameters)
        self.missing = len(self.parameters)
        self.work: Any = None  # the all-reduce, once it is under way

    def put(self, index: int) -> None:
        """Take in a gradient, divided by K before the sum, which so cannot overflow; else zeros."""
        parameter, view = self.parameters[index], self.views[index]
        if self.arrived[index]:
            raise RunError(
                f"the gradient of {self.names[index]} came twice before the ranks had averaged it: "
                "checkpoint with use_reentrant=False, and run forward again if a backward failed"
            )
        if parameter.grad is None:
            view.zero_()
            return
        torch.mul(parameter.grad, self.share, out=view)
        parameter.grad = view
        self.arrived[index] = True
        self.missing -= 1

    def close(self, failed: bool) -> None:
        """Complete the buffer: what had no backward now counts with its earlier gradient, or 0."""
        if failed:
            self.counts.fill_(math.nan)
            return
        for index, there in enumerate(self.arrived):
            if not there:
                self.put(index)
        if self.missing:
            self.counts.copy_(torch.tensor(self.arrived))
        else:
            self.counts.fill_(1)

    def users(self) -> list[float]:
        """How many ranks have each gradient; NaN says that a rank's backward failed."""
        return self.counts.tolist()

    def end_round(self, counts: list[float], lost: bool) -> None:
        """Give a gradient to what only other ranks have used; none to any if the round is lost."""
        for index, parameter in enumerate(self.parameters):
            if lost:
                parameter.grad = None
            elif not self.arrived[index] and counts[index] and parameter.requires_grad:
                parameter.grad = self.views[index]
        self.begin_round()


def packed(tensors: Iterable[T], caps: tuple[int, int]) -> list[list[T]]:
    """Lists of tensors of one type and device, in order, none above its cap of bytes if it can be.

    The first list has a cap of its own, `caps[0]`; a tensor larger than the cap is alone.
    """
    full: list[list[T]] = []
    filling: dict[Any, list[T]] = {}
    for tensor in tensors:
        some = filling.setdefault((tensor.dtype, tensor.device), [])
        if some and sum(one.nbytes for one in some) + tensor.nbytes > caps[bool(full)]:
            full.append(some.copy())
            some.clear()
        some.append(tensor)
    return full + list(filling.values())


@torch.no_grad()
def broadcast_from_rank_0(
    tensors: Iterable[Tensor], caps: tuple[int, int], group: dist.ProcessGroup | None
) -> None:
    for some in packed(tensors, caps):
        flat = torch.cat([tensor.flatten() for tensor in some])
        dist.broadcast(flat.view(torch.uint8), group=group, group_src=0)  # of whatever type
        pieces = flat.split([tensor.numel() for tensor in some])
        for tensor, piece in zip(some, pieces, strict=True):
            tensor.copy_(piece.view(tensor.shape))


def verify_same_layout(
    module: nn.Module, caps: tuple[int, int], group: dist.ProcessGroup | None
) -> None:
    """Raise `RunError` where the ranks' modules are not of one form: their sums would be wrong."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    own = [
        f"{name} {list(tensor.shape)} {tensor.dtype}{', trained' if tensor.requires_grad else ''}"
        for name, tensor in tensors
    ]
    own.append(f"buckets of {caps} bytes")
    layouts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(layouts, own, group)
    for rank, layout in enumerate(layouts):
        for expected, found in zip_longest(layouts[0], layout, fillvalue="nothing"):
            if expected != found:
                raise RunError(
                    f"the ranks' modules differ: {expected} on rank 0, {found} on rank {rank}"
                )
