"""DistributedDataParallel from scratch: hooks fill buckets, buckets travel while backward goes on.

A hook on each parameter runs as soon as its gradient is complete, which happens from the last layer
to the first. It puts the gradient into a bucket: one flat buffer for several parameters. A full
bucket is all-reduced in the background while backward computes the next gradients, so that network
and processor work at the same time. When `backward` returns, gradients are the ranks' mean.

    model = DataParallel(model)  # rank 0's weights on every rank
    model(inputs, targets=targets).backward()
    optimizer.step()  # from the same gradients, so the weights stay the same

Run:
    torchrun --nproc_per_node=2 chapter03-ddp/code/ddp_from_scratch.py
    torchrun --nproc_per_node=4 chapter03-ddp/code/ddp_from_scratch.py
    python3 scripts/lab.py cluster --nodes 2 --rate 1gbit -- \\
        torchrun --nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d \\
        --rdzv_endpoint=node0:29500 chapter03-ddp/code/ddp_from_scratch.py

You should see: losses and weights equal to those of torch's DDP and of one process to 1e-5, for a
model with tied weights, for one without, and for one that is odd in every way; the buckets, and
when in backward each of them left; the time of a step, and of torch's.
"""

import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from _ddp_buckets import Bucket, broadcast_from_rank_0, packed, verify_same_layout
from _ddp_parity import check_shares, prove_equal
from _ddp_steps import compare_step_times, report_buckets
from torch import Tensor, nn
from torch.autograd import Variable

from distlab import runtime, script
from distlab.errors import RunError, UsageError
from distlab.model import add_model_flags

MIB = 2**20
PRESETS = {
    "smoke": {"model": "smoke", "batch_size": 8, "seq_len": 32, "steps": 20, "repeats": 5,
              "bucket_mb": 0.1, "max_ratio": 25.0},
    "laptop": {"model": "laptop", "batch_size": 8, "seq_len": 128, "steps": 20, "repeats": 15,
               "bucket_mb": 2.0, "max_ratio": 1.05},
    "gpu": {"model": "gpu", "batch_size": 8, "seq_len": 512, "steps": 20, "repeats": 20,
            "bucket_mb": 25.0, "max_ratio": 1.05},
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with (
        script.run(args) as run,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        prove_equal(run, args, job, DataParallel)
        report_buckets(run, args, job, DataParallel)
        compare_step_times(run, args, job, DataParallel)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    runtime.add_runtime_flags(parser)
    add = parser.add_argument
    add("--batch-size", type=script.positive_int, help="sequences of all ranks together")
    add("--seq-len", type=script.positive_int)
    add("--steps", type=script.positive_int, help="of each proof")
    add("--bucket-mb", type=script.positive_float, metavar="MB", help="cap of a bucket, in 2^20 B")
    add("--repeats", type=script.positive_int, help="timed steps of each kind")
    add("--max-ratio", type=script.positive_float, help="to DDP's step time, allowed at 2 ranks")
    args = parser.parse_args(argv)
    check_shares(args)
    if args.repeats < 3:
        raise UsageError(f"--repeats {args.repeats} gives no median; use 3 or more")
    if args.bucket_mb * MIB < 1:
        raise UsageError(f"--bucket-mb {args.bucket_mb:g} is less than a byte; use 0.1 or more")
    return args


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

    def all_reduce(self, bucket: Bucket) -> dist.Work:
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

    def _hook(self, bucket: Bucket, index: int) -> Callable[[Tensor], None]:
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


if __name__ == "__main__":
    script.exit(main)
