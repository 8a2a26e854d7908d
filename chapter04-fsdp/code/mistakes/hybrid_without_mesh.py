"""FSDP1's hybrid mode without a mesh: it guesses which ranks share a node, and is wrong on a CPU.

HYBRID_SHARD shards within a node and replicates between nodes. Without a mesh the first FSDP takes
as many ranks for a node as the device type counts devices, and a CPU counts one: it shards among
one rank, which is not to shard, and averages no gradients. Each rank trains a model of its own. A
warning tells of NO_SHARD; the losses look like losses.

Run:
    torchrun --nproc_per_node=2 chapter04-fsdp/code/mistakes/hybrid_without_mesh.py
    torchrun --nproc_per_node=2 chapter04-fsdp/code/mistakes/hybrid_without_mesh.py --fix

You should see: weights that are not those of one process on the same data. With --fix, where the
mesh is given, they are. (`fully_shard` takes nothing but a mesh, so this cannot happen to it.)
"""

from argparse import Namespace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from distlab import script
from distlab.run import Run
from distlab.runtime import Runtime
from fsdp import mistake


def main(argv: list[str] | None = None) -> int:
    return mistake.main(__doc__, train, argv)


def train(run: Run, args: Namespace, job: Runtime) -> None:
    options: dict[str, Any] = {}  # the mistake: no mesh
    if args.fix:
        options["device_mesh"] = init_device_mesh(job.device.type, (1, job.world_size))
    model = FullyShardedDataParallel(
        mistake.network(job),
        sharding_strategy=ShardingStrategy.HYBRID_SHARD,
        auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
        device_id=job.device,
        **options,
    )
    sharded = trained(model, args, job, [job.rank])
    alone = trained(mistake.network(job), args, job, range(job.world_size))
    run.check_close("losses of rank 0's data, sharded and in one process", sharded, alone, 1e-5)


def trained(model: nn.Module, args: Namespace, job: Runtime, data_of: Any) -> list[float]:
    """Losses on the batch of step 0, after each step on the batches of the ranks `data_of`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step in range(args.steps):
        for rank in data_of:
            loss = mistake.loss_of(model, job, step, rank=rank) / len(data_of)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            losses.append(mistake.loss_of(model, job, 0, rank=0).item())
    return losses


if __name__ == "__main__":
    script.exit(main)
