"""Gradients are clipped by the norm of the rank's own shards: each rank clips by another one.

The norm of a sharded gradient is known to no rank: the squares must be summed over the ranks before
the root is taken. Clipped by its own norm each rank scales its shards by a factor of its own, so
that the direction changes too; and what is left has not the norm that was asked for.

Run:
    torchrun --nproc_per_node=2 chapter04-fsdp/code/mistakes/local_norm.py
    torchrun --nproc_per_node=2 chapter04-fsdp/code/mistakes/local_norm.py --fix

You should see: as many factors as ranks, and a global norm above the bound. With --fix, which
clips sharded tensors as such, one factor, and the bound.
"""

from argparse import Namespace

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from distlab import ranks, script
from distlab.run import Run
from distlab.runtime import Runtime
from fsdp import mistake

MOST = 0.01


def main(argv: list[str] | None = None) -> int:
    return mistake.main(__doc__, train, argv)


def train(run: Run, args: Namespace, job: Runtime) -> None:
    model = mistake.shard(mistake.network(job))
    mistake.loss_of(model, job, 0).backward()
    gradients = [p.grad for p in model.parameters() if isinstance(p.grad, DTensor)]
    shards = [gradient.to_local() for gradient in gradients]
    before = torch.stack([shard.abs().sum() for shard in shards]).sum()
    if args.fix:
        clip_grad_norm_(model.parameters(), MOST)
    else:
        norm = torch.stack([shard.square().sum() for shard in shards]).sum().sqrt()
        for shard in shards:
            shard.mul_(MOST / norm)  # the mistake: the norm is this rank's
    factor = torch.stack([shard.abs().sum() for shard in shards]).sum() / before
    squares = torch.stack([shard.square().sum() for shard in shards]).sum()
    dist.all_reduce(squares)
    run.check_below("global norm after clipping, to the bound", squares.sqrt().item() / MOST, 1.001)
    factors = ranks.gathered(factor.item())
    run.check_below("the ranks' largest factor to the smallest", max(factors) / min(factors), 1.001)


if __name__ == "__main__":
    script.exit(main)
