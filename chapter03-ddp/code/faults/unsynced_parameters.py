"""Ranks that begin with different weights, and never notice: gradients agree, models do not.

Each rank has a seed of its own, as it should for its dropout and its data, and builds its model
with it. The gradients are averaged by hand, and nobody has thought of the weights. Every step adds
the same update to different models, so they stay different for ever, and each rank's gradient is
that of another model. DDP broadcasts rank 0's weights when it wraps a model; a loop of one's own
must.

Run:
    torchrun --nproc_per_node=2 chapter03-ddp/code/faults/unsynced_parameters.py
    torchrun --nproc_per_node=2 chapter03-ddp/code/faults/unsynced_parameters.py --fix

You should see: no error, a loss that falls, and a check that fails at the end: the ranks hold
different weights. With --fix one broadcast for each parameter makes it hold.
"""

from argparse import Namespace

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from ddp import fault
from distlab import ranks, script
from distlab.run import Run
from distlab.runtime import Runtime


def main(argv: list[str] | None = None) -> int:
    return fault.main(__doc__, train, argv)


def train(run: Run, args: Namespace, job: Runtime) -> None:
    torch.manual_seed(args.seed + job.rank)
    model = fault.network().to(job.device)
    if args.fix:
        for parameter in model.parameters():
            dist.broadcast(parameter.data, src=0)
    optimizer = SGD(model.parameters(), lr=0.1)  # the mistake: nobody made the weights equal
    for step in range(1, args.steps + 1):
        inputs, targets = fault.examples(job.rank, step, job.device)
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        for gradient in [p.grad for p in model.parameters() if p.grad is not None]:
            dist.all_reduce(gradient)
            gradient /= job.world_size
        optimizer.step()
        optimizer.zero_grad()
    run.print(f"sample: step {step}, loss {loss:.3f}")
    run.check_equal("all ranks hold the same weights", ranks.distinct(model.parameters()), 1)


if __name__ == "__main__":
    script.exit(main)
