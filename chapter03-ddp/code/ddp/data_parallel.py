"""DistributedDataParallel from scratch: hooks fill buckets, buckets travel while backward goes on.

A hook on each parameter runs as soon as its gradient is complete, which happens from the last layer
to the first. It puts the gradient into a bucket: one flat buffer for several parameters. A full
bucket is all-reduced in the background while backward computes the next gradients, so that network
and processor work at the same time. When `backward` returns, gradients are the ranks' mean.

    model = DataParallel(model)  # rank 0's weights on every rank
    model(inputs, targets=targets).backward()
    optimizer.step()  # from the same gradients, so the weights stay the same

`ddp_from_scratch.py` proves that it trains as torch's own does, and measures it.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable

from distlab.errors import RunError
from distlab.ranks import gathered

MIB = 2**20
T = TypeVar("T", bound=Tensor)


class DataParallel(nn.Module):
    """`module` on every rank of `group`, its dense gradients averaged during `backward`.

    The ranks begin with rank 0's parameters and buffers, and take its buffers again before the
    first forward after a synchronised one, as torch's DDP does. `p.grad` becomes a view of a
    bucket, so the next step overwrites it. A parameter that no rank has used keeps its gradient
    None; for one that some have used, the others count as zeros. What is frozen later counts as
    unused; what is trained from some step on, on all ranks, is put into new buckets.

    After a `backward` that raised, the next forward (or `finish_gradient_sync`) drops its gradients
    and makes the other ranks' backward raise too: no replica makes a step that another one does
    not. Raises `RunError` there, and where the ranks' modules are not of one form.

    Source: Li et al. 2020, "PyTorch Distributed", section 3.2.
    """

    def __init__(
        self,
        module: nn.Module,
        bucket_bytes: int = 25 * MIB,
        overlap: bool = True,
        group: dist.ProcessGroup | None = None,
        first_bucket_bytes: int = MIB,
    ) -> None:
        """`first_bucket_bytes`: a smaller cap of the first bucket, so that sending begins early."""
        super().__init__()
        self.module, self.overlap, self.group = module, overlap, group
        self.caps = (min(first_bucket_bytes, bucket_bytes), bucket_bytes)
        self.synchronizes = True  # False within no_sync
        self.buffers_differ = False
        self.due = self.begun = False  # gradients await their mean; the first is in its bucket
        self.launched = 0  # buckets on their way
        self.hooks: list[Any] = []
        self._make_buckets()
        everything = [*module.parameters(), *module.buffers()]
        broadcast_from_rank_0(everything, self.caps, group)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch._C._current_graph_task_id() == -1:  # else a checkpoint recomputes it in backward
            self._prepare()
        return self.module(*args, **kwargs)

    def _prepare(self) -> None:
        if self.begun:  # a backward that did not come to its end
            self._finish(failed=True)
        if any(parameter.requires_grad for parameter in self.frozen):
            self._make_buckets()
        if self.buffers_differ:
            broadcast_from_rank_0(self.module.buffers(), self.caps, self.group)
        self.buffers_differ = self.synchronizes and torch.is_grad_enabled()
        self.due |= torch.is_grad_enabled()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let gradients accumulate on their own rank; the first backward after it averages them."""
        before, self.synchronizes = self.synchronizes, False
        try:
            yield
        finally:
            self.synchronizes = before

    def finish_gradient_sync(self) -> None:
        """Average the gradients where no backward has: all were in no_sync, or used no parameter.

        In the first case it is for all ranks to call, in the second for those whose backward used
        none, while the others wait for them in theirs. Does nothing where nothing is due.
        """
        if self.begun or self.due:
            self._finish(failed=self.begun)

    def all_reduce(self, bucket: "Bucket") -> dist.Work:
        """Begin to sum a bucket over the ranks: the only place where gradients are sent."""
        return dist.all_reduce(bucket.flat, group=self.group, async_op=True)

    def _make_buckets(self) -> None:
        """Buckets and hooks for what is to be trained now, the last parameters first."""
        verify_same_layout(self.module, self.caps, self.group)
        for hook in self.hooks:
            hook.remove()
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        self.frozen = [parameter for parameter in names if not parameter.requires_grad]
        trained = [parameter for parameter in reversed(names) if parameter.requires_grad]
        share = 1 / dist.get_world_size(self.group)
        self.buckets = [
            Bucket(some, [names[one] for one in some], share) for some in packed(trained, self.caps)
        ]
        self.hooks = [
            parameter.register_post_accumulate_grad_hook(self._hook(bucket, index))
            for bucket in self.buckets
            for index, parameter in enumerate(bucket.parameters)
        ]

    def _hook(self, bucket: "Bucket", index: int) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def on_gradient(parameter: Tensor) -> None:
            if not self.synchronizes:
                return
            if not self.begun:
                self.begun = True
                Variable._execution_engine.queue_callback(self._finish)  # when backward ends
            bucket.put(index)
            if self.overlap:
                self._launch_full_buckets()

        return on_gradient

    def _launch_full_buckets(self) -> None:
        """Launch in the list's order: the ranks must agree, in whatever order gradients come.

        The last bucket waits for the end of backward: a rank whose backward fails has not sent it.
        """
        while self.launched < len(self.buckets) - 1 and not self.buckets[self.launched].missing:
            self._launch_next()

    def _launch_next(self, failed: bool = False) -> None:
        bucket = self.buckets[self.launched]
        bucket.close(failed)
        bucket.work = self.all_reduce(bucket)
        self.launched += 1

    @torch.no_grad()
    def _finish(self, failed: bool = False) -> None:
        """Launch what is left, wait for all, and be ready for the next round."""
        self.begun = True
        while self.launched < len(self.buckets):
            self._launch_next(failed)
        for bucket in self.buckets:
            bucket.work.wait()
        users = [bucket.users() for bucket in self.buckets]
        lost = failed or any(math.isnan(count) for counts in users for count in counts)
        for bucket, counts in zip(self.buckets, users, strict=True):
            bucket.end_round(counts, lost)
        self.launched, self.begun, self.due = 0, False, False
        if lost and not failed:
            raise RunError("backward failed on another rank, so this step has no gradients")


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
    layouts = gathered(own, group)
    for rank, layout in enumerate(layouts):
        for expected, found in zip_longest(layouts[0], layout, fillvalue="nothing"):
            if expected != found:
                raise RunError(
                    f"the ranks' modules differ: {expected} on rank 0, {found} on rank {rank}"
                )
