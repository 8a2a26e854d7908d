"""A collective that only one rank calls: the others never come, and the job hangs.

Rank 0 wants to print the mean loss of all ranks, and gathers the losses where it prints, under an
`if`. A collective is a meeting: each rank has to come. Rank 0 waits for rank 1's loss, rank 1 is in
the next backward pass already and waits for rank 0's gradients.

Run:
    torchrun --nproc_per_node=2 chapter03-ddp/code/faults/rank_only_collective.py
    torchrun --nproc_per_node=2 chapter03-ddp/code/faults/rank_only_collective.py --fix

You should see: nothing, until the process group's timeout; then an error on each rank, status 1.
With --fix every rank gathers, rank 0 alone prints, and the mean is right.
"""

from argparse import Namespace

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from ddp import fault
from distlab import script
from distlab.run import Run
from distlab.runtime import Runtime

EVERY = 5


def main(argv: list[str] | None = None) -> int:
    return fault.main(__doc__, train, argv)


def train(run: Run, args: Namespace, job: Runtime) -> None:
    model = fault.replica(job)
    optimizer = fault.sgd(model.parameters())
    printed = 0
    for step in range(1, args.steps + 1):
        inputs, targets = fault.examples(job.rank, step, job.device)
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % EVERY == 0 and (job.is_main or args.fix):
            losses = [torch.empty_like(loss) for _ in range(job.world_size)]
            dist.all_gather(losses, loss.detach())  # the mistake: rank 0 alone comes here
            printed += 1
            run.print(f"sample: step {step}, mean loss {torch.stack(losses).mean():.3f}")
    run.check_equal("the mean loss was gathered", printed, args.steps // EVERY)


if __name__ == "__main__":
    script.exit(main)
