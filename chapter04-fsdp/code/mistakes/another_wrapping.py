"""One rank wraps other modules than the rest: the ranks' collectives do not match.

Units decide which collectives there are, how large, and in what order. A rank that chooses them by
something of its own, such as its free memory or a flag of its node, gathers other buffers than its
peers at the same moment.

Run:
    torchrun --nproc_per_node=2 chapter04-fsdp/code/mistakes/another_wrapping.py
    torchrun --nproc_per_node=2 chapter04-fsdp/code/mistakes/another_wrapping.py --fix

You should see: gloo end a rank's process, because data of another size arrived than was expected.
With --fix the ranks agree on one choice first.
"""

from argparse import Namespace

import torch

from distlab import ranks, script
from distlab.run import Run
from distlab.runtime import Runtime
from fsdp import mistake


def main(argv: list[str] | None = None) -> int:
    return mistake.main(__doc__, train, argv)


def train(run: Run, args: Namespace, job: Runtime) -> None:
    every_block = job.rank == 0  # the mistake: each rank decides for itself
    if args.fix:
        every_block = all(ranks.gathered(every_block))
    model = mistake.shard(mistake.network(job), every_block)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(args.steps):
        loss = mistake.loss_of(model, job, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    run.check_below("the last loss, to the first", losses[-1] / losses[0], 1.0)


if __name__ == "__main__":
    script.exit(main)
