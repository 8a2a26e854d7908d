"""The hooks that torch brings with it, and DDP's own all-reduce."""

from argparse import Namespace

import torch.distributed as dist
from _hooks_payload import all_reduced, low_rank
from _hooks_training import Hook
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    bf16_compress_hook,
    fp16_compress_hook,
)
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel as DDP


def none(replica: DDP, args: Namespace) -> None:
    """DDP's own all-reduce in float32."""


def fp16(replica: DDP, args: Namespace) -> None:
    replica.register_comm_hook(None, fp16_compress_hook)


def bf16(replica: DDP, args: Namespace) -> None:
    replica.register_comm_hook(dist.group.WORLD, bfloat16_hook)


def bfloat16_hook(group: dist.ProcessGroup, bucket: dist.GradBucket) -> Future[Tensor]:
    """torch's own by another name: DDP knows that one, and refuses it without NCCL."""
    return bf16_compress_hook(group, bucket)


def powersgd(rank: int, feedback: bool = True) -> Hook:
    """`rank` columns for each matrix, which begin as those of the step before (warm start)."""

    def register(replica: DDP, args: Namespace) -> None:
        state = PowerSGDState(
            None, rank, args.start_powersgd, use_error_feedback=feedback, warm_start=True
        )
        replica.register_comm_hook(state, powerSGD_hook)

    return Hook(register, low_rank(rank))


TORCH_HOOKS = {
    "none": Hook(none, all_reduced(4)),
    "fp16": Hook(fp16, all_reduced(2)),
    "bf16": Hook(bf16, all_reduced(2)),
    "powersgd-1": powersgd(1),
    "powersgd-2": powersgd(2),
    "powersgd-4": powersgd(4),
    "powersgd-4-no-feedback": powersgd(4, feedback=False),
}
